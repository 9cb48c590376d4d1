"""`cascade sample layout=NAME`: the drawn pictures once more, as other tools expect to find them, in OUTPUT/NAME.

    flat            00000-0.png ...: nothing but the samples, for tools that read a folder of pictures
    geneval         00000/metadata.jsonl and 00000/samples/0000.png (GenEval reads 4 pictures of each prompt)
    geneval2        image_paths.json, which maps each prompt to its picture
    dpg             ITEM_ID.png, the four pictures of a prompt in a square of two by two
    t2i_compbench   samples/PROMPT_000000.png

GenEval and DPG-Bench want the lines of their own lists: give these as prompts=FILE.jsonl.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.common.errors import ConfigError

LAYOUTS = ("flat", "geneval", "geneval2", "dpg", "t2i_compbench")
PICTURES = {"geneval": 4, "geneval2": 1, "dpg": 4, "t2i_compbench": 0, "flat": 0}
"""Of each prompt, as the tool reads them; 0: any number."""
LONGEST_NAME = 255
"""Bytes of a file's name."""


def check_layout(layout: str, prompts: Sequence[str], num_images: int, lines: Sequence[dict[str, Any]]) -> None:
    """Refuses what a tool could not read, before anything is drawn.

    Args:
        lines: what the prompts' own file says of each; empty where it says nothing.

    Raises:
        ConfigError: another layout or number of pictures, or lines that miss a field.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout}: it must be {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}")
    wanted = PICTURES[layout]
    if wanted and num_images != wanted:
        raise ConfigError(f"layout={layout}: it reads {wanted} pictures of each prompt; say num_images={wanted}")
    needed = {"geneval": "tag", "dpg": "item_id"}.get(layout)
    if needed and not all(needed in line for line in lines or [{}]):
        raise ConfigError(
            f"layout={layout}: give its own list, prompts=FILE.jsonl, whose lines have the field {needed}"
        )
    if layout == "geneval2" and len(set(prompts)) < len(prompts):
        raise ConfigError("layout=geneval2: it has one picture of each prompt, and some prompts are repeated")
    if layout == "t2i_compbench":
        for prompt in prompts:
            if len(_compbench_name(prompt, 0).encode()) > LONGEST_NAME:
                raise ConfigError(
                    f"layout={layout}: files are named by the prompt, and this is too long: {prompt[:60]!r}"
                )


def arrange(
    layout: str,
    output: Path,
    pictures: Sequence[Sequence[Path]],
    prompts: Sequence[str],
    lines: Sequence[dict[str, Any]],
) -> Path:
    """Makes OUTPUT/LAYOUT anew; returns it.

    Args:
        pictures: per prompt the files of its pictures.
    """
    folder = output / layout
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths: dict[str, str] = {}
    for place, (prompt, files) in enumerate(zip(prompts, pictures, strict=True)):
        if layout == "dpg":
            _square(files).save(folder / f"{lines[place]['item_id']}.png")
            continue
        if layout == "geneval":
            own = folder / f"{place:05d}"
            own.mkdir()
            (own / "metadata.jsonl").write_text(json.dumps(lines[place], ensure_ascii=False) + "\n", encoding="utf-8")
        for copy, file in enumerate(files):
            target = {
                "flat": folder / f"{place:05d}-{copy}.png",
                "geneval": folder / f"{place:05d}" / "samples" / f"{copy:04d}.png",
                "geneval2": folder / f"{place:05d}.png",
                "t2i_compbench": folder / "samples" / _compbench_name(prompt, place * len(files) + copy),
            }[layout]
            _link(file, target)
            paths[prompt] = str(target.absolute())
    if layout == "geneval2":
        (folder / "image_paths.json").write_text(json.dumps(paths, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def _compbench_name(prompt: str, number: int) -> str:
    return f"{prompt.replace('/', ' ')}_{number:06d}.png"


def _link(file: Path, target: Path) -> None:
    """The same bytes under another name; a copy where the disk has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _square(files: Sequence[Path]) -> Image.Image:
    """Four pictures, row by row."""
    pictures = []
    for file in files:
        with Image.open(file) as image:
            pictures.append(image.convert("RGB"))
    side = pictures[0].width
    paper = Image.new("RGB", (2 * side, 2 * side))
    for place, picture in enumerate(pictures):
        paper.paste(picture, (place % 2 * side, place // 2 * side))
    return paper
