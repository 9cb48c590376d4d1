"""What an evaluation leaves for people: tables in Markdown, and a sheet of the samples with the wrong ones marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from data_pipeline.content.synthetic import ShapeSpec
from training.evaluation.oracle import Reading
from training.pictures.sheets import Cell, sheet

FIELDS = ("background", "colour", "size", "shape", "relation", "all")
SHEET_CELLS = 48
Scores = Sequence[dict[str, bool]]


def shares(scores: Scores) -> dict[str, float]:
    """Share of pictures in which each part of the caption is right, 0 to 1."""
    return {field: sum(s[field] for s in scores) / len(scores) for field in FIELDS if scores and field in scores[0]}


def shares_by_word(scores: Scores, specs: Sequence[ShapeSpec]) -> dict[str, dict[str, float]]:
    """Field -> word -> share of the pictures whose caption has the word in which that field is right."""
    found: dict[str, dict[str, list[bool]]] = {}
    for score, spec in zip(scores, specs, strict=True):
        words = {("background", spec.background)}
        words |= {(field, getattr(thing, field)) for thing in spec.objects for field in ("colour", "size", "shape")}
        words |= {("relation", spec.relation)} if spec.relation else set()
        for field, word in words:
            found.setdefault(field, {}).setdefault(word, []).append(score[field])
    return {
        field: {word: sum(right) / len(right) for word, right in sorted(found[field].items())}
        for field in FIELDS
        if field in found
    }


def sheet_of_shapes(
    images: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    readings: Sequence[Reading],
    scores: Scores,
) -> Image.Image:
    """The first samples, all stages side by side; wrong ones framed, with what was seen and which words failed."""
    cells = []
    for pictures, caption, reading, score in list(zip(images, captions, readings, scores, strict=True))[:SHEET_CELLS]:
        failed = [field for field in FIELDS[:-1] if not score.get(field, True)]
        note = f"seen: {reading}; wrong: {', '.join(failed)}" if failed else "right"
        labels = [f"{picture.width} px" for picture in pictures]
        cells.append(Cell(list(pictures), caption, labels, note, wrong=bool(failed)))
    right = sum(score["all"] for score in scores)
    return sheet(cells, columns=4, title=f"{right} of {len(scores)} samples right; wrong ones are framed")


def sheet_of_pictures(images: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """The first samples with their captions."""
    pairs = list(zip(images, captions, strict=True))[:SHEET_CELLS]
    return sheet([Cell([pictures[-1]], caption) for pictures, caption in pairs], columns=6)


def markdown(result: dict[str, Any]) -> str:
    """The report: what was measured, in which protocol, with the command's own words for every figure."""
    protocol = result["protocol"]
    lines = [
        "# Evaluation",
        "",
        f"Bundle `{protocol['bundle']}`, seed {protocol['seed']}, {result['n']['samples']} samples.",
        "",
    ]
    if "samples" in result:
        lines += _shape_table(result)
    if result.get("psnr"):
        lines += _psnr_table(result["psnr"])
    lines += _frechet_table(result)
    lines += ["## Protocol", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in protocol.items() if key != "stages"]
    for stage in protocol["stages"]:
        sampler = ", ".join(f"{key} {value}" for key, value in stage["sampler"].items())
        lines.append(f"| stage {stage['name']} | step {stage['step']}, sha256 {stage['sha256'][:12]}, {sampler} |")
    return "\n".join(lines) + "\n"


def summary(result: dict[str, Any]) -> str:
    """The same in a few lines for the terminal."""
    lines = []
    if "samples" in result:
        for row, title in (("samples", "samples right"), ("real", "held-out drawings read right")):
            parts = ", ".join(f"{field} {share:.1%}" for field, share in result[row].items())
            lines.append(f"{title}: {parts}")
    for name, stage in result.get("psnr", {}).get("stages", {}).items():
        lines.append(f"PSNR of {name} on true low-res input: {stage['sr']:.2f} dB, bicubic {stage['bicubic']:.2f} dB")
    for name, entry in result["frechet"].items():
        floor = "" if entry["floor"] is None else f" (real drawings of the same captions: {entry['floor']:.4f})"
        lines.append(f"Frechet distance on {name}: {entry['value']:.4f}{floor}")
    return "\n".join(lines)


def _shape_table(result: dict[str, Any]) -> list[str]:
    rows = {"samples": "samples", "base": "their base pictures, enlarged by bicubic", "real": "real held-out drawings"}
    fields = list(result["samples"])
    lines = [
        "## Share right, as read by the oracle",
        "",
        f"| | {' | '.join(fields)} |",
        "|---" * (len(fields) + 1) + "|",
    ]
    for key, title in rows.items():
        if key in result:
            lines.append(f"| {title} | " + " | ".join(f"{result[key][field]:.1%}" for field in fields) + " |")
    lines += ["", "![samples](samples.png)", "", "By word:", ""]
    for field, words in result["by_word"].items():
        lines.append(f"* {field}: " + ", ".join(f"{word} {share:.0%}" for word, share in words.items()))
    return [*lines, ""]


def _psnr_table(psnr: dict[str, Any]) -> list[str]:
    lines = [
        f"## PSNR on true low-res input ({psnr['n']} held-out pictures, dB)",
        "",
        "| stage | restored | restored, low-res noised as in sampling | bicubic |",
        "|---|---|---|---|",
    ]
    for name, stage in psnr["stages"].items():
        lines.append(f"| {name} | {stage['sr']:.2f} | {stage['sr_noised']:.2f} | {stage['bicubic']:.2f} |")
    return [*lines, ""]


def _frechet_table(result: dict[str, Any]) -> list[str]:
    count = result["n"]
    lines = [
        f"## Frechet distance ({count['samples']} samples, {count['reference']} reference pictures)",
        "",
        "| features | width | samples | real drawings of the same captions |",
        "|---|---|---|---|",
    ]
    for name, entry in result["frechet"].items():
        floor = "-" if entry["floor"] is None else f"{entry['floor']:.4f}"
        lines.append(f"| {name} | {entry['width']} | {entry['value']:.4f} | {floor} |")
    note = "Biased upwards by about 1/N: compare only figures of equal N. The features have no trained weights."
    return [*lines, "", note, ""]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")
