"""s3:// URLs for plain webdataset, in `wds.WebDataset("s3://bucket/{000..999}.tar")` and `wds.TarWriter("s3://...")`.

Registered when `data_pipeline.reading.stream` is imported (as for `ShardStream`) or by `data_pipeline.register_s3()`.
"""

from __future__ import annotations

import importlib
import io
from typing import Any, BinaryIO

from data_pipeline.common.one_way import OneWay
from data_pipeline.storage import s3, store


class _Writer(io.BytesIO):
    """A file that is uploaded as a whole when it is closed."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def close(self) -> None:
        if self.closed:
            return
        try:
            store.write_bytes(self._url, self.getvalue())
        finally:
            super().close()  # or else Python, which closes it once more when it is dropped, would upload it again

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            super().close()  # after an exception nothing is uploaded
        else:
            self.close()


def open_s3(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> BinaryIO:
    """Open an s3:// URL for webdataset. A broken connection is resumed at the byte where it broke.

    Raises:
        DataError, StoreError: when reading or closing the file; the message names the object.
    """
    if mode == "wb":
        return _Writer(url)
    stream = s3.S3Stream(url)
    return io.BufferedReader(OneWay(stream.read, stream.close), s3.PIECE)


def register_s3() -> None:
    """Make webdataset open s3:// URLs with `open_s3`."""
    # `import webdataset.gopen as gopen` would bind the function of that name instead of the module.
    importlib.import_module("webdataset.gopen").gopen_schemes["s3"] = open_s3
