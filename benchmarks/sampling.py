"""Quality against sampling steps: Fréchet distance of a demo bundle's pictures from real drawings, for every sampler.

    python benchmarks/sampling.py BUNDLE OUTPUT [seeds=2] [count=256] [part=base|cascade]

    OUTPUT/pictures/*.npz   the samples; repeating the command draws only what is missing
    OUTPUT/sampling.json    all figures
    OUTPUT/sampling.md      the same as a table
    OUTPUT/sampling.png     the curves

All samplers get the same held-out captions and the same initial noise (`seed`). The reference is `REFERENCE` drawings
of each of these captions. Fréchet distances are biased upwards by about 1 / pictures, so each is computed from `count`
pictures, and several seeds are averaged. `base` draws with the first stage alone; `cascade` draws with both stages,
with the same sampler and steps and as bundled. Ratios have a standard error over pictures, paired between both sides.
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

from data_pipeline.content.synthetic import caption, render, spec_at
from training.cascade import Cascade
from training.evaluation.metrics.features import EXTRACTORS
from training.evaluation.metrics.frechet import Moments, frechet_distance

STEPS = (5, 8, 10, 15, 20, 30, 50, 100, 250)
SAMPLERS = ("ddpm", "ddim", "heun", "dpmpp_2m")
YARDSTICK = ("ddpm", 250)
OWN = ("as bundled", 0)
"""Each stage with its own sampler and steps."""
REFERENCE = 16
BLOCKS = 16
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
        """Network evaluations per picture and stage (both guidance branches count as one); 0 if the stages differ."""
        return max(0, 2 * self.steps - 1) if self.sampler == "heun" else self.steps

    def file(self, output: Path) -> Path:
        return output / "pictures" / f"{self.part}-{self.sampler.replace(' ', '_')}-{self.steps}-{self.seed}.npz"


def points(part: str) -> list[tuple[str, int]]:
    """Return the (sampler, steps) to measure; ODE solvers converge long before 250 steps."""
    if part == "cascade":
        return [OWN, ("dpmpp_2m", 20), YARDSTICK]
    most = {"ddpm": 250, "ddim": 100, "heun": 50, "dpmpp_2m": 100}
    return [(name, steps) for steps in STEPS for name in SAMPLERS if steps <= most[name]]


def draw_pictures(cascade: Cascade, job: Job, prompts: list[str]) -> np.ndarray:
    """Draw the pictures of a job, uint8 (N, H, W, 3)."""
    drawings = cascade.draw(
        prompts,
        steps=job.steps or None,
        sampler=job.sampler if job.steps else None,
        seed=job.seed,
        batch=BATCH,
        stages=1 if job.part == "base" else None,
    )
    return np.stack([np.asarray(drawing.image) for drawing in drawings])


def distances(pictures: np.ndarray, real: dict[str, Moments]) -> dict[str, float]:
    return {name: frechet_distance(Moments.of(extract(pictures)), real[name]) for name, extract in EXTRACTORS.items()}


def ratio(own: list[np.ndarray], yardstick: list[np.ndarray], real: Moments) -> tuple[float, float]:
    """Return the ratio of two Fréchet distances (means over seeds) and its standard error.

    The error is a jackknife estimate over `BLOCKS` blocks of pictures. Leaving pictures out hardly changes the bias of
    a Fréchet distance, whereas duplicating them (bootstrap) would pull every ratio towards one.

    Args:
        own, yardstick: features (N, d) per seed, of the same captions and seeds; the same rows are left out of both.
        real: moments of the reference features.
    """

    def without(block: int) -> float:
        sums = np.zeros(2)
        for pair in zip(own, yardstick, strict=True):
            kept = np.arange(len(pair[0])) % BLOCKS != block
            sums += [frechet_distance(Moments.of(features[kept]), real) for features in pair]
        return float(sums[0] / sums[1])

    left_out = np.array([without(block) for block in range(BLOCKS)])
    spread = np.sqrt((BLOCKS - 1) / BLOCKS * np.square(left_out - left_out.mean()).sum())
    return without(-1), float(spread)


def measure(output: Path, part: str, seeds: int, size: int, count: int) -> list[dict[str, Any]]:
    """Return a row per point with pictures of at least one seed; distances are means over seeds."""
    specs = [spec_at(i, 0, heldout=True) for i in range(count)]

    def drawings(start: int, each: int) -> np.ndarray:
        return np.stack([render(spec, size, start + 100 * i + j) for i, spec in enumerate(specs) for j in range(each)])

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
                value, error = ratio(own, other, real[name])
                row["of_ancestral"][name] = {"ratio": value, "standard_error": error}
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------ showing


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one row per point."""
    names = list(EXTRACTORS)
    heads = ["part", "sampler", "steps", "evaluations", "seeds"]
    heads += [head for name in names for head in (name, "of ancestral 250")]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    order = [OWN[0], *SAMPLERS]
    for row in sorted(rows, key=lambda r: (r["part"], order.index(r["sampler"]), r["steps"])):
        cells = [str(row[key] or "") for key in ("part", "sampler", "steps", "evaluations")]
        cells.append(str(len(row["per_seed"][names[0]])))
        for name in names:
            cells.append(f"{row['frechet'][name]:.5f}")
            found = row.get("of_ancestral", {}).get(name)
            cells.append(f"{found['ratio']:.2f} ± {found['standard_error']:.2f}" if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    floors = {row["part"]: ", ".join(f"{name} {value:.5f}" for name, value in row["floor"].items()) for row in rows}
    said = "; ".join(f"{part}: {floor}" for part, floor in floors.items())
    return "\n".join([*lines, "", f"Real drawings of the same captions instead of samples: {said}."]) + "\n"


def plot(rows: list[dict[str, Any]], feature: str) -> Image.Image:
    """Plot the Fréchet distance of the base stage against network evaluations (logarithmic)."""
    rows = [row for row in rows if row["part"] == "base"]
    width, height, left, top, right, bottom = 900, 480, 80, 60, 130, 60
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    values = [row["frechet"][feature] for row in rows]
    low, high = 0.9 * min(values), 1.05 * max(values)
    first, last = 4.5, 1.1 * max(row["evaluations"] for row in rows)

    def place(evaluations: float, value: float) -> tuple[float, float]:
        x = np.log(evaluations / first) / np.log(last / first)
        y = (value - low) / (high - low)
        return left + x * (width - left - right), height - bottom - y * (height - top - bottom)

    for tick in (5, 10, 20, 50, 100, 250):
        x, _ = place(tick, low)
        pen.line((x, top, x, height - bottom), fill="#e0e0e0")
        pen.text((x, height - bottom + 6), str(tick), fill="#404040", font=font, anchor="mt")
    for value in np.linspace(low, high, 6):
        _, y = place(first, value)
        pen.line((left, y, width - right, y), fill="#e0e0e0")
        pen.text((left - 8, y), f"{value:.4f}", fill="#404040", font=font, anchor="rm")
    for number, name in enumerate(SAMPLERS):
        curve = sorted((r["evaluations"], r["frechet"][feature]) for r in rows if r["sampler"] == name)
        dots = [place(*point) for point in curve]
        if len(dots) > 1:
            pen.line(dots, fill=COLOURS[name], width=2)
        for x, y in dots:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLOURS[name])
        pen.text((width - right + 14, top + 24 * number), name, fill=COLOURS[name], font=font)
    title = f"base stage: Frechet distance ({feature}); real drawings instead: {rows[0]['floor'][feature]:.4f}"
    pen.text((left, 20), title, fill="#202020", font=font)
    below = "network evaluations per picture"
    pen.text(((left + width - right) / 2, height - 24), below, fill="#202020", font=font, anchor="mt")
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
    if any(row["part"] == "base" for row in rows):
        plot(rows, next(iter(EXTRACTORS))).save(output / "sampling.png")
    print(table(rows))


if __name__ == "__main__":
    main()
