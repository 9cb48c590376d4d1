"""One evaluation of one cascade: draws the prompts in parts, extracts features and answers, and computes figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.progress import progress
from data_pipeline.content.images import box_average
from training.cascade.cascade import Cascade
from training.cascade.prompts import read_categories, read_lines, read_prompts
from training.cascade.requests import Drawing, plan_stages
from training.checkpoint.provenance import code_version
from training.config.commands import EvaluateCommand
from training.evaluation import comparison, copies, measure, page, report, shown
from training.evaluation.extractors.answers import Answerer
from training.evaluation.extractors.base import Extractor
from training.evaluation.metrics.figure import Figure
from training.evaluation.metrics.rows import FeatureRows
from training.evaluation.parts import Parts, settings_sha256
from training.evaluation.references import RULE, SUFFIX, Real, ReferenceFile, References
from training.pictures import sheets

PART = 256
"""Captions to draw, and reference pictures to read, per part."""
MOST_ORIGINALS = 256 << 20
"""Maximum bytes of reference pictures to keep for the page."""


class Evaluation:
    """One evaluation of one cascade whose pictures no oracle can read.

    Raises:
        ConfigError, DataError: the settings cannot be evaluated; raised before anything is drawn.
    """

    def __init__(
        self,
        config: EvaluateCommand,
        cascade: Cascade,
        devices: list[str],
        extractors: Sequence[Extractor],
        answerer: Answerer | None = None,
    ) -> None:
        self.config, self.cascade, self.devices, self.extractors = config, cascade, devices, extractors
        self.answerer = answerer
        self.settings = config.evaluation
        self.size = cascade.stages[-1].config.image_size
        self.clip = next((e.name for e in extractors if e.texts is not None), "")
        self.dino = next((name for name, c in self.settings.extractors.items() if c.kind == "dinov2"), "")
        self.stages = cascade.stages[self._first_stage() :]
        names = [stage.config.name for stage in self.stages]
        plan = plan_stages([stage.config for stage in cascade.stages], names, **config.sampler_settings)
        self.samplers = [sampler for _, sampler in plan]
        given = self.settings.prompts
        self.prompts = read_prompts(given, "evaluation.prompts")
        if given and len(self.prompts) < 2:
            raise ConfigError(
                f"evaluation.prompts={given}: it has {len(self.prompts) or 'no'} prompt; give at least two"
            )
        self.categories = read_categories(given, "evaluation.prompts")
        self.lines = read_lines(given, "evaluation.prompts")
        asked = sum("vqa_list" in line for line in self.lines)
        if asked not in (0, len(self.lines)):
            raise ConfigError(
                f"evaluation.prompts={given}: {asked} of {len(self.lines)} lines have a vqa_list; all lines or "
                "none must have one"
            )
        self.source: Any = None
        self.file: ReferenceFile | None = None
        self._open_reference()
        self.training = self._open_training()
        self.chosen = set(
            shown.choose_places(self.categories, min(self.settings.samples, len(self.prompts) or 1 << 40))
        )
        self.cut = 0
        """Number of captions that the text encoder truncates."""
        self.sections: list[page.Section] = []
        """Picture sections of the page, set by `result`."""
        self.protocol = self._protocol()
        self.parts = Parts(self._output, self._decides(), self._part_count())

    def _first_stage(self) -> int:
        """Return the index of `evaluation.from_stage`, or 0."""
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
                f"evaluation.from_stage={wanted}: it starts from reference pictures; set evaluation.reference to "
                "shards, and leave out evaluation.prompts"
            )
        return names.index(wanted)

    def _open_reference(self) -> None:
        reference = self.settings.reference
        if isinstance(reference, str) and reference.endswith(SUFFIX):
            self.file = ReferenceFile.read(reference)
            self.file.check(self.size, self.extractors, reference)
            self.prompts = self.prompts or list(self.file.captions)
        elif reference:
            self.source = References(reference, self.config.data, self.size, self.config.seed)
        elif not self.prompts:
            raise ConfigError("evaluation.reference: set it to held-out shards, for example data/heldout")

    def _open_training(self) -> References | None:
        shards = self.settings.training
        if not shards:
            return None
        found = References(shards, self.config.data, self.size, self.config.seed, key=copies.KEY)
        found.check()  # they are only read after all drawing is done
        return found

    @property
    def _output(self) -> Path:
        return Path(self.settings.output)

    @property
    def _reference_count(self) -> int:
        """Number of reference pictures to read."""
        if self.source is None:
            return 0
        return min(self.source.count, self.settings.reference_samples or self.settings.samples)

    def _part_count(self) -> int:
        drawn = min(self.settings.samples, len(self.prompts)) if self.prompts else 0
        read = max(self._reference_count, 0 if self.prompts or self.source is None else self._most_read())
        return -(-max(drawn, read) // PART)

    def _most_read(self) -> int:
        assert self.source is not None
        return min(self.source.count, max(self.settings.samples, self._reference_count))

    def check_prompt(self, prompt: str) -> None:
        """Raise ConfigError for a prompt that cannot be evaluated; here, all can."""

    # ------------------------------------------------------------------------------------------------ drawing

    def draw(self, rank: int = 0, world_size: int = 1) -> None:
        """Draw and measure this rank's share of the missing parts."""
        counts: Counter[str] = Counter()
        sampled = seen = 0
        for number, real in enumerate(self._chunks()):
            given = self.prompts[number * PART :] if self.prompts else real.captions
            prompts = given[: min(PART, self.settings.samples - sampled)]
            numbers = []
            for prompt in prompts:
                self.check_prompt(prompt)
                self.cut += self.cascade.encoder.is_cut(prompt)
                numbers.append(counts[prompt])
                counts[prompt] += self.settings.images_per_prompt
            if number % world_size == rank and not self.parts.done(number):
                self.parts.write(number, self._part(prompts, numbers, sampled, real.pictures, number * PART))
            sampled += len(prompts)
            seen = number + 1
        self.parts.count = seen

    def _chunks(self) -> Iterator[Real]:
        """Yield the reference pictures of each part; empty ones for parts that only have prompts."""
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
        """Draw one part and return its arrays: `x/EXTRACTOR` features of samples, `y/EXTRACTOR` features of the
        reference, `text`, `place`, `prompt`, `answers/SCORE/STAGE`, and the pictures for the report as `shown/STAGE`,
        with their sample numbers `shown_at`."""
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
            sum(sampler.steps for sampler in self.samplers),
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
        arrays |= self._answers(drawings, arrays["place"])
        rows = self._rows_to_show(arrays)
        arrays["shown_at"] = before * several + np.array(rows, dtype=np.int64)
        for stage in drawings[0].stages if rows else ():
            arrays[f"shown/{stage}"] = np.stack([np.asarray(drawings[row].stages[stage]) for row in rows])
        return arrays

    def _answers(self, drawings: Sequence[Drawing], places: np.ndarray) -> dict[str, np.ndarray]:
        """Return `answers/vqa/STAGE` (N,) and, if the prompt file has questions, `answers/tifa/STAGE` (N, K), padded
        with NaN."""
        if self.answerer is None:
            return {}
        found: dict[str, np.ndarray] = {}
        asked = [self.lines[place].get("vqa_list", []) for place in places] if self.lines else []
        most = max((len(line.get("vqa_list", [])) for line in self.lines), default=0)
        for stage in drawings[0].stages:
            pictures = [np.asarray(drawing.stages[stage]) for drawing in drawings]
            found[f"answers/vqa/{stage}"] = self.answerer.vqa_scores(pictures, [d.prompt for d in drawings])
            if most:
                chances = self.answerer.soft_tifa(pictures, asked)
                wide = np.full((len(chances), most), np.nan)
                wide[:, : chances.shape[1]] = chances
                found[f"answers/tifa/{stage}"] = wide
        return found

    def _rows_to_show(self, arrays: Mapping[str, np.ndarray]) -> list[int]:
        """Return the rows of a part to show: those of the chosen prompts, and the best and worst by score."""
        rows = {row for row, place in enumerate(arrays["place"]) if int(place) in self.chosen}
        scores = self._scores(arrays)
        if scores is not None:
            best, worst = shown.best_and_worst(scores)
            rows |= {*best, *worst}
        return sorted(rows)

    def _scores(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Return how well each final picture matches its caption, (N,): VQAScore, otherwise CLIP score; None without
        either."""
        final = f"answers/vqa/{self.stages[-1].config.name}"
        if final in arrays:
            return arrays[final]
        return measure.cosines(arrays[f"x/{self.clip}"], arrays["text"]) if "text" in arrays else None

    def _true_low_res(self, pictures: np.ndarray) -> dict[str, Any]:
        """Return the arguments of `Cascade.draw` for `evaluation.from_stage`: block means of the true pictures to start
        from; empty without it."""
        if self.settings.from_stage is None:
            return {}
        factor = self.size // self.stages[0].config.low_res_size
        low = [box_average(picture, factor) for picture in pictures for _ in range(self.settings.images_per_prompt)]
        return {"stages": [stage.config.name for stage in self.stages], "low_res": low}

    def _sample(self, prompts: Sequence[str], each: int, title: str = "sampling", **options: Any) -> list[Drawing]:
        """Draw with a progress bar over sampler steps, `each` per batch."""
        with progress(total=each * -(-len(prompts) // self.settings.batch), unit="step", desc=title) as bar:

            def advance(stage: str, done: int, of: int) -> None:
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
        """Compute the content of result.json from all parts; write samples.png, shown.npz and influences.npz."""
        arrays = self.parts.read()
        samples = {name.removeprefix("x/"): value for name, value in arrays.items() if name.startswith("x/")}
        places = arrays["place"]
        figures = measure.of_samples(samples, places, arrays.get("text"), self.clip)
        reference = self._reference_features(arrays)
        count = len(next(iter(reference.values()))) if reference else 0
        if count:
            figures |= measure.against_reference(samples, reference, self.clip, self.dino, places)
        figures |= measure.of_answers(arrays, [self.lines[place] for place in places] if self.lines else [])
        captions = [str(prompt) for prompt in arrays["prompt"]]
        each = [captions[place] for place in places]
        found = self._find_copies(samples, arrays["shown_at"])
        if found is not None:
            figures["copies"] = {self._sees_copies.name: found.figure}
        result: dict[str, Any] = {"format": comparison.FORMAT, "kind": self.settings.kind}
        kept = {f"{metric}.{name}": figure for metric, group in figures.items() for name, figure in group.items()}
        result |= self.judged(arrays, each, kept, reference)
        self._keep_shown(arrays, each)
        self.sections = self._sections(arrays, each, samples, found)
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
        if found is not None and self.training is not None:
            result["protocol"]["training"] = copies.describe_copies(
                found, self.settings.training, self.training.fingerprint
            )
        comparison.write_influences(self._output, kept, places)
        return result

    def judged(
        self,
        arrays: Mapping[str, np.ndarray],
        captions: Sequence[str],
        kept: dict[str, Figure],
        reference: Mapping[str, FeatureRows],
    ) -> dict[str, Any]:
        """Return what only this kind of evaluation adds to the result; write samples.png, and add figures to `kept`."""
        pictures, at = self._of_chosen(arrays)
        true: Any = () if self.prompts else arrays.get("original", ())
        places = [int(arrays["place"][i]) for i in at]
        beside = {i: Image.fromarray(true[place]) for i, place in enumerate(places) if place < len(true)}
        sheet = report.sheet_of_pictures(ImagesOf(pictures), [captions[i] for i in at], beside)
        sheets.save(sheet, self._output / "samples.png")
        return {}

    def _of_chosen(self, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[int]]:
        """Return the pictures of the chosen prompts by stage, and their sample numbers; at most as many as fit a
        sheet."""
        rows = [row for row, at in enumerate(arrays["shown_at"]) if int(arrays["place"][at]) in self.chosen]
        rows = rows[: shown.CELLS]
        pictures = {n.removeprefix("shown/"): v[rows] for n, v in arrays.items() if n.startswith("shown/")}
        return pictures, [int(arrays["shown_at"][row]) for row in rows]

    def _category(self, place: int) -> str:
        return self.categories[place] if self.categories else ""

    def _keep_shown(self, arrays: Mapping[str, np.ndarray], captions: Sequence[str]) -> None:
        """Write shown.npz, the source of the page over all checkpoints."""
        pictures, at = self._of_chosen(arrays)
        final, scores = list(pictures.values())[-1], self._scores(arrays)
        shown.Shown(
            picture=page.reduced(final),
            prompt=np.array([captions[i] for i in at], dtype=str),
            category=np.array([self._category(int(arrays["place"][i])) for i in at], dtype=str),
            chosen=np.ones(len(at), dtype=bool),
            score=np.full(len(at), np.nan) if scores is None else scores[at],
        ).write(self._output)

    def _find_copies(self, samples: Mapping[str, FeatureRows], shown_at: np.ndarray) -> copies.Copies | None:
        """Find the nearest training pictures; None without `evaluation.training`."""
        if self.training is None:
            return None
        extractor = self._sees_copies
        rows = [int(at) for at in shown_at]
        return copies.find_copies(
            samples[extractor.name], rows, extractor, self.training, self.settings.training_samples, self._output
        )

    @property
    def _sees_copies(self) -> Extractor:
        """The extractor for finding copies: the last network, or without one the colours, which are less sensitive to
        noise than edges."""
        return self.extractors[-1] if self.extractors[-1].sha256 else self.extractors[0]

    def _sections(
        self,
        arrays: Mapping[str, np.ndarray],
        captions: Sequence[str],
        samples: Mapping[str, FeatureRows],
        found: copies.Copies | None,
    ) -> list[page.Section]:
        """Return the picture sections of the page: samples by category, best and worst by score, and each sample next
        to its nearest training picture (without `evaluation.training`: reference picture)."""
        chosen, at = self._of_chosen(arrays)
        final = list(chosen.values())[-1]
        texts = [captions[i] for i in at]
        sections = page.category_sections(final, texts, [self._category(int(arrays["place"][i])) for i in at])
        scores = self._scores(arrays)
        pictures = arrays[f"shown/{list(chosen)[-1]}"]
        if scores is not None:
            shown_at = arrays["shown_at"]
            title = "VQAScore" if self.answerer else "CLIP score"
            sections += page.extremes(pictures, [captions[i] for i in shown_at], scores[shown_at], title)
        if found is not None:
            name, near = self._sees_copies.name, (found.distance[at], found.place[at], found.pictures)
            return [*sections, page.copies_section(final, texts, *near, name, "training")]
        name = self.extractors[-1].name
        known = self._reference_features(arrays).get(name, np.zeros((0, 1)))
        originals = arrays.get("original", ())
        return [*sections, page.nearest_section(final, texts, samples[name][at], known, originals, name)]

    def _reference_features(self, arrays: Mapping[str, Any]) -> dict[str, FeatureRows]:
        if self.file is not None:
            most = self.settings.reference_samples or len(self.file.captions)
            return {e.name: self.file.features[e.name].first(most) for e in self.extractors}
        return {e.name: arrays[f"y/{e.name}"] for e in self.extractors} if self.source is not None else {}

    # ------------------------------------------------------------------------------------------------ protocol

    def _remarks(self, n: Mapping[str, int], widths: Mapping[str, int]) -> list[str]:
        found = []
        if n["prompts"] < self.settings.samples:
            what, source = ("prompts", "prompts") if self.settings.prompts else ("captions", "reference")
            held = "" if self.settings.prompts else "held-out "
            found.append(
                f"evaluation.samples={self.settings.samples} asks for more {what} than the {n['prompts']} in "
                f"{getattr(self.settings, source)}: all {n['prompts']} were used; more {held}{what} would narrow the "
                "intervals"
            )
        wanted = self.settings.reference_samples
        if self.settings.kind == "pictures" and wanted > n["reference"]:
            found.append(f"evaluation.reference_samples={wanted}, but there are only {n['reference']} pictures")
        if self.cut:
            most = self.cascade.encoder.max_tokens
            found.append(
                f"{self.cut} caption{'s are' if self.cut > 1 else ' is'} truncated to {most} tokens (text.max_tokens)"
            )
        if learnt := self._learnt_from_reference():
            found.append(
                f"evaluation.reference={self.settings.reference} is what {' and '.join(learnt)} learnt from: such "
                "figures are better the more a model copies; use held-out pictures"
            )
        if n["broken"]:
            ending, were = ("", "was") if n["broken"] == 1 else ("s", "were")
            found.append(f"{n['broken']} reference picture{ending} could not be read and {were} skipped")
        return found + (measure.measurement_remarks(n["samples"], n["reference"], widths) if n["reference"] else [])

    def _learnt_from_reference(self) -> list[str]:
        """Return the names of the stages whose training shards, if no filter chose among them, are the reference."""
        whole = self.file.facts["fingerprint"] if self.file else self.source.fingerprint if self.source else ""
        return [s.config.name for s in self.stages if s.origin.get("data") == whole.partition(":")[0] != ""]

    @property
    def reference_rule(self) -> str:
        """How the reference pictures were made."""
        return RULE

    def _protocol(self) -> dict[str, Any]:
        stages = [
            {
                "name": s.config.name,
                "run": s.origin.get("run"),
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
        judges: list[Any] = [*self.extractors, *([self.answerer] if self.answerer else [])]
        return {
            "bundle": self.config.bundle.dir,
            "size": self.size,
            "seed": self.config.seed,
            "images_per_prompt": self.settings.images_per_prompt,
            "from_stage": self.settings.from_stage,
            "reference": self.settings.reference or (source and "held-out drawings made for this evaluation"),
            "reference_fingerprint": source and settings_sha256([source, self.settings.reference_samples]),
            "reference_rule": self.reference_rule if source else None,
            "sample_format": "8 bits in memory (no file format in between)",
            "extractors": {judge.name: judge.describe() for judge in judges},
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
        """Return everything that the pictures and features of a part depend on."""
        left_out = ("bundle", "reference", "dirty")
        return {
            **{key: value for key, value in self.protocol.items() if key not in left_out},
            "stages": [{key: value for key, value in s.items() if key != "run"} for s in self.protocol["stages"]],
            "samples": self.settings.samples,
            "reference_samples": self._reference_count,
            "prompts": settings_sha256([self.prompts, self.lines, sorted(self.chosen)]),
            "part": PART,
            "kind": self.settings.kind,
        }


class ImagesOf(Sequence[list[Image.Image]]):
    """For each sample, the picture of every stage, converted to PIL on access."""

    def __init__(self, pictures: Mapping[str, Any]) -> None:
        self.stages = list(pictures.values())

    def __len__(self) -> int:
        return len(self.stages[0])

    def __getitem__(self, which: Any) -> Any:
        return [Image.fromarray(stage[which]) for stage in self.stages]
