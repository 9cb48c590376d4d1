"""`cascade sample layout=NAME`: also writes the pictures to OUTPUT/NAME, in the layout that another tool expects.

    flat            00000-0.png ...: only the samples, for tools that read a folder of pictures
    geneval         00000/metadata.jsonl and 00000/samples/0000.png (GenEval reads 4 pictures per prompt)
    geneval2        image_paths.json, which maps each prompt to its picture
    dpg             ITEM_ID.png, the four pictures of a prompt in a 2 x 2 grid
    t2i_compbench   samples/PROMPT_000000.png
    parti           CATEGORY/00000-0.png, and index.csv with prompt, category and challenge of each file, for raters
    oneig           CLASS/cascade/ID.webp, the four pictures of a prompt in a 2 x 2 grid (image_grid=2)

GenEval, DPG-Bench, PartiPrompts and OneIG-Bench need their own lists: prompts=FILE.jsonl, PartiPrompts.tsv,
OneIG-Bench.csv.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.common.errors import ConfigError
from data_pipeline.config import one_of
from training.cascade.requests import stored

LAYOUTS = ("flat", "geneval", "geneval2", "dpg", "t2i_compbench", "parti", "oneig")
PICTURES = {"geneval": 4, "geneval2": 1, "dpg": 4, "oneig": 4}
"""Number of pictures per prompt that a tool reads; other tools read any number."""
NEEDED = {"geneval": "tag", "dpg": "item_id", "parti": "category", "oneig": "id"}
"""Field of the prompt list that a layout requires."""
NAMED_BY = {"dpg": "item_id", "oneig": "id"}
"""Field of the prompt list that names the file, in layouts with one file per prompt."""
KEPT_IN = {
    "geneval": "prompts=FILE.jsonl",
    "dpg": "prompts=FILE.jsonl",
    "parti": "prompts=FILE.tsv",
    "oneig": "prompts=FILE.csv",
}
"""How to give that list."""
CLASSES = {
    "anime": "anime",
    "portrait": "human",
    "general": "object",
    "text": "text",
    "knowledge": "reasoning",
    "multilingualism": "multilingualism",
}
"""First word of a OneIG-Bench category -> its folder."""
MODEL = "cascade"
"""Name of the model in OneIG-Bench's comparison."""
LONGEST_NAME = 255
"""Maximum length of a file name in bytes."""


def check_layout(layout: str, prompts: Sequence[str], num_images: int, lines: Sequence[dict[str, Any]]) -> None:
    """Refuse what a tool could not read, before anything is drawn.

    Args:
        lines: the fields of each prompt in its file (`read_lines`); empty if the file has none.

    Raises:
        ConfigError: an unknown layout, the wrong number of pictures, or lines that lack a field or cannot name a file.
    """
    one_of("layout", layout, LAYOUTS)
    wanted = PICTURES.get(layout)
    if wanted and num_images != wanted:
        raise ConfigError(f"layout={layout}: it reads {wanted} pictures per prompt; set num_images={wanted}")
    needed = NEEDED.get(layout)
    if needed and not all(needed in line for line in lines or [{}]):
        raise ConfigError(
            f"layout={layout}: it needs its own list, {KEPT_IN[layout]}, with a field {needed} for each prompt"
        )
    unknown = [str(line.get("category")) for line in lines if not _class(line)] if layout == "oneig" else []
    if unknown:
        raise ConfigError(
            f"layout=oneig: {unknown[0]!r} is not one of its categories; give OneIG-Bench.csv or OneIG-Bench-ZH.csv"
        )
    if layout in NAMED_BY:
        _check_names(layout, lines)
    if layout == "geneval2" and len(set(prompts)) < len(prompts):
        raise ConfigError("layout=geneval2: it allows one picture per prompt, but some prompts are repeated")
    if layout == "t2i_compbench":
        for prompt in prompts:
            if len(_compbench_name(prompt, 0).encode()) > LONGEST_NAME:
                raise ConfigError(
                    f"layout={layout}: files are named after the prompt, and this one is too long: {prompt[:60]!r}"
                )


def arrange(
    layout: str,
    output: Path,
    pictures: Sequence[Sequence[Path]],
    prompts: Sequence[str],
    lines: Sequence[dict[str, Any]],
) -> Path:
    """Replace OUTPUT/LAYOUT by the pictures in this layout; return that folder.

    Args:
        pictures: for each prompt, the files of its pictures.
        lines: as for `check_layout`.
    """
    folder = output / layout
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths: dict[str, str] = {}
    for place, (prompt, files) in enumerate(zip(prompts, pictures, strict=True)):
        if layout in NAMED_BY:
            target = folder / _named(layout, lines[place])
            target.parent.mkdir(parents=True, exist_ok=True)
            _square(files).save(target, lossless=True)  # which only .webp has to be told
            continue
        if layout == "geneval":
            own = folder / f"{place:05d}"
            own.mkdir()
            (own / "metadata.jsonl").write_text(json.dumps(lines[place], ensure_ascii=False) + "\n", encoding="utf-8")
        for copy, file in enumerate(files):
            _link(file, target := folder / _file(layout, place, copy, len(files), prompt, lines))
            paths[prompt] = str(target.absolute())
    if layout == "parti":
        (folder / "index.csv").write_text(_index(pictures, lines), encoding="utf-8")
    if layout == "geneval2":
        (folder / "image_paths.json").write_text(json.dumps(paths, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def _named(layout: str, line: dict[str, Any]) -> str:
    """Return the file of a prompt, in a layout that names it by a field of its line."""
    name = str(line[NAMED_BY[layout]])
    return f"{name}.png" if layout == "dpg" else f"{_class(line)}/{MODEL}/{name}.webp"


def _check_names(layout: str, lines: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigError if a field is not a plain file name, or two prompts have the same file."""
    field, seen = NAMED_BY[layout], set()
    for line in lines:
        name, file = str(line[field]), _named(layout, line)
        if not name or set(name) & set("/\\\0"):
            raise ConfigError(f"layout={layout}: {field} {name!r} cannot name a file; give one without slashes")
        if file in seen:
            raise ConfigError(f"layout={layout}: two prompts have the {field} {name!r}; each needs a file of its own")
        seen.add(file)


def _file(layout: str, place: int, copy: int, copies: int, prompt: str, lines: Sequence[dict[str, Any]]) -> str:
    """Return the file name of one picture, in a layout with one file per picture."""
    if layout == "geneval":
        return f"{place:05d}/samples/{copy:04d}.png"
    if layout == "parti":
        return f"{_plain(lines[place]['category'])}/{place:05d}-{copy}.png"
    if layout == "t2i_compbench":
        return f"samples/{_compbench_name(prompt, place * copies + copy)}"
    return f"{place:05d}.png" if layout == "geneval2" else f"{place:05d}-{copy}.png"


def _class(line: dict[str, Any]) -> str:
    """Return OneIG-Bench's folder for a prompt's category; empty if it is not one of its categories."""
    return CLASSES.get(re.split(r"[^A-Za-z]", str(line.get("category", "")).strip())[0].lower(), "")


def _plain(text: Any) -> str:
    return re.sub(r"\W+", "_", str(text)).strip("_") or "none"


def _index(pictures: Sequence[Sequence[Path]], lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "prompt", "category", "challenge"])
    for place, (files, line) in enumerate(zip(pictures, lines, strict=True)):
        for copy in range(len(files)):
            file = _file("parti", place, copy, len(files), "", lines)
            table.writerow([file, *(line.get(name, "") for name in ("prompt", "category", "challenge"))])
    return text.getvalue()


def _compbench_name(prompt: str, number: int) -> str:
    return f"{prompt.replace('/', ' ')}_{number:06d}.png"


def _link(file: Path, target: Path) -> None:
    """Hard-link the file under another name; copy it if the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _square(files: Sequence[Path]) -> Image.Image:
    """Return a 2 x 2 grid of four pictures, row by row."""
    pictures = []
    for file in files:
        with stored(file) as image:
            pictures.append(image.convert("RGB"))
    width, height = pictures[0].size
    paper = Image.new("RGB", (2 * width, 2 * height))
    for place, picture in enumerate(pictures):
        paper.paste(picture, (place % 2 * width, place // 2 * height))
    return paper
