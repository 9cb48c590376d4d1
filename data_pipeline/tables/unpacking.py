"""From the bytes of a file to plain text: decompresses it and converts wide encodings; tells what is not a table."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

from data_pipeline.common.one_way import OneWay
from data_pipeline.content.members import instead
from data_pipeline.storage.atomic import naming, scratch
from data_pipeline.tables.base import no_table

_LONE_RETURN = re.compile(rb"\r(?!\n)")
"""A line end of old Macs; some files mix it with others."""
HEAD = 1 << 16
"""Bytes at the beginning by which the format is detected."""
_OTHERS = (
    (b"ORC", "it is an ORC file: export the table as .parquet"),
    (b"Obj\x01", "it is an Avro file: export the table as .parquet"),
    (b"FEA1", "it is a Feather file of version 1: save it as .parquet"),
    (b"\x89HDF", "it is an HDF5 file: export the table as .parquet, or the pictures as files"),
    (b"\x93NUMPY", "it is a NumPy array: save the pictures as files"),
    (b"SQLite format 3", "it is a SQLite database: export the table as .csv"),
    (b"\xd0\xcf\x11\xe0", "it is an Excel file: save it as .csv"),
    (b"version https://git-lfs", instead(b"version https://git-lfs")),
    (b"\x80\x04\x95", "it is a pickle, which is a program: save it as .csv or .parquet"),
    (b"<", "it is HTML or XML, possibly an error page: download or export the table again"),
)
"""How files that are not tables begin -> what to do."""


def refuse_others(head: bytes, path: Path) -> None:
    """Raise `DataError` with the remedy if a file that begins with `head` is of a format that is not a table."""
    for signature, words in _OTHERS:
        if head.removeprefix(b"\xef\xbb\xbf").startswith(signature):
            raise no_table(path, words)


def open_plain(path: Path) -> IO[bytes]:
    """Return a file with the decompressed content in UTF-8 or another superset of ASCII, with line feeds as line ends.

    Raises:
        DataError: it is a format that is not a table.
    """
    file: IO[bytes] = open(path, "rb")  # noqa: SIM115
    head = file.read(HEAD)
    file.seek(0)
    refuse_others(head, path)
    if head[:4] == b"PK\x03\x04":
        file = _unpacked(_only_member(file, path))
    else:
        for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)):
            if head.startswith(magic):
                file = _unpacked(opener(file))
        for magic, codec in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4")):
            if head.startswith(magic):
                file = _unpacked(_compressed(file, codec))
    head = file.read(HEAD)
    file.seek(0)
    encoding = _wide_encoding(head)
    if encoding or _LONE_RETURN.search(head[:-1]):
        text = io.TextIOWrapper(file, encoding or "latin-1", newline=None)
        file = tempfile.TemporaryFile()  # noqa: SIM115
        with naming(scratch()):
            for piece in iter(lambda: text.read(1 << 20), ""):
                file.write(piece.removeprefix("\ufeff").encode("utf-8" if encoding else "latin-1"))
            file.seek(0)
    return file


def _compressed(file: IO[bytes], codec: str) -> OneWay:
    """Return a file of what pyarrow decompresses (zstd, lz4)."""
    import pyarrow as pa

    return OneWay(pa.CompressedInputStream(pa.PythonFile(file), codec).read, file.close)


def _unpacked(packed: IO[bytes] | Any) -> IO[bytes]:
    out = tempfile.TemporaryFile()  # noqa: SIM115
    with packed, naming(scratch()):
        shutil.copyfileobj(packed, out, 1 << 20)
        out.seek(0)
    return out


def _only_member(file: IO[bytes], path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
    if any(name.startswith("xl/") for name in names):
        raise no_table(path, "it is an Excel file: save it as .csv")
    if len(names) != 1:
        words = "give the table, or for pictures the folder with prepare.kind=folder"
        raise no_table(path, f"the archive holds {len(names)} files: unpack it and {words}")
    try:
        return archive.open(names[0])
    except RuntimeError as error:  # it needs a password, or was packed by a method that Python lacks
        raise no_table(path, f"{error}; unpack the archive and give the table") from error


def _wide_encoding(head: bytes) -> str | None:
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if 5 * max(even, odd) > len(head):
        return "utf-16-le" if odd > even else "utf-16-be"
    return None
