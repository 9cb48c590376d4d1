"""`cascade evaluate`: samples held-out captions with a bundle and measures what came out.

    OUTPUT/result.json      every figure with its interval, and the protocol
    OUTPUT/influences.npz   what each picture contributed, for `action=compare`
    OUTPUT/report.md        the same as tables
    OUTPUT/report.html      one page with figures, pictures and protocol; needs no server and no network
    OUTPUT/samples.png      samples with their captions; with evaluation.kind=shapes wrong ones are marked
    OUTPUT/parts/           features of what has been drawn: the same command again continues there

shapes    an oracle reads background, colour, size, shape (and relation) from the samples, and from the real drawings,
          where it must be right; PSNR of each super-resolution stage against bicubic; figures on features
pictures  figures on features only, for data that no oracle can read

The processes of a job share the parts; whichever finishes last writes the result.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.progress import progress
from data_pipeline.content.images import box_average
from data_pipeline.content.synthetic import ShapeSpec, caption, example, parse, render
from training.cascade.cascade import Cascade
from training.cascade.prompts import read_prompts
from training.cascade.requests import Drawing, plan_stages
from training.checkpoint.provenance import code_version
from training.commands.sample import open_cascade, place_cascade
from training.config.commands import EvaluateCommand
from training.evaluation import comparison, measure, oracle, page, report
from training.evaluation.extractors.base import Extractor, open_extractors
from training.evaluation.metrics.figure import Figure
from training.evaluation.metrics.frechet import Moments, frechet_distance
from training.evaluation.metrics.psnr import psnr
from training.evaluation.parts import Parts, settings_sha256
from training.evaluation.references import RULE, SUFFIX, Real, ReferenceFile, References
from training.pictures import sheets
from training.processes.ranks import gpu_of, read_ranks
from training.run.directory import replace_file, try_to_write

AGAIN = 1 << 32
"""Seeds of the second set of real drawings."""
HIGHEST_DB = 100.0
"""What an exact picture counts as in a mean of PSNRs."""
PART = 256
"""Captions drawn, and reference pictures read, between two files of results."""
MOST_ORIGINALS = 256 << 20
"""Bytes of reference pictures that are kept for the page."""
REFERENCE_FILE = f"reference{SUFFIX}"


def main(config: EvaluateCommand) -> dict[str, Any]:
    """Evaluates the bundle `bundle.dir`, or does another `action`; returns what result.json holds."""
    if config.action == "compare":
        differences = comparison.compare_results(config.results)
        print(comparison.as_text(differences))
        return differences
    if config.action == "pareto":
        from training.evaluation.pareto import draw_curve

        return draw_curve(config.results, Path(config.evaluation.output))
    if config.watch:
        from training.commands.watch import one_checkpoint, watch

        return watch(
            config,
            lambda given, runs, output: evaluate_cascade(
                one_checkpoint(given, output), place_cascade(given, Cascade.from_runs(runs))
            ),
        )
    if config.action == "reference":
        try_to_write(Path(config.evaluation.output), "evaluation.output")
        return make_reference(config, Path(config.evaluation.output))
    return evaluate_cascade(config)


def evaluate_cascade(config: EvaluateCommand, opened: tuple[Cascade, list[str]] | None = None) -> dict[str, Any]:
    """Evaluates one cascade into `evaluation.output`.

    Args:
        opened: a cascade and the devices to draw on; None: the bundle `bundle.dir`.
    """
    began = time.monotonic()
    output = Path(config.evaluation.output)
    try_to_write(output, "evaluation.output")
    extractors = open_extractors(config.evaluation.extractors, _device(config))
    cascade, devices = opened or open_cascade(config)
    evaluation = Evaluation(config, cascade, devices, extractors)
    ranks = read_ranks()
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    evaluation.draw(rank, world_size)
    if not evaluation.parts.all_done():
        return {"rank": rank, "waits": "the process that finishes last writes the result"}
    result = evaluation.result()
    result["seconds"] = round(time.monotonic() - began, 3)
    replace_file(output / "report.md", report.markdown(result))
    replace_file(output / "report.html", page.html(result, evaluation.sections))
    replace_file(output / comparison.RESULT, json.dumps(result, indent=1, ensure_ascii=False))
    evaluation.parts.forget_others()
    print(report.summary(result))
    print(f"{output / 'report.html'}: the report (report.md as text); samples in {output / 'samples.png'}")
    return result


def make_reference(config: EvaluateCommand, output: Path) -> dict[str, Any]:
    """Features of `evaluation.reference` in a file that names the rule they were made by."""
    settings = config.evaluation
    if not settings.reference:
        raise ConfigError("evaluation.reference: name held-out shards, for example data/heldout")
    extractors = open_extractors(settings.extractors, _device(config))
    size = _last_size(config)
    references = References(settings.reference, config.data, size, config.seed)
    most = settings.reference_samples or references.count
    features: dict[str, list[np.ndarray]] = {extractor.name: [] for extractor in extractors}
    captions: list[str] = []
    with progress(unit="picture", desc="reference", total=min(most, references.count)) as bar:
        for real in references.chunks(PART, most):
            for extractor in extractors:
                features[extractor.name].append(extractor.pictures(real.pictures))
            captions += real.captions
            bar.update(len(real.captions))
    facts = {
        "rule": RULE,
        "size": size,
        "extractors": {extractor.name: extractor.describe() for extractor in extractors},
        "fingerprint": f"{references.fingerprint}:{len(captions)}:{config.seed}",
        "shards": str(settings.reference),
        "broken": references.broken,
    }
    file = output / REFERENCE_FILE
    ReferenceFile({name: np.concatenate(parts) for name, parts in features.items()}, captions, facts).write(file)
    print(
        f"{file}: {len(captions)} pictures at {size} px, {references.broken} left out; use evaluation.reference={file}"
    )
    return {"reference": str(file), "n": len(captions), **facts}


def _last_size(config: EvaluateCommand) -> int:
    """Of the pictures that the bundle draws."""
    from training.cascade import bundle

    return bundle.read(config.bundle.dir).stages[-1].config.image_size


def _device(config: EvaluateCommand) -> str:
    """Where extractors run: this process's first GPU, or the CPU."""
    import torch

    if not (config.cluster.gpus and torch.cuda.is_available()):
        return "cpu"
    ranks = read_ranks()
    return f"cuda:{gpu_of(ranks.local_rank, torch.cuda.device_count())}" if ranks else "cuda:0"


@dataclass
class Drawn:
    """Held-out drawings, made here; the interface of `References`."""

    count: int
    size: int
    seed: int
    objects: int
    broken: int = 0

    @property
    def fingerprint(self) -> str:
        """Of what decides them."""
        return f"drawn:{self.count}:{self.size}:{self.seed}:{self.objects}"

    def chunks(self, size: int, most: int) -> Iterator[Real]:
        """Up to `most` pictures, `size` at a time."""
        for at in range(0, min(self.count, most), size):
            rows = range(at, min(at + size, self.count, most))
            made = [example(i, self.size, self.seed, heldout=True, objects=self.objects) for i in rows]
            yield Real(np.stack([picture for picture, _ in made]), [caption(spec) for _, spec in made])


class Evaluation:
    """One evaluation of one bundle.

    Raises:
        ConfigError, DataError: what is asked cannot be measured; nothing has been drawn then.
    """

    def __init__(
        self, config: EvaluateCommand, cascade: Cascade, devices: list[str], extractors: Sequence[Extractor]
    ) -> None:
        self.config, self.cascade, self.devices, self.extractors = config, cascade, devices, extractors
        self.settings = config.evaluation
        self.size = cascade.stages[-1].config.image_size
        self.clip = next((e.name for e in extractors if e.texts is not None), "")
        self.stages = cascade.stages[self._first_stage() :]
        names = [stage.config.name for stage in self.stages]
        plan = plan_stages([stage.config for stage in cascade.stages], names, **config.sampler_settings)
        self.samplers = [sampler for _, sampler in plan]
        self.prompts = read_prompts(self.settings.prompts, "evaluation.prompts")
        if self.settings.prompts and len(self.prompts) < 2:
            raise ConfigError(
                f"evaluation.prompts={self.settings.prompts}: {len(self.prompts)} prompts; give two or more"
            )
        self.source: References | Drawn | None = None
        self.file: ReferenceFile | None = None
        self._open_reference()
        self.sections: list[page.Section] = []
        """Pictures of the page, once there is a result."""
        self.protocol = self._protocol()
        self.parts = Parts(self._output, self._decides(), self._part_count())

    def _first_stage(self) -> int:
        """Place of `evaluation.from_stage`, or 0."""
        wanted, names = self.settings.from_stage, [stage.config.name for stage in self.cascade.stages]
        if wanted is None:
            return 0
        if wanted not in names[1:]:
            raise ConfigError(
                f"evaluation.from_stage={wanted}: it must be a super-resolution stage of the bundle, which has "
                f"{', '.join(names)}"
            )
        reference = self.settings.reference
        if self.settings.prompts or (isinstance(reference, str) and reference.endswith(SUFFIX)):
            raise ConfigError(
                f"evaluation.from_stage={wanted}: it starts from the reference's own pictures; name shards in "
                "evaluation.reference, and no evaluation.prompts"
            )
        return names.index(wanted)

    def _open_reference(self) -> None:
        reference, shapes = self.settings.reference, self.settings.kind == "shapes"
        if isinstance(reference, str) and reference.endswith(SUFFIX):
            if shapes:
                raise ConfigError(
                    f"evaluation.reference={reference}: the oracle needs pictures; say evaluation=pictures"
                )
            self.file = ReferenceFile.read(reference)
            self.file.check(self.size, self.extractors, reference)
            self.prompts = self.prompts or list(self.file.captions)
        elif reference:
            self.source = References(reference, self.config.data, self.size, self.config.seed)
        elif shapes:
            objects = self.config.prepare.draw.objects
            self.source = Drawn(self.settings.samples, self.size, self.config.seed, objects)
        elif not self.prompts:
            raise ConfigError("evaluation.reference: name held-out shards, for example data/heldout")

    @property
    def _output(self) -> Path:
        return Path(self.settings.output)

    @property
    def _reference_count(self) -> int:
        """Reference pictures to read."""
        if self.source is None:
            return 0
        wanted = self.settings.reference_samples or self.settings.samples
        return min(self.source.count, wanted if self.settings.kind == "pictures" else self.settings.samples)

    def _part_count(self) -> int:
        drawn = min(self.settings.samples, len(self.prompts)) if self.prompts else 0
        read = max(self._reference_count, 0 if self.prompts or self.source is None else self._most_read())
        return -(-max(drawn, read) // PART)

    def _most_read(self) -> int:
        assert self.source is not None
        return min(self.source.count, max(self.settings.samples, self._reference_count))

    # ------------------------------------------------------------------------------------------------ drawing

    def draw(self, rank: int = 0, world_size: int = 1) -> None:
        """Makes this rank's share of the parts that are not there yet."""
        counts: Counter[str] = Counter()
        sampled = seen = 0
        for number, real in enumerate(self._chunks()):
            given = self.prompts[number * PART :] if self.prompts else real.captions
            prompts = given[: min(PART, self.settings.samples - sampled)]
            numbers = []
            for prompt in prompts:
                if self.settings.kind == "shapes":
                    _spec(prompt)
                numbers.append(counts[prompt])
                counts[prompt] += self.settings.images_per_prompt
            if number % world_size == rank and not self.parts.done(number):
                self.parts.write(number, self._part(prompts, numbers, sampled, real.pictures, number * PART))
            sampled += len(prompts)
            seen = number + 1
        self.parts.count = seen

    def _chunks(self) -> Iterator[Real]:
        """Reference pictures beside which prompts are drawn; empty ones where there are more prompts."""
        given = 0
        empty = Real(np.zeros((0, self.size, self.size, 3), np.uint8), [])
        if self.source is not None:
            for real in self.source.chunks(PART, self._reference_count if self.prompts else self._most_read()):
                given += 1
                yield real
        drawn = min(self.settings.samples, len(self.prompts)) if self.prompts else 0
        for _ in range(given, -(-drawn // PART)):
            yield empty

    def _part(
        self, prompts: Sequence[str], numbers: Sequence[int], before: int, pictures: np.ndarray, place: int
    ) -> dict[str, np.ndarray]:
        """The arrays of one part: `x/EXTRACTOR` of samples, `y/EXTRACTOR` of the reference, `text`, `place`, `prompt`,
        and the pictures that the report shows as `shown/STAGE`."""
        several = self.settings.images_per_prompt
        real = pictures[: max(0, self._reference_count - place)]
        arrays: dict[str, np.ndarray] = {"prompt": np.array(prompts, dtype=str)}
        for extractor in self.extractors:
            none = np.zeros((0, extractor.width), np.float32)
            arrays[f"y/{extractor.name}"] = extractor.pictures(real) if len(real) else none
        if len(real) and self._reference_count * self.size**2 * 3 <= MOST_ORIGINALS:
            arrays["original"] = real
        if not prompts:
            return arrays
        drawings = self._sample(
            [prompt for prompt in prompts for _ in range(several)],
            numbers=[number + i for number in numbers for i in range(several)],
            **self._true_low_res(pictures[: len(prompts)]),
            **self.config.sampler_settings,
        )
        pictures = np.stack([np.asarray(drawing.image) for drawing in drawings])
        arrays["place"] = before + np.repeat(np.arange(len(prompts)), several)
        for extractor in self.extractors:
            arrays[f"x/{extractor.name}"] = extractor.pictures(pictures)
            if extractor.name == self.clip and extractor.texts is not None:
                arrays["text"] = extractor.texts([drawing.prompt for drawing in drawings])
        shown = len(drawings) if self.settings.kind == "shapes" else max(0, report.SHEET_CELLS - before * several)
        for stage in drawings[0].stages if shown else ():
            arrays[f"shown/{stage}"] = np.stack([np.asarray(drawing.stages[stage]) for drawing in drawings[:shown]])
        return arrays

    def _true_low_res(self, pictures: np.ndarray) -> dict[str, Any]:
        """With `evaluation.from_stage` what `Cascade.draw` starts from: block means of the true pictures."""
        if self.settings.from_stage is None:
            return {}
        factor = self.size // self.stages[0].config.low_res_size
        low = [box_average(picture, factor) for picture in pictures for _ in range(self.settings.images_per_prompt)]
        return {"stages": [stage.config.name for stage in self.stages], "low_res": low}

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

    # ------------------------------------------------------------------------------------------------- figures

    def result(self) -> dict[str, Any]:
        """What result.json holds, from all parts; writes samples.png and influences.npz."""
        arrays = self.parts.read()
        samples = {name.removeprefix("x/"): value for name, value in arrays.items() if name.startswith("x/")}
        places = arrays["place"]
        figures = measure.of_samples(samples, places, arrays.get("text"), self.clip)
        reference = self._reference_features(arrays)
        count = len(next(iter(reference.values()))) if reference else 0
        if count:
            figures |= measure.against_reference(samples, reference, self.clip)
        shown = {name.removeprefix("shown/"): value for name, value in arrays.items() if name.startswith("shown/")}
        captions = [str(prompt) for prompt in arrays["prompt"]]
        each = [captions[place] for place in places]
        result: dict[str, Any] = {"format": comparison.FORMAT, "kind": self.settings.kind}
        kept = {f"{metric}.{name}": figure for metric, group in figures.items() for name, figure in group.items()}
        if self.settings.kind == "shapes":
            result |= self._shapes(shown, each, kept, reference)
        else:
            images = _images(shown)
            sheets.save(report.sheet_of_pictures(images, each[: len(images)]), self._output / "samples.png")
        self.sections = self._sections(list(shown.values())[-1], each, samples, kept, arrays)
        floors = result.pop("floors", {})
        for metric, group in figures.items():
            result[metric] = {name: figure.as_dict(places) for name, figure in group.items()}
        for name, entry in result.get("frechet", {}).items():
            entry |= {"floor": floors.get(name), "width": samples[name].shape[1]}
        result["n"] = {
            "samples": len(places),
            "reference": count,
            "prompts": len(captions),
            "broken": self.file.facts["broken"] if self.file else self.source.broken if self.source else 0,
        }
        result["remarks"] = self._remarks(result["n"], {name: value.shape[1] for name, value in samples.items()})
        result["protocol"] = self.protocol | {"prompts": settings_sha256(captions)}
        comparison.write_influences(self._output, kept, places)
        return result

    def _sections(
        self,
        pictures: np.ndarray,
        captions: Sequence[str],
        samples: Mapping[str, np.ndarray],
        kept: Mapping[str, Figure],
        arrays: Mapping[str, np.ndarray],
    ) -> list[page.Section]:
        """The pictures of the page: samples, best and worst by CLIP score, and each beside its nearest reference."""
        pictures = pictures[: report.SHEET_CELLS]
        captions = captions[: len(pictures)]
        sections = [page.samples_section(pictures, captions)]
        score = kept.get(f"clip_score.{self.clip}")
        if score is not None:
            fits = score.samples[: len(pictures)] + score.value
            sections += page.extremes(pictures, captions, fits, "CLIP score")
        name = self.extractors[-1].name
        known = self._reference_features(arrays).get(name, np.zeros((0, 1)))
        shown = arrays.get("original", np.zeros((0,)))
        originals = dict(enumerate(shown))
        sections.append(
            page.nearest_section(pictures, captions, samples[name][: len(pictures)], known, originals, name)
        )
        return sections

    def _reference_features(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.file is not None:
            most = self.settings.reference_samples or len(self.file.captions)
            return {e.name: self.file.features[e.name][:most] for e in self.extractors}
        return {e.name: arrays[f"y/{e.name}"] for e in self.extractors} if self.source is not None else {}

    def _shapes(
        self,
        shown: Mapping[str, np.ndarray],
        captions: Sequence[str],
        kept: dict[str, Figure],
        reference: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        """What the oracle reads, PSNR, and the distances of real drawings of the same captions (`floors`)."""
        specs = [_spec(text) for text in captions]
        stages = list(shown.values())
        first, final = stages[0], stages[-1]
        real = self._real()
        base = [np.asarray(_enlarged(Image.fromarray(picture), self.size)) for picture in first]
        readings, scores = _read_all(final, specs)
        sheets.save(report.sheet_of_shapes(_images(shown), captions, readings, scores), self._output / "samples.png")
        # the same captions drawn again: what a perfect cascade would score
        again = np.stack([render(spec, self.size, AGAIN + index) for index, spec in enumerate(specs)])
        floors = {
            e.name: frechet_distance(Moments.of(e.pictures(again)), Moments.of(reference[e.name]))
            for e in self.extractors
        }
        shares = report.shares(scores)
        kept |= {f"samples.{field}": figure for field, figure in shares.items()}
        restored = self._psnr(real)
        kept |= {f"psnr.stages.{s}.{k}": f for s, found in restored.items() for k, f in found.items()}
        psnrs = {s: {k: f.as_dict() for k, f in found.items()} for s, found in restored.items()}
        return {
            "samples": {field: figure.as_dict() for field, figure in shares.items()},
            "base": {field: f.as_dict() for field, f in report.shares(_read_all(base, specs)[1]).items()},
            "real": {
                field: f.as_dict()
                for field, f in report.shares(_read_all(real.pictures, [_spec(t) for t in real.captions])[1]).items()
            },
            "by_word": {
                field: {word: figure.as_dict() for word, figure in words.items()}
                for field, words in report.shares_by_word(scores, specs).items()
            },
            "psnr": {**list(psnrs.values())[-1], "n": self._psnr_count(real), "stages": psnrs} if psnrs else {},
            "floors": floors,
        }

    def _real(self) -> Real:
        assert self.source is not None
        parts = list(self.source.chunks(PART, self._reference_count))
        return Real(np.concatenate([part.pictures for part in parts]), [c for part in parts for c in part.captions])

    def _psnr_count(self, real: Real) -> int:
        return min(self.settings.psnr_samples, len(real.captions))

    def _psnr(self, real: Real) -> dict[str, dict[str, Figure]]:
        """How well each super-resolution stage restores true pictures from their box-averaged low-res version (dB,
        mean over pictures), without and with the noise that sampling puts on it, and Pillow's bicubic instead."""
        count = self._psnr_count(real)
        stages: dict[str, dict[str, Figure]] = {}
        own = {s.config.name: sampler for s, sampler in zip(self.stages, self.samplers, strict=True)}
        for stage in (s.config for s in self.stages if s.config.is_super_resolution and count):
            truth = [box_average(picture, self.size // stage.image_size) for picture in real.pictures[:count]]
            low = [box_average(picture, stage.image_size // stage.low_res_size) for picture in truth]
            found = {"bicubic": [np.asarray(_enlarged(Image.fromarray(p), stage.image_size)) for p in low]}
            sampler = own[stage.name]
            options = {key: getattr(sampler, key) for key in ("guidance", "steps", "spacing", "threshold")}
            for name, level in (("sr", 0.0), ("sr_noised", sampler.aug_level)):
                drawings = self._sample(
                    real.captions[:count],
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

    # ------------------------------------------------------------------------------------------------ protocol

    def _remarks(self, n: Mapping[str, int], widths: Mapping[str, int]) -> list[str]:
        found = []
        if n["prompts"] < self.settings.samples:
            found.append(f"evaluation.samples={self.settings.samples}: there are only {n['prompts']} captions")
        wanted = self.settings.reference_samples
        if self.settings.kind == "pictures" and wanted > n["reference"]:
            found.append(f"evaluation.reference_samples={wanted}: there are only {n['reference']} pictures")
        if n["broken"]:
            found.append(f"{n['broken']} reference pictures cannot be read and are left out")
        return found + (measure.measurement_remarks(n["samples"], n["reference"], widths) if n["reference"] else [])

    def _protocol(self) -> dict[str, Any]:
        stages = [
            {
                "name": s.config.name,
                "step": s.origin.get("step"),
                "ema_decay": s.origin.get("ema_decay"),
                "sha256": s.sha256,
                "sampler": asdict(sampler),
            }
            for s, sampler in zip(self.stages, self.samplers, strict=True)
        ]
        code = code_version()
        weights = next(self.cascade.stages[0].unet.parameters())
        source = self.file.facts["fingerprint"] if self.file else self.source.fingerprint if self.source else None
        rule = "drawn at this size" if isinstance(self.source, Drawn) else RULE
        return {
            "bundle": self.config.bundle.dir,
            "size": self.size,
            "seed": self.config.seed,
            "images_per_prompt": self.settings.images_per_prompt,
            "from_stage": self.settings.from_stage,
            "reference": self.settings.reference or (source and "held-out drawings made for this evaluation"),
            "reference_fingerprint": source and settings_sha256([source, self.settings.reference_samples]),
            "reference_rule": rule if source else None,
            "sample_format": "8 bits in memory (no file format in between)",
            "extractors": {extractor.name: extractor.describe() for extractor in self.extractors},
            "text": self.cascade.encoder.name,
            "text_sha": self.cascade.text.sha,
            "precision": str(weights.dtype).removeprefix("torch."),
            "device": self.devices[0].partition(":")[0],
            "commit": code["commit"],
            "dirty": code["dirty"],
            "versions": code["versions"],
            "stages": stages,
        }

    def _decides(self) -> dict[str, Any]:
        """What the pictures and features of a part depend on."""
        left_out = ("bundle", "reference", "dirty")
        return {
            **{key: value for key, value in self.protocol.items() if key not in left_out},
            "samples": self.settings.samples,
            "reference_samples": self._reference_count,
            "prompts": settings_sha256(self.prompts),
            "part": PART,
            "kind": self.settings.kind,
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
    readings = [oracle.read_drawing(picture, len(spec.objects)) for picture, spec in zip(pictures, specs, strict=True)]
    return readings, [oracle.score(reading, spec) for reading, spec in zip(readings, specs, strict=True)]


def _images(shown: Mapping[str, np.ndarray]) -> list[list[Image.Image]]:
    """Per picture that of every stage."""
    return [[Image.fromarray(picture) for picture in pictures] for pictures in zip(*shown.values(), strict=True)]


def _enlarged(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)
