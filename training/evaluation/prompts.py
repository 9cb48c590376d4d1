"""Prompt lists: a text file with a prompt per line, a table with a column `Prompt` (PartiPrompts), or a plain list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipeline import store
from data_pipeline.errors import ConfigError, DataError

TABLES = (".tsv", ".csv")
FILES = (".txt", *TABLES)


def read_prompts(given: Any, key: str = "prompts", keep_blank: bool = False) -> list[str]:
    """The prompts that a config value means, stripped, in order, repetitions kept, blank ones left out or kept.

    A string that ends in .txt, .tsv or .csv is a file (or s3:// URL); any other string is one prompt.

    Raises:
        ConfigError: neither text nor a list of it; `key` is named.
        DataError: the file is missing, is not UTF-8, or a table without a `Prompt` column.
    """
    if given is None:
        return []
    if isinstance(given, str):
        found = _from_file(given, key) if given.lower().endswith(FILES) else [given]
    elif isinstance(given, Sequence) and all(isinstance(item, (str, int, float)) for item in given):
        found = [str(item) for item in given]
    else:
        raise ConfigError(f"{key}={given}: give a text file with one prompt per line, or a list of prompts")
    return [prompt.strip() for prompt in found if keep_blank or prompt.strip()]


def _from_file(path: str, key: str) -> list[str]:
    if not store.exists(path):
        raise DataError(f"{key}={path}: no such file; it should hold one prompt per line")
    try:
        lines = store.read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{key}={path}: not UTF-8 text ({error})") from error
    if not path.lower().endswith(TABLES):
        return lines
    return _column(lines, path, key)


def _column(lines: list[str], path: str, key: str) -> list[str]:
    import csv

    tabs = path.lower().endswith(".tsv")
    # quotation marks in a .tsv belong to the prompt
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
    header = [name.strip().lower() for name in next(rows, [])]
    if "prompt" not in header:
        raise DataError(f"{key}={path}: the table has no column `Prompt` (columns: {', '.join(header) or 'none'})")
    place = header.index("prompt")
    return [row[place] for row in rows if len(row) > place]
