"""Atomic writes: a file appears complete or not at all."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LONGEST_NAME = 180
"""Most bytes of a file's name to repeat in the name of its temporary file; file systems allow 255 in total."""


@contextmanager
def replacing(path: str | Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends; its directory is created if needed.

    Readers see the old content or all of the new one. If the block raises, nothing changes and the temporary file is
    removed.

    Args:
        path: the file to write.
        durable: flush the bytes to disk (fsync) before the file gets its name.

    Raises:
        OSError: the disk is full, the directory is not writable, ...; the error names `path`.
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


def abandoned(name: str) -> str:
    """Return the name of the file that a temporary file, left by a dead process of this machine, was to become.

    Empty for other files; cut at `LONGEST_NAME` bytes.
    """
    found = re.fullmatch(r"\.(.+)\.(\d+)-\d+\.tmp", name, re.DOTALL)
    if not found:
        return ""
    try:
        os.kill(int(found[2]), 0)
    except (ProcessLookupError, OverflowError):
        return found[1]
    except PermissionError:  # it lives, as another user's
        pass
    return ""


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Make system errors name `path` if they name no file, as errors of writing to an open file do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = path
        raise


def scratch() -> str:
    """Return the directory of temporary files as it is named in errors."""
    with suppress(FileNotFoundError):  # there is none that can be written
        return f"TMPDIR={tempfile.gettempdir()}"
    return f"TMPDIR={os.environ.get('TMPDIR', '')}"


def add_line(path: Path, line: str) -> None:
    """Append a line to a text file. A last line that its writer could not complete (it was killed, or the disk was
    full) is ended first, so that it does not take the new one with it."""
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + line.encode() + b"\n")
