"""Opens a table in any format: Parquet, Arrow, delimited text, JSON, JSON lines; compressed or not.

The format is detected from the content. Rows are read by number, from several threads, with little memory: Parquet
keeps a few batches, text the offsets of its rows. JSON that is a single value (COCO's captions, an array) is loaded as
a whole.
"""

from __future__ import annotations

import logging
import lzma
import re
import zipfile
import zlib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import IO

from data_pipeline.common.errors import DataError, system_words
from data_pipeline.storage.atomic import scratch
from data_pipeline.storage.retry import persist
from data_pipeline.tables.arrow import ParquetRows, arrow_rows
from data_pipeline.tables.base import Rows, no_table
from data_pipeline.tables.delimited import DelimitedRows
from data_pipeline.tables.json_rows import json_rows
from data_pipeline.tables.unpacking import HEAD, open_plain, refuse_others

logger = logging.getLogger(__name__)

_MARKUP = (".yaml", ".yml", ".toml", ".ini")


def open_table(path: Path, known: Collection[str] = (), encoding: str | None = None) -> Rows:
    """Open a table.

    Args:
        path: the file.
        known: names of columns, normalized by `plain_name`, by which a header and its separator are recognized.
        encoding: of text that is not UTF-8; None: Windows-1252.

    Raises:
        DataError: it is not a readable table, or there is no room in TMPDIR to unpack it.
        StoreError: its file system kept failing.
    """
    import pyarrow as pa

    try:
        return persist(str(path), partial(_rows, path, known, encoding))
    except (
        pa.ArrowException,
        OSError,
        EOFError,
        lzma.LZMAError,
        zipfile.BadZipFile,
        zlib.error,
        UnicodeError,
    ) as error:
        again = "" if isinstance(error, OSError) and error.errno else "; download or export it again"
        raise no_table(path, f"{str(error) or type(error).__name__}{again}") from error


def _rows(path: Path, known: Collection[str], encoding: str | None) -> Rows:
    with open(path, "rb") as file:
        head = file.read(8)
    if head[:4] == b"PAR1":
        return ParquetRows(path)
    if head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return arrow_rows(path, head)
    try:
        return _text_rows(open_plain(path), path, known, encoding)
    except OSError as error:
        if error.filename == scratch():
            raise DataError(f"{scratch()}: {system_words(error)}; {path} is unpacked there") from error
        raise


def _text_rows(file: IO[bytes], path: Path, known: Collection[str], encoding: str | None) -> Rows:
    head = file.read(HEAD).removeprefix(b"\xef\xbb\xbf")
    file.seek(0)
    start = head.lstrip()[:1]
    if not start:
        raise no_table(path, "it is empty")
    if path.suffix.lower() in _MARKUP:
        raise no_table(path, f"it is a {path.suffix} file: save it as .json or .csv")
    if start in (b"{", b"["):
        return json_rows(file, path, known)
    refuse_others(head, path)
    if path.suffix.lower() == ".parquet" or 8 * head.count(0) > len(head):
        raise no_table(path, "neither Parquet nor text")
    if re.match(rb"(?:\s*(?:#|//).*\n)+\s*[{\[]", head):
        raise no_table(path, "lines that begin with # or // stand above the JSON: remove them")
    rows = DelimitedRows(file, known, encoding)
    if rows.has_preamble:
        logger.warning("%s: the table begins at line %d; the lines above it are skipped", path, rows.first_line)
    return rows
