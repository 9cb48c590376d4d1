"""Readable results of an evaluation: tables in Markdown, and a sheet of samples with wrong ones marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.content.synthetic import ShapeSpec
from training.evaluation.measure import LOWER_IS_BETTER
from training.evaluation.metrics.figure import Figure
from training.evaluation.oracle import Reading
from training.pictures.sheets import Cell, sheet

FIELDS = ("background", "colour", "size", "shape", "relation", "all")
SHEET_CELLS = 48
Scores = Sequence[dict[str, bool]]
METRICS = {
    "frechet": "Frechet distance",
    "kid": "KID",
    "cmmd": "CMMD",
    "dino_mmd": "MMD as in CMMD",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "clip_score": "CLIP score (cosine)",
    "vqa_score": "VQAScore",
    "soft_tifa_am": "Soft-TIFA (arithmetic mean)",
    "soft_tifa_gm": "Soft-TIFA (geometric mean)",
    "soft_tifa_skill": "Soft-TIFA by skill",
    "soft_tifa_atoms": "Soft-TIFA by number of atoms",
    "copies": "share of copies of training pictures",
    "diversity": "diversity within a prompt",
}
"""Figures on features and on answers: key in result.json -> display name."""
UNITS = {
    "frechet": "squared distance of features",
    "kid": "squared discrepancy",
    "cmmd": "1,000 times a squared discrepancy",
    "dino_mmd": "1,000 times a squared discrepancy",
    "density": "times that of the reference",
    "clip_score": "cosine",
    "vqa_score": "probability",
    "soft_tifa_am": "probability",
    "soft_tifa_gm": "probability",
    "soft_tifa_skill": "probability",
    "soft_tifa_atoms": "probability",
    "diversity": "distance of features",
    "psnr": "dB",
}
"""Units of figures; those of all others are shares."""


def is_higher_better(name: str) -> bool:
    """Return whether a figure, by its key or dotted name in result.json, is better when it is higher."""
    return name.split(".")[0] not in LOWER_IS_BETTER


def told_of(name: str) -> str:
    """Return a figure's unit and direction, by its key or dotted name in result.json: `cosine, higher is better`."""
    better = "higher" if is_higher_better(name) else "lower"
    return f"{UNITS.get(name.split('.')[0], 'share')}, {better} is better"


def shares(scores: Scores) -> dict[str, Figure]:
    """Return the fraction of pictures in which each part of the caption is right."""
    fields = [field for field in FIELDS if scores and field in scores[0]]
    return {field: Figure.mean(np.array([score[field] for score in scores]), is_share=True) for field in fields}


def shares_by_word(
    scores: Scores, specs: Sequence[ShapeSpec], prompts: np.ndarray
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return by field and word the fraction of pictures in which the field is right, among those whose caption has the
    word, as entries of result.json.

    Args:
        prompts: int (N,): the prompt of each picture, by number.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for row, spec in enumerate(specs):
        words = {("background", spec.background)}
        words |= {(field, getattr(thing, field)) for thing in spec.objects for field in ("colour", "size", "shape")}
        words |= {("relation", spec.relation)} if spec.relation else set()
        for field, word in words:
            found.setdefault(field, {}).setdefault(word, []).append(row)

    def entry(field: str, rows: list[int]) -> dict[str, Any]:
        right = np.array([scores[row][field] for row in rows])
        return Figure.mean(right, is_share=True).as_dict(prompts[rows])

    return {
        field: {word: entry(field, rows) for word, rows in sorted(found[field].items())}
        for field in FIELDS
        if field in found
    }


def sheet_of_shapes(
    images: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    readings: Sequence[Reading],
    scores: Scores,
    references: Mapping[int, Image.Image] | None = None,
) -> Image.Image:
    """Draw samples with all stages side by side, and their true picture if `references` (by sample) has it. Wrong
    samples are framed, with what the oracle saw and which words failed. If not all samples fit, wrong ones come
    first."""
    wrong = [i for i, score in enumerate(scores) if not score["all"]]
    cells = []
    for i in places_on_sheet(scores):
        failed = [field for field in FIELDS[:-1] if not scores[i].get(field, True)]
        note = f"seen: {readings[i]}; wrong: {', '.join(failed)}" if failed else "right"
        labels = [f"{picture.width} px" for picture in images[i]]
        cells.append(_beside(images[i], labels, captions[i], references, i, note=note, wrong=bool(failed)))
    title = f"{len(scores) - len(wrong)} of {len(scores)} samples right; "
    missing = len(wrong) - sum(cell.wrong for cell in cells)
    title += f"the first {SHEET_CELLS} of {len(wrong)} wrong ones" if missing else "wrong ones are framed"
    return sheet(cells, columns=4, title=title)


def places_on_sheet(scores: Scores) -> list[int]:
    """Return the indices of the samples that `sheet_of_shapes` shows."""
    return sorted(sorted(range(len(scores)), key=lambda i: scores[i]["all"])[:SHEET_CELLS])


def sheet_of_pictures(
    images: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    references: Mapping[int, Image.Image] | None = None,
) -> Image.Image:
    """Draw the first samples with their captions, next to their true pictures if `references` (by sample) has them."""
    shown = range(min(SHEET_CELLS, len(captions)))
    cells = [_beside(images[i][-1:], ["sample"], captions[i], references, i) for i in shown]
    return sheet(cells, columns=3 if references else 6)


def _beside(
    pictures: Sequence[Image.Image],
    labels: Sequence[str],
    caption: str,
    references: Mapping[int, Image.Image] | None,
    place: int,
    **more: Any,
) -> Cell:
    """Return a cell with the reference picture of sample `place`, if any, on the right."""
    if place not in (references or {}):
        return Cell(list(pictures), caption, list(labels) if len(pictures) > 1 else [], **more)
    return Cell([*pictures, (references or {})[place]], caption, [*labels, "reference"], **more)


def markdown(result: dict[str, Any]) -> str:
    """Return the report in Markdown: figures and protocol."""
    protocol, n = result["protocol"], result["n"]
    lines = ["# Evaluation", "", f"Bundle `{protocol['bundle']}`, seed {protocol['seed']}, {n['samples']} samples.", ""]
    lines += [f"* {remark}" for remark in result["remarks"]] + [""] * bool(result["remarks"])
    if "samples" in result:
        lines += _shape_table(result)
    if result.get("psnr"):
        lines += _psnr_table(result["psnr"])
    lines += _feature_table(result)
    lines += ["## Protocol", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in protocol_rows(protocol)]
    return "\n".join(lines) + "\n"


def summary(result: dict[str, Any]) -> str:
    """Return a short report for the terminal."""
    lines = []
    if "samples" in result:
        for row, title in (("samples", "samples right"), ("real", "held-out drawings read right")):
            parts = ", ".join(f"{field} {entry['value']:.1%}" for field, entry in result[row].items())
            lines.append(f"{title}: {parts}")
    for name, stage in result.get("psnr", {}).get("stages", {}).items():
        sr, bicubic = stage["sr"]["value"], stage["bicubic"]["value"]
        lines.append(f"PSNR of {name} on true low-res input: {sr:.2f} dB, bicubic {bicubic:.2f} dB")
    for metric, title in METRICS.items():
        for name, entry in result.get(metric, {}).items():
            floor = entry.get("floor")
            more = "" if floor is None else f" (real drawings of the same captions: {floor:.4g})"
            lines.append(f"{title} on {name}: {with_interval(entry)}{more}")
    shown = [metric for metric in METRICS if result.get(metric)]
    if lower := [METRICS[metric] for metric in shown if metric in LOWER_IS_BETTER]:
        others = "; higher is better for the others" if len(lower) < len(shown) else ""
        lines.append(f"lower is better for {', '.join(lower)}{others}")
    lines += [f"note: {remark}" for remark in result["remarks"]]
    return "\n".join(lines)


def with_interval(entry: dict[str, Any]) -> str:
    """Format a figure with its interval: 0.01234 [0.01, 0.015]."""
    low, high = entry["interval"]
    return f"{entry['value']:.4g} [{low:.3g}, {high:.3g}]"


def protocol_rows(protocol: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the protocol as rows of two columns."""
    rows = [(key, _in_words(value)) for key, value in protocol.items() if key not in ("stages", "extractors")]
    for name, facts in protocol["extractors"].items():
        rows.append((f"features {name}", ", ".join(f"{key} {value}" for key, value in facts.items() if value)))
    for stage in protocol["stages"]:
        sampler = ", ".join(f"{key} {value}" for key, value in stage["sampler"].items())
        rows.append((f"stage {stage['name']}", f"step {stage['step']}, sha256 {stage['sha256'][:12]}, {sampler}"))
    return rows


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(one)}" for name, one in value.items())
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _shape_table(result: dict[str, Any]) -> list[str]:
    rows = {"samples": "samples", "base": "their base pictures, enlarged by bicubic", "real": "real held-out drawings"}
    fields = list(result["samples"])
    lines = [
        "## Share right, as read by the oracle (higher is better)",
        "",
        f"| | {' | '.join(fields)} |",
        "|---" * (len(fields) + 1) + "|",
    ]
    for key, title in rows.items():
        if key in result:
            lines.append(f"| {title} | " + " | ".join(_share(result[key][field]) for field in fields) + " |")
    lines += ["", "![samples](samples.png)", "", "By word:", ""]
    for field, words in result["by_word"].items():
        shown = ", ".join(f"{word} {entry['value']:.0%} of {entry['n']}" for word, entry in words.items())
        lines.append(f"* {field}: {shown}")
    return [*lines, ""]


def _share(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{entry['value']:.1%} [{low:.1%}, {high:.1%}]"


def _psnr_table(psnr: dict[str, Any]) -> list[str]:
    lines = [
        f"## PSNR on true low-res input ({psnr['n']} held-out pictures, dB, higher is better)",
        "",
        "| stage | restored | restored, low-res noised as in sampling | bicubic |",
        "|---|---|---|---|",
    ]
    for name, stage in psnr["stages"].items():
        lines.append(f"| {name} | " + " | ".join(_decibel(stage[key]) for key in ("sr", "sr_noised", "bicubic")) + " |")
    return [*lines, ""]


def _decibel(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{entry['value']:.2f} [{low:.2f}, {high:.2f}]"


def _feature_table(result: dict[str, Any]) -> list[str]:
    count = result["n"]
    lines = [
        f"## On features ({count['samples']} samples, {count['reference']} reference pictures)",
        "",
        "| figure | features, or stage | width | value and 95 % interval | detectable | real drawings instead |",
        "|---|---|---|---|---|---|",
    ]
    widths = {name: facts["width"] for name, facts in result["protocol"]["extractors"].items()}
    for metric, title in METRICS.items():
        for name, entry in result.get(metric, {}).items():
            floor = entry.get("floor")
            shown = f"{title} ({told_of(metric)})"
            lines.append(
                f"| {shown} | {name} | {widths.get(name, '-')} | {with_interval(entry)} | {entry['detectable']:.3g} | "
                f"{'-' if floor is None else f'{floor:.4g}'} |"
            )
    return [*lines, ""]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")
