"""`cascade sample`: draws prompts with a bundle. Repeating the command only draws what is missing.

OUTPUT/
    00000-a_red_circle.png          the final picture, with prompt, seed and settings in its PNG text
    STAGE/00000-a_red_circle.png    the output of an earlier stage
    words/00000-a_red_circle.png    explain=true: heat maps of the attention to each word
    sheet/grid.png                  the first pictures with their captions, all stages side by side
    earlier/                        pictures of prompts that are no longer on the list
    LAYOUT/                         layout=geneval and others: the pictures in the layout of another tool
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from data_pipeline.common.errors import ConfigError, DataError, about
from data_pipeline.common.machine import usable_cores
from data_pipeline.common.progress import progress
from data_pipeline.storage import store
from training.cascade.bundle import refuse_bundle
from training.cascade.cascade import Cascade, Stage
from training.cascade.prompts import read_lines, read_prompts
from training.cascade.requests import (
    DAMAGED,
    Drawing,
    as_list,
    number_drawings,
    opened,
    plan_sizes,
    plan_stages,
    stored,
)
from training.cli.typed import command_for
from training.commands import layouts
from training.config.commands import SampleCommand
from training.config.experiment import Experiment
from training.engine.base import DTYPES
from training.evaluation.metrics.features import colour_grid, diversity
from training.pictures.credentials import Credentials
from training.pictures.sheets import Cell, capacity, heat_sheet, save, sheet
from training.processes.devices import own_device
from training.processes.ranks import read_ranks
from training.run.directory import leaving_nothing_empty, try_to_write

SAVE_EVERY = 4
"""Batches per device after which pictures are written, so that an interruption loses no more than these."""
GRID_CELLS = 64
EARLIER = "earlier"
"""Directory for pictures of prompts that are no longer on the list."""
SHEET = "sheet"
DIVERSITY_FEATURES = "colour_grid_4x4"


@dataclass(frozen=True)
class SampleJob:
    """One picture to draw."""

    name: str
    """Name of its files, without extension."""
    prompt: str
    negative_prompt: str
    number: int
    """How many pictures of the same prompt come before it."""
    seed: int
    """Seed of its noise."""
    place: int
    """Index of its prompt."""


def main(config: SampleCommand) -> dict[str, Any]:
    """Draw `prompts` (or the experiment's); write the pictures and the grid, and keep pictures that already exist.

    Returns:
        `output`, `images` (file, prompt and seed of this process's share), counts `drawn` and `kept`, `seconds` and,
        once all pictures exist, `grid`, `diversity` and `layout`.
    """
    if config.batch < 1:
        raise ConfigError(f"batch={config.batch}: it must be at least 1")
    output = Path(config.output or config.sampling.output)
    with leaving_nothing_empty(output):
        return _sample(config, output)


def _sample(config: SampleCommand, output: Path) -> dict[str, Any]:
    began = time.monotonic()
    refuse_bundle(output, "output")
    prompts, lines = _prompts(config), read_lines(config.prompts)
    try_to_write(output, "output")
    negatives = read_prompts(config.negative_prompts, "negative_prompts", keep_blank=True)
    jobs = list_jobs(prompts, negatives, config.seed, config.num_images)
    credentials = None
    if config.sampling.certificate and config.sampling.key:
        credentials = Credentials(config.sampling.certificate, config.sampling.key)
    if config.layout:
        layouts.check_layout(config.layout, prompts, config.num_images, lines)
    starts = read_starts(config, len(prompts))
    cascade, devices = open_cascade(config, config.from_bundle)
    print(f"text encoder: {cascade.encoder.name}")
    if long := [prompt for prompt in prompts if cascade.encoder.is_cut(prompt)]:
        most = cascade.encoder.max_tokens
        print(
            f"{len(long)} of {len(prompts)} prompts are longer than the {most} tokens that the bundle's text encoder "
            f"reads, and are cut: {long[0][:60]!r}"
        )
    request = SampleRequest(config, cascade, starts, credentials)
    ranks = read_ranks()
    if ranks is None or ranks.is_main:
        set_aside(output, {job.name for job in jobs})
    share = jobs[ranks.rank :: ranks.world_size] if ranks else jobs
    missing = [job for job in share if not is_drawn(output, job, request)]
    _say_kept(output, len(share), missing, request)
    _draw(request, missing, output, devices)
    result: dict[str, Any] = {
        "output": str(output),
        "images": [{"file": f"{job.name}.png", "prompt": job.prompt, "seed": job.seed} for job in share],
        "drawn": len(missing),
        "kept": len(share) - len(missing),
    }
    # with several processes, only the last one to finish finds all pictures
    if all((output / f"{job.name}.png").exists() for job in jobs):
        result |= _together(config, output, jobs, request.stages, prompts, lines)
        if config.prompts is None and not config.from_bundle:
            print(f"next: {command_for('evaluate', config)}")
    return result | {"seconds": round(time.monotonic() - began, 3)}


def _prompts(config: SampleCommand) -> list[str]:
    """Return `prompts`, or the experiment's own. Raises ConfigError if there are none."""
    own = config.prompts is None
    prompts = read_prompts(list(config.sampling.prompts), "sampling.prompts") if own else read_prompts(config.prompts)
    if not prompts:
        given = "prompts: " if own else f"prompts={config.prompts}: it contains no prompt; "
        raise ConfigError(f"{given}give a text file with one prompt per line, or a list: prompts=['a red circle']")
    return prompts


def _say_kept(output: Path, count: int, missing: Sequence[SampleJob], request: SampleRequest) -> None:
    """Say how many of `count` pictures are kept, and why existing ones are drawn again."""
    if len(missing) < count:
        print(f"{count - len(missing)} of {count} pictures are already in {output} and are kept")
    changed = [keys for job in missing if (keys := changed_settings(output / f"{job.name}.png", request.metadata(job)))]
    if changed:
        print(f"pictures in {output} with other settings ({', '.join(changed[0])}), drawn again: {len(changed)}")


def _together(
    config: SampleCommand,
    output: Path,
    jobs: list[SampleJob],
    stages: Sequence[Stage],
    prompts: list[str],
    lines: list[dict[str, Any]],
) -> dict[str, Any]:
    """Write and measure what needs all pictures; return `grid`, `diversity` and `layout` of the result."""
    columns = config.sampling.columns
    found: dict[str, Any] = {"grid": str(write_grid(output, jobs, stages, columns))}
    print(f"{output}: {len(jobs)} picture{'s' * (len(jobs) > 1)}")
    print(f"{found['grid']}: {len(_on_grid(jobs, columns))} of {len(jobs)} pictures")
    if len({job.prompt for job in jobs}) < len(jobs):
        found["diversity"] = measure_diversity(output, jobs)
        print(f"diversity ({DIVERSITY_FEATURES}, mean pairwise distance): {found['diversity']['mean']:.4f}")
    if config.layout:
        files = [output / f"{job.name}.png" for job in jobs]
        each = [files[at : at + config.num_images] for at in range(0, len(files), config.num_images)]
        found["layout"] = str(layouts.arrange(config.layout, output, each, prompts, lines))
        print(f"{found['layout']}: the pictures in the layout of {config.layout}")
    return found


def set_aside(output: Path, names: set[str]) -> None:
    """Move pictures of an earlier list of prompts to OUTPUT/earlier, so that other tools only read this list's samples.
    Pictures that this command did not make stay where they are."""
    moved = 0
    for file in sorted([*output.glob("*.png"), *output.glob("*/*.png")]):
        inside = file.relative_to(output)
        if file.stem in names or inside.parts[0] in (EARLIER, *layouts.LAYOUTS) or not _is_ours(file):
            continue
        target = output / EARLIER / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
        moved += inside.parent == Path()
    if moved:
        print(f"{moved} pictures of other prompts were moved from {output} to {output / EARLIER}")


def _is_ours(file: Path) -> bool:
    try:
        with stored(file) as image:
            return {"prompt", "number", "settings"} <= set(image.info)
    except DAMAGED:
        return False


def list_jobs(prompts: list[str], negatives: list[str], seed: int, num_images: int) -> list[SampleJob]:
    """Return the pictures to draw, `num_images` per prompt, named by the prompt's index and words.

    Raises:
        ConfigError: the number of negative prompts is not 0, 1 or the number of prompts.
    """
    jobs = []
    for index, drawing in enumerate(number_drawings(prompts, negatives, seed, num_images)):
        place, copy = divmod(index, num_images)
        words = re.sub(r"\W+", "_", drawing.prompt).strip("_")[:50] or "empty"
        name = f"{place:05d}-{words}{f'-{copy}' if num_images > 1 else ''}"
        jobs.append(SampleJob(name, drawing.prompt, drawing.negative_prompt, drawing.number, drawing.seed, place))
    return jobs


def open_cascade(config: Experiment, path: str | None = None) -> tuple[Cascade, list[str]]:
    """Open the bundle of an experiment (or the one at `path`); return it with the devices to draw on: all GPUs, this
    process's GPU if there are several processes, or the CPU."""
    return place_cascade(config, Cascade.from_pretrained(path or config.bundle.dir, config.bundle.text_path))


def place_cascade(config: Experiment, cascade: Cascade) -> tuple[Cascade, list[str]]:
    """Return the cascade, in the precision of `precision.dtype` on a GPU, and the devices to draw on."""
    ranks = read_ranks()
    own = own_device(config.cluster, *((ranks.rank, ranks.local_rank) if ranks else (0, 0)))
    if own == "cpu":
        if config.cluster.threads or not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(config.cluster.threads or min(torch.get_num_threads(), usable_cores()))
        return cascade, [own]
    dtype = DTYPES[config.precision.dtype]
    devices = [own] if ranks else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return cascade.to(devices[0], dtype), devices


# --------------------------------------------------------------------------------------------------- drawing


class SampleRequest:
    """Everything that a picture depends on besides its prompt and number."""

    def __init__(
        self,
        config: SampleCommand,
        cascade: Cascade,
        starts: dict[str, list[Start]],
        credentials: Credentials | None = None,
    ) -> None:
        self.config, self.cascade, self.starts, self.credentials = config, cascade, starts, credentials
        self.options = config.sampler_settings | {"stages": config.stages}
        plan = plan_stages([stage.config for stage in cascade.stages], config.stages, **config.sampler_settings)
        self.stages = [cascade.stages[index] for index, _ in plan]
        self.samplers = [sampler for _, sampler in plan]
        self.options["strength"] = config.strength
        self.options["size"] = config.size
        divisors = [stage.unet.config.divisor for stage in self.stages]
        self.sizes = plan_sizes(config.size, [stage.config for stage in self.stages], divisors)
        self.settings = self._settings()

    def _settings(self) -> dict[str, Any]:
        stages = [
            {"name": s.config.name, "sha256": s.sha256, "step": s.origin.get("step"), "sampler": asdict(sampler)}
            for s, sampler in zip(self.stages, self.samplers, strict=True)
        ]
        weights = next(self.stages[0].unet.parameters())
        shape = {} if self.config.size is None else {"size": list(self.sizes[-1])}
        return {
            **shape,
            "seed": self.config.seed,
            "stages": stages,
            "text": self.cascade.text.sha or self.cascade.encoder.name,
            "dtype": str(weights.dtype).removeprefix("torch."),
            **({"certificate": self.credentials.fingerprint} if self.credentials else {}),
        }

    def metadata(self, job: SampleJob) -> dict[str, str]:
        """Return the text to store in the PNG of a picture."""
        settings = dict(self.settings)
        if self.starts:
            settings["strength"] = self.config.strength
            settings |= {
                key: {"file": s[job.place].file, "sha256": s[job.place].sha256} for key, s in self.starts.items()
            }
        return {
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "seed": str(self.config.seed),
            "number": str(job.number),
            "settings": json.dumps(settings, ensure_ascii=False, sort_keys=True),
        }


@dataclass(frozen=True)
class Start:
    """A picture to start from, or a mask."""

    file: str
    sha256: str
    image: Image.Image


def read_starts(config: SampleCommand, prompts: int) -> dict[str, list[Start]]:
    """Read the pictures that `low_res`, `image` and `mask` name, one per prompt.

    Raises:
        ConfigError: the number of files is neither 1 nor the number of prompts.
        DataError: a file is missing or not a picture.
    """
    found = {}
    for key in ("low_res", "image", "mask"):
        given = getattr(config, key)
        if given is None:
            continue
        files = [str(file) for file in (as_list(given, prompts, key))]
        read = {file: _read_start(key, file) for file in set(files)}
        found[key] = [read[file] for file in files]
    return found


def _read_start(key: str, file: str) -> Start:
    if not store.exists(file):
        raise DataError(f"{key}={file}: no such file")
    with about(key):
        data = store.read_bytes(file)
    return Start(file, sha256(data).hexdigest(), opened(data, f"{key}={file}"))


def is_drawn(output: Path, job: SampleJob, request: SampleRequest) -> bool:
    """Return whether the picture and the files that belong to it exist, are complete, and were made with exactly these
    settings."""
    files = [output / stage.config.name / f"{job.name}.png" for stage in request.stages[:-1]]
    files += [output / "words" / f"{job.name}.png"] if request.config.explain else []
    wanted = request.metadata(job)
    try:
        for file in [*files, output / f"{job.name}.png"]:
            with stored(file) as image:
                image.load()
                if {key: image.info.get(key) for key in wanted} != wanted:
                    return False
    except DAMAGED:
        return False
    return True


def changed_settings(file: Path, wanted: dict[str, str]) -> list[str]:
    """Return the names of the settings with which an existing picture was not made; empty if it does not exist, or was
    not made by this command."""
    try:
        with stored(file) as image:
            before = {key: image.info[key] for key in wanted}
        old, new = ({**one, **json.loads(one["settings"]), "settings": None} for one in (before, wanted))
    except (*DAMAGED, KeyError):
        return []
    return sorted({key for key in {*old, *new} if old.get(key) != new.get(key)})


def _draw(request: SampleRequest, jobs: list[SampleJob], output: Path, devices: list[str]) -> None:
    config = request.config
    chunk = config.batch * SAVE_EVERY * len(devices)
    parts = [jobs[at : at + chunk] for at in range(0, len(jobs), chunk)]
    steps = sum(sampler.steps for sampler in request.samplers)
    total = sum(steps * -(-len(part) // config.batch) for part in parts)
    with progress(total=total, desc="sampling", unit="step", disable=not jobs) as bar:

        def advance(stage: str, done: int, of: int) -> None:
            bar.set_description(f"sampling {stage}", refresh=False)
            bar.update()

        for part in parts:
            starts: dict[str, Any] = {
                key: [some[job.place].image for job in part] for key, some in request.starts.items()
            }
            drawings = request.cascade.draw(
                [job.prompt for job in part],
                [job.negative_prompt for job in part],
                seed=config.seed,
                numbers=[job.number for job in part],
                batch=config.batch,
                devices=devices,
                explain=config.explain,
                callback=advance,
                **request.options,
                **starts,
            )
            for job, drawing in zip(part, drawings, strict=True):
                write_drawing(output, job, drawing, request.metadata(job), config.explain, request.credentials)


def write_drawing(
    output: Path,
    job: SampleJob,
    drawing: Drawing,
    text: dict[str, str],
    explain: bool = False,
    credentials: Credentials | None = None,
) -> None:
    """Write the pictures of all stages, the final one last, since its existence means that the others exist. Only the
    final one is signed.

    Args:
        text: the text to store in each PNG.
        explain: also write the heat maps of the words.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    *earlier, final = drawing.stages
    for stage in earlier:
        save(drawing.stages[stage], output / stage / f"{job.name}.png", pnginfo=info)
    if explain:
        stage, heat = next(iter(drawing.words.items()), ("none", []))
        title = f"attention of stage {stage}: {job.prompt}"
        save(heat_sheet(drawing.image, heat, title), output / "words" / f"{job.name}.png", pnginfo=info)
    sign = credentials.sign if credentials else None
    save(drawing.stages[final], output / f"{job.name}.png", pnginfo=info, sign=sign)


# ----------------------------------------------------------------------------------------- all pictures together


def write_grid(output: Path, jobs: list[SampleJob], stages: Sequence[Stage], columns: int) -> Path:
    """Write sheet/grid.png, the stages of the first pictures side by side, base first; return its path. It has its own
    directory because other tools read every PNG next to the samples as a sample."""
    earlier = [stage.config.name for stage in stages[:-1]]
    labels = [f"{stage.config.image_size} px" for stage in stages]
    cells = []
    for job in _on_grid(jobs, columns):
        files = [*(output / stage / f"{job.name}.png" for stage in earlier), output / f"{job.name}.png"]
        cells.append(Cell([_open(file) for file in files], job.prompt, labels))
    file = output / SHEET / "grid.png"
    file.parent.mkdir(exist_ok=True)
    title = f"the first {len(cells)} of {len(jobs)} pictures" if len(cells) < len(jobs) else ""
    save(sheet(cells, columns, title), file)
    (output / file.name).unlink(missing_ok=True)  # where earlier versions wrote it
    return file


def _on_grid(jobs: list[SampleJob], columns: int) -> list[SampleJob]:
    return jobs[: min(GRID_CELLS, capacity(columns))]


def _open(file: Path) -> Image.Image:
    try:
        with stored(file) as image:
            return image.convert("RGB")
    except DAMAGED as error:
        raise DataError(f"{file}: cannot be read ({error}); delete it and repeat the command") from error


def measure_diversity(output: Path, jobs: list[SampleJob]) -> dict[str, Any]:
    """Return the mean pairwise distance between the pictures of each prompt that has several, and its mean over these
    prompts."""
    by_prompt: dict[str, list[SampleJob]] = {}
    for job in jobs:
        by_prompt.setdefault(job.prompt, []).append(job)
    found = {}
    for prompt, some in by_prompt.items():
        if len(some) < 2:
            continue
        pictures = np.stack([np.asarray(_open(output / f"{job.name}.png")) for job in some])
        found[prompt] = round(diversity(colour_grid(pictures)), 6)
    mean = sum(found.values()) / len(found)
    return {"features": DIVERSITY_FEATURES, "mean": round(mean, 6), "prompts": found}
