"""Quality against sampling steps: Frechet distance of a demo bundle's pictures from real drawings, for every sampler.

    python benchmarks/sampling.py BUNDLE OUTPUT [seeds=2] [count=256] [part=base|cascade]

    OUTPUT/pictures/*.npz   what was drawn; the same command again draws only what is missing
    OUTPUT/sampling.json    every figure
    OUTPUT/sampling.md      the same as a table
    OUTPUT/sampling.png     the curves

Held-out captions, the same for every sampler, and the same start noise (`seed`). The reference is `REFERENCE` drawings
of each of these captions. Frechet distances are biased upwards by about 1 / pictures, so each is made of `count`
pictures, and several seeds are averaged. `base` draws with the first stage alone; `cascade` draws both stages with the
same sampler and steps. The noise of a ratio is bootstrapped over pictures, the same ones on both sides.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.synthetic import caption, draw, spec_at
from training.cascade import Cascade
from training.evaluation.metrics.features import EXTRACTORS
from training.evaluation.metrics.frechet import Moments, frechet_distance

STEPS = (5, 8, 10, 15, 20, 30, 50, 100, 250)
SAMPLERS = ("ddpm", "ddim", "heun", "dpmpp_2m")
YARDSTICK = ("ddpm", 250)
REFERENCE = 16
BOOTSTRAPS = 200
BATCH = 64
COLOURS = {"ddpm": "#1f77b4", "ddim": "#ff7f0e", "heun": "#2ca02c", "dpmpp_2m": "#d62728"}


@dataclass(frozen=True)
class Job:
    """One point of a curve for one seed."""

    part: str
    sampler: str
    steps: int
    seed: int

    @property
    def evaluations(self) -> int:
        """Network evaluations per picture and stage (two branches of guidance count as one)."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps

    def file(self, output: Path) -> Path:
        return output / "pictures" / f"{self.part}-{self.sampler}-{self.steps}-{self.seed}.npz"


def points(part: str) -> list[tuple[str, int]]:
    """(sampler, steps); the solvers of differential equations have converged long before 250 steps."""
    if part == "cascade":
        return [("dpmpp_2m", 10), ("dpmpp_2m", 20), ("heun", 10), YARDSTICK]
    most = {"ddpm": 250, "ddim": 100, "heun": 50, "dpmpp_2m": 100}
    return [(name, steps) for steps in STEPS for name in SAMPLERS if steps <= most[name]]


def draw_pictures(cascade: Cascade, job: Job, prompts: list[str]) -> np.ndarray:
    """uint8 (N, H, W, 3)."""
    drawings = cascade.draw(
        prompts,
        steps=job.steps,
        sampler=job.sampler,
        seed=job.seed,
        batch=BATCH,
        stages=1 if job.part == "base" else None,
    )
    return np.stack([np.asarray(drawing.image) for drawing in drawings])


def distances(pictures: np.ndarray, real: dict[str, Moments]) -> dict[str, float]:
    return {name: frechet_distance(Moments.of(extract(pictures)), real[name]) for name, extract in EXTRACTORS.items()}


def ratio_noise(own: list[np.ndarray], yardstick: list[np.ndarray], real: Moments) -> tuple[float, float]:
    """5th and 95th percentile of the ratio of two Frechet distances (means over seeds).

    Args:
        own, yardstick: features (N, d) per seed, of the same captions and seeds; the same rows are drawn of both.
    """
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(BOOTSTRAPS):
        sums = np.zeros(2)
        for pair in zip(own, yardstick, strict=True):
            rows = random.integers(0, len(pair[0]), len(pair[0]))
            sums += [frechet_distance(Moments.of(features[rows]), real) for features in pair]
        ratios.append(sums[0] / sums[1])
    low, high = np.percentile(ratios, [5, 95])
    return float(low), float(high)


def measure(output: Path, part: str, seeds: int, size: int, count: int) -> list[dict[str, Any]]:
    """One row per point of which at least one seed's pictures are there; distances are means over seeds."""
    specs = [spec_at(i, 0, heldout=True) for i in range(count)]

    def drawings(start: int, each: int) -> np.ndarray:
        return np.stack([draw(spec, size, start + 100 * i + j) for i, spec in enumerate(specs) for j in range(each)])

    real = {name: Moments.of(extract(drawings(1_000_000, REFERENCE))) for name, extract in EXTRACTORS.items()}
    floor = distances(drawings(9_000_000, 1), real)
    features: dict[Job, dict[str, np.ndarray]] = {}
    for job in (Job(part, *point, seed) for point in points(part) for seed in range(seeds)):
        if job.file(output).exists():
            pictures = np.load(job.file(output))["pictures"]
            features[job] = {name: extract(pictures) for name, extract in EXTRACTORS.items()}
    rows = []
    for sampler, steps in points(part):
        jobs = [job for job in features if (job.sampler, job.steps) == (sampler, steps)]
        if not jobs:
            continue
        each = {n: [frechet_distance(Moments.of(features[j][n]), real[n]) for j in jobs] for n in EXTRACTORS}
        row: dict[str, Any] = {
            "part": part,
            "sampler": sampler,
            "steps": steps,
            "evaluations": jobs[0].evaluations,
            "pictures_per_seed": count,
            "frechet": {name: float(np.mean(values)) for name, values in each.items()},
            "per_seed": each,
            "floor": floor,
        }
        pairs = [(j, y) for j in jobs if (y := Job(part, *YARDSTICK, j.seed)) in features]
        if pairs:
            row["of_ancestral"] = {}
            for name in EXTRACTORS:
                own, other = ([features[pair[side]][name] for pair in pairs] for side in (0, 1))
                sums = [sum(frechet_distance(Moments.of(f), real[name]) for f in side) for side in (own, other)]
                low, high = ratio_noise(own, other, real[name])
                row["of_ancestral"][name] = {"ratio": sums[0] / sums[1], "low": low, "high": high}
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------ showing


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per point."""
    names = list(EXTRACTORS)
    heads = ["part", "sampler", "steps", "evaluations", "seeds"]
    heads += [head for name in names for head in (name, "of ancestral 250 (5-95 %)")]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in sorted(rows, key=lambda r: (r["part"], SAMPLERS.index(r["sampler"]), r["steps"])):
        cells = [str(row[key]) for key in ("part", "sampler", "steps", "evaluations")]
        cells.append(str(len(row["per_seed"][names[0]])))
        for name in names:
            cells.append(f"{row['frechet'][name]:.5f}")
            ratio = row.get("of_ancestral", {}).get(name)
            cells.append(f"{ratio['ratio']:.3f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "")
        lines.append("| " + " | ".join(cells) + " |")
    floors = {row["part"]: ", ".join(f"{name} {value:.5f}" for name, value in row["floor"].items()) for row in rows}
    said = "; ".join(f"{part}: {floor}" for part, floor in floors.items())
    return "\n".join([*lines, "", f"Real drawings of the same captions instead of samples: {said}."]) + "\n"


def is_yardstick(row: dict[str, Any]) -> bool:
    return (row["sampler"], row["steps"]) == YARDSTICK


def plot(rows: list[dict[str, Any]], feature: str) -> Image.Image:
    """Frechet distance of the base stage against network evaluations, both axes logarithmic."""
    rows = [row for row in rows if row["part"] == "base"]
    width, height, left, top, right, bottom = 900, 560, 90, 50, 160, 70
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    values = [row["frechet"][feature] for row in rows] + [rows[0]["floor"][feature]]
    low, high = min(values) * 0.85, max(values) * 1.15
    first, last = min(r["evaluations"] for r in rows) * 0.9, max(r["evaluations"] for r in rows) * 1.1

    def place(evaluations: float, value: float) -> tuple[float, float]:
        x = np.log(evaluations / first) / np.log(last / first)
        y = np.log(value / low) / np.log(high / low)
        return left + x * (width - left - right), height - bottom - y * (height - top - bottom)

    for tick in (5, 10, 20, 50, 100, 250):
        x, _ = place(tick, low)
        pen.line((x, top, x, height - bottom), fill="#e0e0e0")
        pen.text((x, height - bottom + 6), str(tick), fill="#404040", font=font, anchor="mt")
    for share in np.linspace(0, 1, 6):
        value = low * (high / low) ** share
        _, y = place(first, value)
        pen.line((left, y, width - right, y), fill="#e0e0e0")
        pen.text((left - 8, y), f"{value:.4f}", fill="#404040", font=font, anchor="rm")
    dashes: list[tuple[str, float, str]] = [("real drawings", rows[0]["floor"][feature], "#808080")]
    dashes += [
        (f"{r['sampler']} {r['steps']}", r["frechet"][feature], "#1f77b4")
        for r in rows
        if (r["sampler"], r["steps"]) == YARDSTICK
    ]
    for label, value, colour in dashes:
        _, y = place(first, value)
        for x in range(left, width - right, 12):
            pen.line((x, y, x + 5, y), fill=colour)
        pen.text((width - right + 6, y), label, fill=colour, font=font, anchor="lm")
    for number, name in enumerate(SAMPLERS):
        curve = sorted((r["evaluations"], r["frechet"][feature]) for r in rows if r["sampler"] == name)
        dots = [place(*point) for point in curve]
        if len(dots) > 1:
            pen.line(dots, fill=COLOURS[name], width=2)
        for x, y in dots:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLOURS[name])
        pen.text((width - right - 110, top + 8 + 20 * number), name, fill=COLOURS[name], font=font)
    pen.text(
        (left, 16), f"base stage: Frechet distance ({feature}) against network evaluations", fill="#202020", font=font
    )
    pen.text(
        ((left + width - right) / 2, height - 26),
        "network evaluations per picture",
        fill="#202020",
        font=font,
        anchor="mt",
    )
    return image


def main() -> None:
    bundle, output = sys.argv[1], Path(sys.argv[2])
    options = dict(word.split("=") for word in sys.argv[3:])
    seeds, count, only = int(options.get("seeds", 2)), int(options.get("count", 256)), options.get("part")
    torch.set_num_threads(int(options.get("threads", 1)))
    cascade = Cascade.from_pretrained(bundle)
    prompts = [caption(spec_at(i, 0, heldout=True)) for i in range(count)]
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    parts = [only] if only else ["base", "cascade"]
    todo = [Job(part, *point, seed) for part in parts for seed in range(seeds) for point in points(part)]
    for job in (job for job in todo if not job.file(output).exists()):
        began = time.monotonic()
        pictures = draw_pictures(cascade, job, prompts)
        np.savez(job.file(output), pictures=pictures)
        print(f"{job.part} {job.sampler} {job.steps} seed {job.seed}: {time.monotonic() - began:.0f} s", flush=True)
    rows = []
    for part in ("base", "cascade"):
        size = cascade.stages[0 if part == "base" else -1].config.image_size
        rows += measure(output, part, seeds, size, count)
    (output / "sampling.json").write_text(json.dumps(rows, indent=1))
    (output / "sampling.md").write_text(table(rows))
    plot(rows, next(iter(EXTRACTORS))).save(output / "sampling.png")
    print(table(rows))


if __name__ == "__main__":
    main()
