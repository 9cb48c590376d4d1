"""Evaluation of captioned drawings: an oracle reads the samples; super-resolution is measured against the true
pictures."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.common.errors import ConfigError
from data_pipeline.content.images import box_average
from data_pipeline.content.synthetic import ShapeSpec, caption, example, parse, render
from training.commands.measuring import PART, Evaluation, ImagesOf
from training.config.commands import SAMPLER_KEYS
from training.evaluation import oracle, report
from training.evaluation.metrics.figure import Figure
from training.evaluation.metrics.frechet import Moments, frechet_distance
from training.evaluation.metrics.psnr import psnr
from training.evaluation.metrics.rows import FeatureRows
from training.evaluation.references import SUFFIX, Real
from training.pictures import sheets

AGAIN = 1 << 32
"""First seed of the second set of real drawings."""
HIGHEST_DB = 100.0
"""PSNR of an exact picture, for means."""


@dataclass
class Drawn:
    """Held-out drawings made on the fly; has the interface of `References`."""

    count: int
    size: int
    seed: int
    objects: int
    broken: int = 0

    @property
    def fingerprint(self) -> str:
        """Identifies the drawings by all that they depend on."""
        return f"drawn:{self.count}:{self.size}:{self.seed}:{self.objects}"

    def chunks(self, size: int, most: int) -> Iterator[Real]:
        """Yield up to `most` pictures, `size` at a time."""
        for at in range(0, min(self.count, most), size):
            rows = range(at, min(at + size, self.count, most))
            made = [example(i, self.size, self.seed, heldout=True, objects=self.objects) for i in rows]
            yield Real(np.stack([picture for picture, _ in made]), [caption(spec) for _, spec in made])


class ShapesEvaluation(Evaluation):
    """One evaluation of a bundle that draws captioned shapes; every sample is kept and read by the oracle."""

    def _open_reference(self) -> None:
        reference = self.settings.reference
        if isinstance(reference, str) and reference.endswith(SUFFIX):
            raise ConfigError(
                f"evaluation.reference={reference}: the oracle needs reference pictures; use evaluation=pictures"
            )
        if reference:
            super()._open_reference()
        else:
            objects = self.config.prepare.draw.objects
            self.source = Drawn(self.settings.samples, self.size, self.config.seed, objects)

    @property
    def reference_rule(self) -> str:
        """How the reference pictures were made."""
        return "drawn at this size" if isinstance(self.source, Drawn) else super().reference_rule

    @property
    def _reference_count(self) -> int:
        return min(self.source.count, self.settings.samples)

    def check_prompt(self, prompt: str) -> None:
        """Raise ConfigError if the prompt is not a caption of drawn shapes."""
        _spec(prompt)

    def _rows_to_show(self, arrays: Mapping[str, np.ndarray]) -> list[int]:
        return list(range(len(arrays["place"])))

    def judged(
        self,
        arrays: Mapping[str, np.ndarray],
        captions: Sequence[str],
        kept: dict[str, Figure],
        reference: Mapping[str, FeatureRows],
    ) -> dict[str, Any]:
        """Return the oracle's readings, PSNR, and the distances of real drawings of the same captions (`floors`)."""
        shown = {name.removeprefix("shown/"): value for name, value in arrays.items() if name.startswith("shown/")}
        specs = [_spec(text) for text in captions]
        stages = list(shown.values())
        readings, scores = _read_all(stages[-1], specs)
        prompts, several = arrays["place"], self.settings.images_per_prompt
        on_sheet = report.places_on_sheet(scores)
        real, read, true = self._real({place // several for place in on_sheet})
        beside = {} if self.prompts else {place: Image.fromarray(true[place // several]) for place in on_sheet}
        sheets.save(
            report.sheet_of_shapes(ImagesOf(shown), captions, readings, scores, beside), self._output / "samples.png"
        )
        base = (np.asarray(_enlarged(Image.fromarray(picture), self.size)) for picture in stages[0])
        shares = report.shares(scores)
        kept |= {f"samples.{field}": figure for field, figure in shares.items()}
        restored = self._psnr(real)
        kept |= {f"psnr.stages.{s}.{k}": f for s, found in restored.items() for k, f in found.items()}
        psnrs = {s: {k: f.as_dict() for k, f in found.items()} for s, found in restored.items()}
        return {
            "samples": {field: figure.as_dict(prompts) for field, figure in shares.items()},
            "base": {field: f.as_dict(prompts) for field, f in report.shares(_read_all(base, specs)[1]).items()},
            "real": {field: f.as_dict() for field, f in report.shares(read).items()},
            "by_word": report.shares_by_word(scores, specs, prompts),
            "psnr": {**list(psnrs.values())[-1], "n": len(real.captions), "stages": psnrs} if psnrs else {},
            "floors": self._floors(specs, reference),
        }

    def _real(self, wanted: Container[int]) -> tuple[Real, list[dict[str, bool]], dict[int, np.ndarray]]:
        """Return, of the real drawings, the first ones, to be restored; the oracle's scores of all; and the pictures at
        the wanted places."""
        assert self.source is not None
        first: list[np.ndarray] = []
        captions: list[str] = []
        scores: list[dict[str, bool]] = []
        pictures: dict[int, np.ndarray] = {}
        for part in self.source.chunks(PART, self._reference_count):
            for place, picture in enumerate(part.pictures, len(scores)):
                if place in wanted:
                    pictures[place] = picture.copy()
            scores += _read_all(part.pictures, [_spec(caption) for caption in part.captions])[1]
            missing = max(0, self.settings.psnr_samples - len(captions))
            first, captions = [*first, *part.pictures[:missing].copy()], [*captions, *part.captions[:missing]]
        none = np.zeros((0, self.size, self.size, 3), np.uint8)
        return Real(np.stack(first) if first else none, captions), scores, pictures

    def _floors(self, specs: Sequence[ShapeSpec], reference: Mapping[str, FeatureRows]) -> dict[str, float]:
        """Return for each feature space the distance of real drawings of the same captions: the score of a perfect
        cascade."""
        found: dict[str, Moments] = {}
        for at in range(0, len(specs), PART):
            rows = range(at, min(at + PART, len(specs)))
            again = np.stack([render(specs[index], self.size, AGAIN + index) for index in rows])
            for extractor in self.extractors:
                own = Moments.of(extractor.pictures(again))
                found[extractor.name] = found[extractor.name].merged(own) if at else own
        return {name: frechet_distance(own, Moments.of(reference[name])) for name, own in found.items()}

    def _psnr(self, real: Real) -> dict[str, dict[str, Figure]]:
        """Measure how well each super-resolution stage restores true pictures from their box-averaged low-res version
        (dB, mean over pictures): without noise on that version, with the sampler's noise, and Pillow's bicubic for
        comparison."""
        count = len(real.captions)
        stages: dict[str, dict[str, Figure]] = {}
        own = {s.config.name: sampler for s, sampler in zip(self.stages, self.samplers, strict=True)}
        for stage in (s.config for s in self.stages if s.config.is_super_resolution and count):
            truth = [box_average(picture, self.size // stage.image_size) for picture in real.pictures[:count]]
            low = [box_average(picture, stage.image_size // stage.low_res_size) for picture in truth]
            found = {"bicubic": [np.asarray(_enlarged(Image.fromarray(p), stage.image_size)) for p in low]}
            sampler = own[stage.name]
            apart = {"sampler", "aug_level"} | (set() if stage.diffusion.size_condition else {"original_side"})
            options = {key: getattr(sampler, key) for key in SAMPLER_KEYS if key not in apart}
            for name, level in (("sr", 0.0), ("sr_noised", sampler.aug_level)):
                drawings = self._sample(
                    real.captions[:count],
                    sampler.steps,
                    "restoring with",
                    stages=stage.name,
                    low_res=low,
                    aug_level=level,
                    sampler=sampler.name,
                    **options,
                )
                found[name] = [np.asarray(drawing.image) for drawing in drawings]
            stages[stage.name] = {
                name: Figure.mean(psnr(np.stack(pictures), np.stack(truth)).clip(max=HIGHEST_DB))
                for name, pictures in found.items()
            }
        return stages


# --------------------------------------------------------------------------------------------------- pure parts


def _spec(text: str) -> ShapeSpec:
    spec = parse(text)
    if spec is None:
        raise ConfigError(
            f"evaluation.kind=shapes: '{text[:80]}' is not a caption of drawn shapes; "
            "for other data use evaluation=pictures"
        )
    if len(spec.objects) > 2 or spec.is_count:
        raise ConfigError(
            f"evaluation.kind=shapes: '{text[:80]}': the oracle only reads one object, or two with their relation; "
            "for more use evaluation=pictures"
        )
    return spec


def _read_all(
    pictures: Iterable[np.ndarray], specs: Sequence[ShapeSpec]
) -> tuple[list[oracle.Reading], list[dict[str, bool]]]:
    readings = [oracle.read_drawing(picture, len(spec.objects)) for picture, spec in zip(pictures, specs, strict=True)]
    return readings, [oracle.score(reading, spec) for reading, spec in zip(readings, specs, strict=True)]


def _enlarged(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)
