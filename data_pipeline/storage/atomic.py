"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LONGEST_NAME = 180
"""Bytes of the name that the temporary file repeats; file systems allow 255 in all."""


@contextmanager
def replacing(path: str | Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends; its directory is created.

    Readers see the old content or the whole new one. Left by an exception, nothing changes and no temporary file stays.

    Args:
        durable: the bytes are on disk (fsync) before the file gets its name.

    Raises:
        OSError: the disk is full, the directory cannot be written, ...; it names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST_NAME])
    temporary = path.with_name(f".{name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


@contextmanager
def naming(path: str) -> Iterator[None]:
    """System errors name `path` where they name no file, as those of writing to an open one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = path
        raise


def scratch() -> str:
    """The directory of temporary files, as errors name it."""
    return f"TMPDIR={tempfile.gettempdir()}"
