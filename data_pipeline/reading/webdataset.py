"""s3:// for plain webdataset: `wds.WebDataset("s3://bucket/{000..999}.tar")` reads and `wds.TarWriter("s3://...")`
writes.

Registered by `import data_pipeline.reading.stream` (so by using `ShardStream`) or by `data_pipeline.register_s3()`.
"""

from __future__ import annotations

import importlib
import io
from typing import Any, BinaryIO

from data_pipeline.common.one_way import OneWay
from data_pipeline.storage import s3, store


class _Writer(io.BytesIO):
    """An object that appears whole when the file is closed."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def close(self) -> None:
        if not self.closed:
            store.write_bytes(self._url, self.getbuffer())
        super().close()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            super().close()  # left by an exception: nothing appears
        else:
            self.close()


def open_s3(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> BinaryIO:
    """webdataset's opener: a file over our stream, which continues at the broken byte.

    Raises:
        DataError, StoreError: from reading, with the object's name.
    """
    if mode == "wb":
        return _Writer(url)
    stream = s3.S3Stream(url)
    return io.BufferedReader(OneWay(stream.read, stream.close), s3.PIECE)


def register_s3() -> None:
    """Makes webdataset open s3:// URLs with `open_s3`."""
    # `import webdataset.gopen as gopen` would give the function of that name instead of the module.
    importlib.import_module("webdataset.gopen").gopen_schemes["s3"] = open_s3
