"""Prompt lists: a text file with one prompt per line, a .jsonl file, a table with a column `Prompt` (PartiPrompts), or
a plain list."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from data_pipeline.common.errors import CascadeError, ConfigError, DataError
from data_pipeline.storage import store

TABLES = (".tsv", ".csv")
LINES = ".jsonl"
PROMPT_COLUMNS = ("prompt", "prompt_en", "prompt_cn", "prompt_zh")
"""Column names, in lower case: of PartiPrompts and most other lists, and of OneIG-Bench in English and Chinese."""
FILES = (".txt", *TABLES, LINES)
STDIN = "-"
"""The value that stands for standard input, one prompt per line."""
LONGEST = 10_000
"""Maximum characters of a prompt. Text encoders read a few hundred tokens at most; anything longer is a file without
line breaks, or the wrong column."""


def read_prompts(given: Any, key: str = "prompts", keep_blank: bool = False) -> list[str]:
    """Return the prompts that a config value stands for: stripped, in order, with repetitions.

    A string that ends in .txt, .tsv, .csv or .jsonl is a file (or s3:// URL), and `-` is standard input, with one
    prompt per line; any other string is one prompt.

    Args:
        key: the setting to name in an error.
        keep_blank: keep blank prompts instead of skipping them.

    Raises:
        ConfigError: a value that is neither text nor a list of it, a directory, or a file with another extension.
        DataError: the file is missing or not UTF-8, standard input is empty, a table has no column `Prompt`, a line
            has no `prompt`, or a prompt has more than `LONGEST` characters or contains NUL.
    """
    if given is None:
        return []
    if isinstance(given, str):
        if os.path.isdir(given):
            raise ConfigError(
                f"{key}={given}: this is a directory; give a file of prompts, or write {key}=['{given}'] to use the "
                f"name as a prompt"
            )
        if os.path.isfile(given) and not given.lower().endswith(FILES):
            raise ConfigError(f"{key}={given}: a file of prompts must end in {', '.join(FILES)}; {_instead(given)}")
        found = _from_file(given, key) if _is_file(given) else [given]
        if re.fullmatch(r"\[[^\[\]]+,[^\[\]]+\]", given):
            print(f'{key}={given}: this is one prompt; the texts of a list need quotation marks: \'{key}=["a","b"]\'')
        if not _is_file(given) and re.fullmatch(r"\S+\.[a-z]{3,5}", given):
            print(f"{key}={given}: this is one prompt; a file of prompts must end in {', '.join(FILES)}")
    elif isinstance(given, Sequence) and all(isinstance(item, (str, int, float)) for item in given):
        found = [str(item) for item in given]
        blank = 0 if keep_blank else sum(not item.strip() for item in found)
        if blank:
            print(
                f"{key}: {blank} of {len(found)} are blank and skipped; in Python, an empty prompt draws without text"
            )
    else:
        raise ConfigError(f"{key}={given}: give a text file with one prompt per line, or a list of prompts")
    if not (isinstance(given, str) and _is_file(given)):
        for number, prompt in enumerate(found, 1):
            _check(prompt, f"{key}: prompt {number}", ConfigError)
    return [prompt.strip() for prompt in found if keep_blank or prompt.strip()]


def _is_file(given: str) -> bool:
    return given == STDIN or given.lower().endswith(FILES)


def _instead(path: str) -> str:
    """Return what to do with a file of another extension."""
    if path.lower().endswith(".json"):
        return "write it as .jsonl"
    with open(path, "rb") as file:
        return "write its prompts to a .csv or .jsonl file" if b"\0" in file.read(4096) else "rename it"


def read_categories(given: Any, key: str = "prompts") -> list[str]:
    """Return the category of each prompt: column `Category` of a table, or field `category` or `tag` of a .jsonl file;
    an empty list if there are none. Raises `DataError` like `read_prompts`."""
    found = [str(line.get("category", line.get("tag", ""))).strip() for line in read_lines(given, key)]
    return found if any(found) else []


def _check(prompt: str, where: str, error: type[CascadeError] = DataError) -> str:
    """Return the prompt. Raises `error`, naming `where`, if it is too long or contains NUL."""
    if len(prompt.strip()) > LONGEST:
        raise error(
            f"{where} has {len(prompt.strip()):,} characters; a prompt may have up to {LONGEST:,} (text encoders read "
            "a few hundred tokens): put each prompt on its own line"
        )
    if "\0" in prompt:
        raise error(f"{where} contains a NUL character, so this is not a list of prompts; save it as UTF-8 text")
    return prompt


def _from_stdin(key: str) -> bytes:
    if sys.stdin is not None and sys.stdin.isatty():
        print(f"{key}={STDIN}: type one prompt per line, then Ctrl-D", file=sys.stderr)
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    if not data.strip():
        raise DataError(f"{key}={STDIN}: standard input is empty; it should contain one prompt per line")
    return data


def _text(path: str, key: str) -> str:
    if path != STDIN and not store.exists(path):
        raise DataError(f"{key}={path}: no such file; it should contain one prompt per line")
    data = _from_stdin(key) if path == STDIN else store.read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(re.split(rb"\r\n|\r|\n", data[: error.start]))
        raise DataError(
            f"{key}={path}: line {line} is not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from error


def _from_file(path: str, key: str) -> list[str]:
    text = _text(path, key)
    if path.lower().endswith(LINES):
        return [line["prompt"] for line in _objects(text, path, key)]
    if not path.lower().endswith(TABLES):
        lines = re.split(r"\r\n|\r|\n", text)
        if not lines[-1]:  # the end of the last line, which is not one more
            lines.pop()
        return [_check(line, f"{key}={path}: line {number}") for number, line in enumerate(lines, 1)]
    return [row["prompt"] for row in _rows(text, path, key)]


def read_lines(given: Any, key: str = "prompts") -> list[dict[str, Any]]:
    """Return the fields of each prompt: those of a .jsonl file, or the columns of a table by their names in lower case;
    an empty list for any other value. Raises `DataError` like `read_prompts`."""
    if not isinstance(given, str) or not given.lower().endswith((*TABLES, LINES)):
        return []
    text = _text(given, key)
    found = _objects(text, given, key) if given.lower().endswith(LINES) else _rows(text, given, key)
    return [line for line in found if line["prompt"].strip()]


def _objects(text: str, path: str, key: str) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{key}={path}: line {number} is not JSON ({error})") from error
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise DataError(f"{key}={path}: line {number} has no text in a field `prompt`")
        _check(value["prompt"], f"{key}={path}: line {number}")
        found.append(value)
    return found


def _rows(text: str, path: str, key: str) -> list[dict[str, Any]]:
    """Return the rows of a table by column names in lower case, with the prompt as `prompt`."""
    import csv

    lines = io.StringIO(text, newline="")
    tabs = path.lower().endswith(".tsv")
    # quotation marks in a .tsv are part of the prompt
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
    try:
        header = [title.strip().lower() for title in next(rows, [])]
        numbered = [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        raise DataError(f"{key}={path}: line {rows.line_num} cannot be read as a table ({error})") from error
    place = next((header.index(name) for name in PROMPT_COLUMNS if name in header), None)
    if place is None:
        columns = ", ".join(header)[:200] or "none"
        raise DataError(f"{key}={path}: the table has no column `Prompt` (columns: {columns})")
    found = []
    for line, row in numbered:
        where = f"{key}={path}: line {line}"
        if len(row) > place:
            found.append(dict(zip(header, row, strict=False)) | {"prompt": _check(row[place], where)})
        elif any(cell.strip() for cell in row):
            raise DataError(f"{where} has {len(row)} of {len(header)} columns and no prompt")
    return found
