"""`cascade evaluate`: samples held-out captions with a bundle and measures what came out.

    OUTPUT/result.json   every figure with its protocol
    OUTPUT/report.md     the same as tables
    OUTPUT/samples.png   samples with their captions; with evaluation.kind=shapes wrong ones are marked

shapes    an oracle reads background, colour, size, shape (and relation) from the samples, and from the real drawings,
          where it must be right; PSNR of each super-resolution stage against bicubic; Frechet distances
pictures  Frechet distances only, for data that no oracle can read
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.progress import progress
from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.content.images import box_average
from data_pipeline.content.synthetic import ShapeSpec, caption, draw, example, parse
from data_pipeline.reading.loader import Loader
from training.cascade import Cascade
from training.cascade.requests import Drawing
from training.checkpoint.provenance import code_version
from training.commands.sample import open_cascade
from training.config.experiment import Experiment
from training.evaluation import oracle, report
from training.evaluation.metrics.features import EXTRACTORS
from training.evaluation.metrics.frechet import Moments, frechet_distance
from training.evaluation.metrics.psnr import psnr
from training.pictures import sheets as grid
from training.processes.distributed import read_ranks
from training.run.directory import replace_file, try_to_write

REFERENCE_RULE = "middle square, one antialiased bicubic resize, 8 bits in memory (no file format in between)"
AGAIN = 1 << 32
"""Seeds of the second set of real drawings."""
HIGHEST_DB = 100.0
"""What an exact picture counts as in a mean of PSNRs."""
CHUNK = 1024
"""Pictures held at a time with evaluation.kind=pictures."""


@dataclass
class Real:
    """Held-out pictures: uint8 (N, H, W, 3) and their captions."""

    pictures: np.ndarray
    captions: list[str]


def main(config: Experiment) -> dict[str, Any]:
    """Evaluates the bundle `bundle.dir`; returns what result.json holds."""
    ranks = read_ranks()
    if ranks is not None and ranks.rank > 0:
        return {"rank": ranks.rank, "skipped": "rank 0 evaluates, with all GPUs that it sees"}
    began = time.monotonic()
    output = Path(config.evaluation.output)
    try_to_write(output, "evaluation.output")
    cascade, devices = open_cascade(config)
    evaluator = Evaluator(config, cascade, devices)
    result = evaluator.shapes() if config.evaluation.kind == "shapes" else evaluator.pictures()
    result["seconds"] = round(time.monotonic() - began, 3)
    replace_file(output / "result.json", json.dumps(result, indent=1, ensure_ascii=False))
    replace_file(output / "report.md", report.markdown(result))
    print(report.summary(result))
    print(f"{output / 'report.md'}: the report; samples in {output / 'samples.png'}")
    return result


class Evaluator:
    """One evaluation of one bundle."""

    def __init__(self, config: Experiment, cascade: Cascade, devices: list[str]) -> None:
        self.config, self.cascade, self.devices = config, cascade, devices
        self.settings = config.evaluation
        self.size = cascade.stages[-1].config.image_size

    # ---------------------------------------------------------------------------------------------- two kinds

    def shapes(self) -> dict[str, Any]:
        """Oracle, PSNR and Frechet distances on captioned shapes."""
        count = self.settings.samples
        real = self._first(count) if self.settings.reference else self._drawn(count)
        specs = [_spec(text) for text in real.captions]
        drawings = self._sample(real.captions)
        pictures = np.stack([np.asarray(drawing.image) for drawing in drawings])
        base = [np.asarray(_enlarged(next(iter(d.stages.values())), self.size)) for d in drawings]

        readings, scores = _read_all(pictures, specs)
        images = [list(drawing.stages.values()) for drawing in drawings]
        grid.save(report.sheet_of_shapes(images, real.captions, readings, scores), self._output / "samples.png")
        # the same captions drawn again: what a perfect cascade would score
        again = np.stack([draw(spec, self.size, AGAIN + index) for index, spec in enumerate(specs)])
        return {
            "kind": "shapes",
            "samples": report.shares(scores),
            "base": report.shares(_read_all(base, specs)[1]),
            "real": report.shares(_read_all(real.pictures, specs)[1]),
            "by_word": report.shares_by_word(scores, specs),
            "psnr": self._psnr(real),
            "frechet": _frechet(*(_add({}, some) for some in (pictures, real.pictures, again))),
            "n": {"samples": len(drawings), "reference": len(real.captions)},
            "protocol": self._protocol(),
        }

    def pictures(self) -> dict[str, Any]:
        """Frechet distances between samples and reference pictures, a chunk at a time."""
        if not self.settings.reference:
            raise ConfigError("evaluation.reference: name held-out shards, for example data/heldout")
        wanted = max(self.settings.samples, self.settings.reference_samples or self.settings.samples)
        drawn: dict[str, Moments] = {}
        reference: dict[str, Moments] = {}
        shown: list[tuple[list[Image.Image], str]] = []
        sampled = compared = 0
        for real in self._chunks(wanted):
            _add(reference, real.pictures)
            compared += len(real.captions)
            prompts = real.captions[: self.settings.samples - sampled]
            if prompts:
                drawings = self._sample(prompts)
                _add(drawn, np.stack([np.asarray(drawing.image) for drawing in drawings]))
                sampled += len(prompts)
                shown += [(list(d.stages.values()), d.prompt) for d in drawings[: report.SHEET_CELLS - len(shown)]]
        grid.save(report.sheet_of_pictures(*zip(*shown, strict=True)), self._output / "samples.png")
        return {
            "kind": "pictures",
            "frechet": _frechet(drawn, reference),
            "n": {"samples": sampled, "reference": compared},
            "protocol": self._protocol(),
        }

    # ------------------------------------------------------------------------------------------------ sampling

    @property
    def _output(self) -> Path:
        return Path(self.settings.output)

    def _sample(self, prompts: Sequence[str], title: str = "sampling", **options: Any) -> list[Drawing]:
        """Draws with a progress bar over sampler steps."""
        with progress(unit="step", desc=title) as bar:
            totals: dict[str, int] = {}

            def advance(stage: str, done: int, of: int) -> None:
                totals[stage] = of
                bar.total = sum(totals.values())
                bar.set_description(f"{title} {stage}", refresh=False)
                bar.update()

            return self.cascade.draw(
                prompts,
                seed=self.config.seed,
                batch=self.settings.batch,
                devices=self.devices,
                callback=advance,
                **options,
            )

    def _psnr(self, real: Real) -> dict[str, Any]:
        """How well each super-resolution stage restores true pictures from their box-averaged low-res version (dB,
        mean over pictures), without and with the noise that sampling puts on it, and Pillow's bicubic instead."""
        count = min(self.settings.psnr_samples, len(real.captions))
        stages: dict[str, dict[str, float]] = {}
        for stage in (s.config for s in self.cascade.stages if s.config.is_super_resolution and count):
            truth = [box_average(picture, self.size // stage.image_size) for picture in real.pictures[:count]]
            low = [box_average(picture, stage.image_size // stage.low_res_size) for picture in truth]
            found = {"bicubic": [np.asarray(_enlarged(Image.fromarray(p), stage.image_size)) for p in low]}
            for name, level in (("sr", 0.0), ("sr_noised", None)):
                drawings = self._sample(
                    real.captions[:count], "restoring with", stages=stage.name, low_res=low, aug_level=level
                )
                found[name] = [np.asarray(drawing.image) for drawing in drawings]
            stages[stage.name] = {
                name: float(psnr(np.stack(pictures), np.stack(truth)).clip(max=HIGHEST_DB).mean())
                for name, pictures in found.items()
            }
        last = list(stages.values())[-1] if stages else {}
        return {**last, "n": count, "stages": stages} if stages else {}

    # ------------------------------------------------------------------------------------------------ reference

    def _drawn(self, count: int) -> Real:
        """Held-out drawings, made here."""
        objects = self.config.prepare.draw.objects
        made = [example(i, self.size, self.config.seed, heldout=True, objects=objects) for i in range(count)]
        return Real(np.stack([picture for picture, _ in made]), [caption(spec) for _, spec in made])

    def _first(self, count: int) -> Real:
        parts = list(self._chunks(count))
        return Real(np.concatenate([part.pictures for part in parts]), [c for part in parts for c in part.captions])

    def _chunks(self, count: int) -> Iterator[Real]:
        """Up to `count` reference pictures in a fixed shuffled order, each once."""
        data: DataConfig = replace(
            self.config.data,
            shards=self.settings.reference,
            global_batch=1,
            lanes=1,
            micro_batch=1,
            crop="center",
            flip=0.0,
            filter=FilterConfig(),
            embeddings=None,
        )
        loader = Loader(data, image_size=self.size, seed=self.config.seed)
        try:
            count = min(count, sum(loader.dataset.counts))
            if count < 2:
                raise DataError(
                    f"evaluation.reference={self.settings.reference}: {count} picture; at least 2 are needed"
                )
            for at in range(0, count, CHUNK):
                batches = [next(loader)[0] for _ in range(min(CHUNK, count - at))]
                pictures = np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in batches])
                yield Real(pictures, [text for batch in batches for text in batch.captions])
        finally:
            loader.close()

    def _protocol(self) -> dict[str, Any]:
        stages = [
            {
                "name": s.config.name,
                "step": s.origin.get("step"),
                "ema_decay": s.origin.get("ema_decay"),
                "sha256": s.sha256,
                "sampler": asdict(s.config.sampler),
            }
            for s in self.cascade.stages
        ]
        code = code_version()
        return {
            "bundle": self.config.bundle.dir,
            "seed": self.config.seed,
            "reference": self.settings.reference or "held-out drawings made for this evaluation",
            "reference_rule": REFERENCE_RULE,
            "features": list(EXTRACTORS),
            "text": self.cascade.encoder.name,
            "commit": code["commit"],
            "versions": code["versions"],
            "stages": stages,
        }


# --------------------------------------------------------------------------------------------------- pure parts


def _spec(text: str) -> ShapeSpec:
    spec = parse(text)
    if spec is None:
        raise ConfigError(
            f"evaluation.kind=shapes: '{text[:80]}' is no caption of drawn shapes; other data needs evaluation=pictures"
        )
    return spec


def _read_all(
    pictures: Sequence[np.ndarray] | np.ndarray, specs: Sequence[ShapeSpec]
) -> tuple[list[oracle.Reading], list[dict[str, bool]]]:
    readings = [oracle.read(picture, len(spec.objects)) for picture, spec in zip(pictures, specs, strict=True)]
    return readings, [oracle.score(reading, spec) for reading, spec in zip(readings, specs, strict=True)]


def _enlarged(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _add(moments: dict[str, Moments], pictures: np.ndarray) -> dict[str, Moments]:
    """Takes more pictures into the moments of every kind of features; returns them."""
    for name, extract in EXTRACTORS.items():
        new = Moments.of(extract(pictures))
        moments[name] = moments[name].merged(new) if name in moments else new
    return moments


def _frechet(
    drawn: dict[str, Moments], reference: dict[str, Moments], again: dict[str, Moments] | None = None
) -> dict[str, dict[str, Any]]:
    """Per kind of features the samples' distance from the reference, and that of real pictures of the same captions."""
    return {
        name: {
            "value": frechet_distance(drawn[name], reference[name]),
            "floor": frechet_distance(again[name], reference[name]) if again else None,
            "width": len(reference[name].mean),
        }
        for name in reference
    }
