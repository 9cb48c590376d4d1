"""A finished cascade: from captions to pictures in three lines.

    from training.cascade import Cascade
    cascade = Cascade.from_pretrained("runs/demo/bundle")
    images = cascade.generate(["a small red circle on a white background"], seed=0)

A picture is a function of (seed, prompt, number of earlier occurrences of the prompt, settings): other prompts, the
batch and the number of devices do not change it, beyond rounding. Between stages a picture is rounded to 8 bits, like
the low-res pictures of training; `sample_stage` then up-samples and noises it exactly as training does.
"""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import ConfigError, DataError, of_file
from data_pipeline.storage.retry import describe_error
from training.cascade import bundle
from training.cascade.names import CALL, METHODS, named_as, refuse_call, refuse_generate, refuse_loading, size_of
from training.cascade.requests import (
    SHRINK,
    Drawing,
    Heat,
    Images,
    Pictures,
    Words,
    as_list,
    as_plain,
    as_texts,
    check_distilled,
    check_start,
    number_drawings,
    place_of,
    plan_places,
    plan_sizes,
    plan_stages,
    plan_strengths,
    seeds_of,
    to_images,
    to_masks,
    to_pictures,
    to_uint8,
)
from training.cascade.word_maps import WordMaps
from training.config.experiment import SamplerConfig, StageConfig, TextConfig
from training.diffusion.sampler import sample_stage
from training.model.unet import UNet
from training.text.encoder import TextEncoder, build_text_encoder
from training.text.identity import pinned

CHUNK_BATCHES = 16
"""Batches per device that go through all stages together, so that weights rarely move and memory stays bounded."""
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes in which a U-Net can compute."""
Progress = Callable[[str, int, int], None]
"""Called as (stage name, sampler steps done, total sampler steps), counting the steps of every batch."""


@dataclass
class Stage:
    """One U-Net with its settings and the origin of its weights."""

    config: StageConfig
    unet: UNet
    origin: dict[str, Any]
    sha256: str = ""
    """SHA-256 of the file the weights were read from; empty if they were not read from a bundle."""


class Cascade:
    """The stages of a bundle, base first, and their text encoder; fp32 on the CPU until `to` is called. Threads may
    share one: they draw in turns."""

    def __init__(self, stages: Sequence[Stage], encoder: TextEncoder, text: TextConfig) -> None:
        self.stages = list(stages)
        self.encoder = encoder
        self.text = text
        self.figures: dict[str, Any] | None = None
        """Figures that an evaluation recorded in the bundle."""
        self.device = torch.device("cpu")
        self.offload = True
        self._turn = threading.RLock()
        """Threads that draw with the same cascade take turns: they would move its weights, and record its attention,
        under each other's hands."""

    # ------------------------------------------------------------------------------------- loading and saving

    def __repr__(self) -> str:
        stages = ", ".join(f"{stage.config.name} ({stage.config.image_size} px)" for stage in self.stages)
        dtype = str(next(self.stages[0].unet.parameters()).dtype).removeprefix("torch.")
        return f"<Cascade: {stages}; text encoder {self.encoder.name}; {self.device}, {dtype}>"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turn=threading.RLock())

    if not TYPE_CHECKING:  # otherwise mypy would believe that every attribute exists

        def __getattr__(self, name: str) -> Any:
            hint = f"; {METHODS[name]}" if name in METHODS else ""
            raise AttributeError(f"a Cascade has no {name!r}{hint}")

    @classmethod
    def from_pretrained(cls, path: str, text_path: str | None = None, **others: Any) -> Cascade:
        """Load a bundle: a directory, an s3:// prefix or a name in the Hugging Face cache. Reads only safetensors.

        Args:
            text_path: path of the text encoder on this machine; None: the path stored in the bundle.
            others: none; the error for what `from_pretrained` of other libraries takes names the remedy.

        Raises:
            DataError: there is no bundle, it is damaged, or there is no text encoder at its path.
            ConfigError: the text encoder is not the one the bundle was trained with, or `text_path` is given for an
                encoder without files.
        """
        refuse_loading(others)
        if not path:
            raise ConfigError(f"from_pretrained: path={path!r}: give the directory of a bundle")
        opened = bundle.read(str(path))
        if text_path and opened.text.kind == "words":
            raise ConfigError(
                f"text_path={text_path}: the text encoder of this bundle, words, has no files; leave it out"
            )
        try:
            text = pinned(replace(opened.text, path=str(text_path) if text_path else opened.text.path))
        except DataError as error:
            second = f"; if it is the second of two encoders, correct its path in {path}/bundle.json"
            raise DataError(
                f"{error}; or, if this machine has it elsewhere, name its directory with bundle.text_path=DIR (in "
                f"Python, text_path=DIR){second if opened.text.also else ''}"
            ) from error
        return cls._from(replace(opened, text=text))

    @classmethod
    def from_runs(cls, runs: Sequence[str]) -> Cascade:
        """Load the averaged weights of the newest checkpoints of training runs, base first, without a bundle on disk.

        Raises:
            DataError: a run has no valid checkpoint.
            ConfigError: the stages do not form a cascade.
        """
        single = isinstance(runs, (str, os.PathLike))
        opened = bundle.collect([str(runs)] if single else [str(run) for run in runs])
        return cls._from(replace(opened, text=pinned(opened.text)))

    @classmethod
    def _from(cls, opened: bundle.Bundle) -> Cascade:
        with _undisturbed():
            stages = [Stage(s.config, bundle.load_unet(s), s.origin, s.sha256) for s in opened.stages]
            made = cls(stages, build_text_encoder(opened.text), opened.text)
        made.figures = opened.figures
        return made

    def save(self, path: str) -> None:
        """Write a bundle directory (or s3:// prefix); training/cascade/bundle.py describes its content.

        Raises:
            ConfigError: the stages do not form a cascade, or the path is empty.
            CascadeError: the directory or store cannot be written to.
        """
        if not str(path):
            raise ConfigError("save: the path is empty; name a directory")
        self._write(str(path))

    def _write(self, path: str, address: str | None = None) -> None:
        weights = []
        for stage in self.stages:
            unet = getattr(stage.unet, "_orig_mod", stage.unet)  # inside torch.compile(unet), where names are longer
            weights.append(bundle.StageWeights(stage.config, unet.config, unet.state_dict, stage.origin, stage.sha256))
        try:
            bundle.write(path, bundle.Bundle(pinned(self.text), weights, self.figures), address)
        except OSError as error:
            raise of_file(error) from error

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None, message: str = "") -> str:
        """Upload the bundle with its model card to the Hugging Face Hub; return the URL.

        Args:
            repo_id: `OWNER/NAME`, or a name alone, which is owned by the account of the token; made if it is not there.
            private: only its owner sees a repository that is made.

        Raises:
            DataError: the Hub cannot be reached, or refuses the upload.
        """
        from huggingface_hub import HfApi

        hub, message = HfApi(token=token), message or "cascade bundle"
        with tempfile.TemporaryDirectory() as folder:
            with _of_the_hub(repo_id):
                place = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            self._write(folder, place)
            with _of_the_hub(repo_id):
                return str(hub.upload_folder(repo_id=place, folder_path=folder, commit_message=message))

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        offload: bool = True,
    ) -> Cascade:
        """Set the device and precision for drawing, which `torch.autocast` does not change; return self.

        Args:
            device: where to draw; None, or a dtype alone, leaves it unchanged.
            dtype: dtype of the U-Nets' weights, for example torch.bfloat16; None leaves it unchanged.
            offload: keep weights in host memory and move one stage at a time to the device; False: keep all weights on
                the device.

        Raises:
            ConfigError: there is no such device or dtype.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise ConfigError(f"to: {device} and {dtype} are two dtypes; give only one")
            dtype, device = device, None
        if dtype is not None and dtype not in WEIGHTS:
            known = ", ".join(str(one) for one in WEIGHTS)
            raise ConfigError(f"to: {dtype!r} is not a dtype of weights to draw with; give one of {known}")
        place = self.device if device is None else place_of(device, "to")
        with self._turn, _undisturbed():
            self.device, self.offload = place, offload
            home = torch.device("cpu") if offload else place
            for stage in self.stages:
                stage.unet.to(device=home, dtype=dtype)
            self.encoder.to(home)
        return self

    # ------------------------------------------------------------------------------------------------ drawing

    def generate(
        self,
        prompts: str | Iterable[str],
        negative_prompts: str | Iterable[str] | None = None,
        guidance: Any = None,
        steps: Any = None,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        stages: Any = None,
        callback: Progress | None = None,
        **options: Any,
    ) -> Images:
        """Return the final pictures: `num_images` of the first prompt, then of the second, and so on; see `draw`.

        Warns:
            UserWarning: the text encoder does not read all of a prompt.
        """
        refuse_generate(options, inspect.signature(self.draw).parameters)
        drawn = self.draw(prompts, negative_prompts, guidance, steps, seed, num_images, stages, callback, **options)
        with self._turn:  # threads cannot share a tokenizer, either
            cut = [one.prompt for one in drawn if self.encoder.is_cut(one.prompt)]
        if cut:
            tokens = self.encoder.max_tokens
            warnings.warn(f"only the first {tokens} tokens of this prompt are read: {cut[0][:60]!r}...", stacklevel=2)
        return Images(drawing.image for drawing in drawn)

    def __call__(
        self,
        prompt: str | Iterable[str],
        negative_prompt: str | Iterable[str] | None = None,
        *,
        num_inference_steps: Any = None,
        guidance_scale: Any = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        height: int | None = None,
        width: int | None = None,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: Any = None,
        **options: Any,
    ) -> Images:
        """Call `generate` with the argument names of diffusers: `cascade("a cat", guidance_scale=4).images[0]`.

        Args:
            num_inference_steps, guidance_scale: one value, one per stage, or a dict by stage name.
            generator: a seed, or a `torch.Generator`, of which only the initial seed is used; or a list with one per
                picture.
            height, width: size of the final pictures, pixels; None: `size`.
            strength: how much of `image` is redrawn, see `draw`; None: 0.8, or 1 with a mask.
            options: further arguments of `draw`.

        Raises:
            ConfigError: as for `draw`, or an option that it does not have.
        """
        if options.pop("output_type", "pil") != "pil":
            raise ConfigError("output_type: the pictures are PIL images; numpy.asarray(picture) converts one")
        if not options.pop("return_dict", True):
            raise ConfigError("return_dict=False: the result is a list of pictures, which has them as `images` as well")
        if "seed" in options and generator is not None:
            raise ConfigError("seed and generator: give only one of them; both are the seed of all noise")
        mine = inspect.signature(self.__call__).parameters
        shared = inspect.signature(self.draw).parameters
        refuse_call(options, [name for name in (*mine, *shared) if name not in (*CALL, "options")])
        whole = image is None or mask_image is not None
        with named_as(CALL if "seed" in options else CALL | {"seed": "generator"}):
            return self.generate(
                prompt,
                negative_prompt,
                guidance_scale,
                num_inference_steps,
                options.pop("seed") if "seed" in options else seeds_of(generator),
                num_images_per_prompt,
                image=image,
                mask=mask_image,
                strength=(1.0 if whole else 0.8) if strength is None else strength,
                size=size_of(height, width, options.pop("size", None)),
                **options,
            )

    def draw(
        self,
        prompts: str | Iterable[str],
        negative_prompts: str | Iterable[str] | None = None,
        guidance: Any = None,
        steps: Any = None,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        stages: Any = None,
        callback: Progress | None = None,
        *,
        aug_level: Any = None,
        sampler: Any = None,
        spacing: Any = None,
        threshold: Any = None,
        original_side: Any = None,
        low_res: Pictures | None = None,
        image: Pictures | None = None,
        mask: Pictures | None = None,
        strength: Any = 1.0,
        guidance_interval: Any = None,
        explain: bool = False,
        numbers: Sequence[int] | None = None,
        size: Any = None,
        batch: int = 16,
        devices: str | torch.device | Sequence[str | torch.device] | None = None,
    ) -> list[Drawing]:
        """Draw pictures; return them with the output of every stage, in the order of `generate`.

        `guidance`, `steps`, `aug_level`, `sampler`, `spacing`, `threshold`, `guidance_interval` (two times) and
        `original_side` are one value, one per stage drawn, or a dict by stage name; None: the bundle's value.

        Args:
            prompts: one caption or several; an empty one draws without text.
            negative_prompts: captions to steer away from: one for all prompts, or one per prompt.
            seed: seed of all noise, or a list with one per picture; the same seed gives the same pictures.
            num_images: pictures per prompt.
            stages: how many stages to run, from the first, or names of consecutive stages; None: all.
            callback: called after every sampler step of every batch, see `Progress`.
            low_res: one picture, or one per prompt, to start from if the first stage drawn is super-resolution.
            image: one picture, or one per prompt, to redraw: the first stage drawn starts from it, and so do others
                whose `strength` is below 1.
            strength: how much of `image` is redrawn, in (0, 1]; with 1 nothing of it remains, except where `mask` is
                dark. One number applies to the first stage drawn; a list or dict gives one per stage.
            mask: one picture, or one per prompt: `image` is redrawn where the mask is light, and kept by every stage
                where it is dark.
            explain: also record which words the pixels attended to.
            size: (width, height) of the final pictures, or one side, pixels; None: the size the last stage drawn was
                trained for.
            numbers: for each prompt, which of its pictures to draw, from 0; needs num_images=1.
            batch: pictures per forward pass.
            devices: devices to share the pictures among, for example ["cuda:0", "cuda:1"]; None: that of `to`.

        Raises:
            ConfigError: arguments that contradict each other or do not suit the cascade, for example settings that a
                distilled stage was not trained for.
        """
        texts = as_texts(prompts, "prompts")
        negatives = [] if negative_prompts is None else as_texts(negative_prompts, "negative_prompts")
        if callback is not None and not callable(callback):
            raise ConfigError(f"callback={callback!r}: give a function, called as callback(stage, step, steps)")
        seed, num_images, numbers, batch = as_plain(seed), as_plain(num_images), as_plain(numbers), as_plain(batch)
        stages, strength, size = as_plain(stages), as_plain(strength), as_plain(size)
        if not isinstance(batch, int) or batch < 1:
            raise ConfigError(f"batch={batch}: it must be a whole number, at least 1")
        drawings = number_drawings(texts, negatives, seed, num_images, numbers)
        settings = {"guidance": guidance, "steps": steps, "aug_level": aug_level, "sampler": sampler}
        settings |= {"spacing": spacing, "threshold": threshold, "guidance_interval": guidance_interval}
        settings |= {"original_side": original_side}
        plan = plan_stages([stage.config for stage in self.stages], stages, **as_plain(settings))
        chosen = [self.stages[index] for index, _ in plan]
        sizes = plan_sizes(size, [stage.config for stage in chosen], [stage.unet.config.divisor for stage in chosen])
        strengths = plan_strengths(strength, [stage.config.name for stage in chosen])
        for stage, (_, sampler), redrawn in zip(chosen, plan, strengths, strict=True):
            check_distilled(stage.config, stage.origin, sampler, redrawn)
        if any(negatives) and all(sampler.guidance == 1 for _, sampler in plan):
            raise ConfigError("negative_prompts: no stage drawn has guidance to steer by (guidance=1)")
        if image is None and any(value < 1 for value in strengths):
            raise ConfigError(f"strength={strength}: it needs `image`, the picture to redraw")
        start = image if low_res is None else low_res
        check_start(chosen[0].config, low_res=low_res is not None, image=image is not None, mask=mask is not None)

        places = plan_places([self.device] if devices is None else devices)
        batches = -(-len(drawings) // batch)
        meter = _Meter(callback, {one.config.name: s.steps * batches for one, (_, s) in zip(chosen, plan, strict=True)})
        pictures = {
            name: None if given is None else as_list(given, len(texts), name)
            for name, given in {"image": image, "mask": mask, "low_res": start}.items()
        }
        chunk = batch * CHUNK_BATCHES * len(places)
        for at in range(0, len(drawings), chunk):
            rows = range(at, min(at + chunk, len(drawings)))
            own = {
                name: None if given is None else [given[row // num_images] for row in rows]
                for name, given in pictures.items()
            }
            task = _Task(plan, [drawings[row] for row in rows], strengths, explain, batch, places, meter, sizes, **own)
            with self._turn, _undisturbed(places):
                self._draw_chunk(task)
        return drawings

    def _draw_chunk(self, task: _Task) -> None:
        """Run some drawings through all stages, one stage after the other, and store the pictures in them."""
        prompts = [drawing.prompt for drawing in task.drawings]
        negatives = [drawing.negative_prompt for drawing in task.drawings]
        text = self._encode(prompts, task.places[0])
        negative = self._encode(negatives, task.places[0]) if any(negatives) else None
        words = [self.encoder.words(prompt) for prompt in prompts] if task.explain else []
        seeds = torch.tensor([drawing.seed for drawing in task.drawings], dtype=torch.int64)
        before: Tensor | None = None
        for turn, (index, sampler) in enumerate(task.plan):
            stage = self.stages[index]
            size = task.sizes[turn]
            if before is None and stage.config.is_super_resolution:
                factor = stage.config.image_size // stage.config.low_res_size
                before = to_pictures(task.low_res or [], (size[0] // factor, size[1] // factor), SHRINK)
            init = task.image if turn == 0 or task.mask or task.strengths[turn] < 1 else None
            inputs = _Inputs(
                seeds,
                text,
                negative,
                low_res=before,
                init=None if init is None else to_pictures(init, size),
                mask=None if task.mask is None else to_masks(task.mask, size),
                strength=task.strengths[turn],
                shape=(size[1], size[0]),
            )
            before, heats = self._draw_stage(stage, sampler, inputs, words, task)
            for row, image in enumerate(to_images(before)):
                task.drawings[row].stages[stage.config.name] = image
                if heats and heats[row]:
                    task.drawings[row].words[stage.config.name] = heats[row]

    def _encode(self, captions: list[str], place: torch.device) -> tuple[Tensor, Tensor]:
        with self._visiting(self.encoder, self.encoder.device, place):
            text, mask = self.encoder.encode(captions)
        return text.cpu(), mask.cpu()

    def _draw_stage(
        self, stage: Stage, sampler: SamplerConfig, inputs: _Inputs, words: list[Words], task: _Task
    ) -> tuple[Tensor, list[Heat]]:
        """Return uint8 (N, 3, H, W) on the CPU and, with `words`, the attention heat of each picture. The devices, each
        with a copy of the weights, share the batches."""
        parts = [slice(at, at + task.batch) for at in range(0, len(inputs.seeds), task.batch)]
        copies = [stage.unet, *(copy.deepcopy(stage.unet) for _ in task.places[1:])]
        home = next(stage.unet.parameters()).device

        def work(number: int) -> list[tuple[Tensor, list[Heat]]]:
            place = task.places[number]
            with self._visiting(copies[number], home, place):
                return [
                    draw_batch(
                        copies[number],
                        stage.config,
                        sampler,
                        inputs.part(part, place),
                        words[part],
                        lambda: task.meter.step(stage.config.name),
                    )
                    for part in parts[number :: len(task.places)]
                ]

        if len(task.places) == 1:
            results = [work(0)]
        else:
            with ThreadPoolExecutor(len(task.places)) as pool:
                results = list(pool.map(work, range(len(task.places))))
        ordered = [results[i % len(results)][i // len(results)] for i in range(len(parts))]
        return torch.cat([drawn for drawn, _ in ordered]), [heat for _, heats in ordered for heat in heats]

    @staticmethod
    @contextmanager
    def _visiting(module: nn.Module | TextEncoder, home: torch.device, place: torch.device) -> Iterator[None]:
        """Move the weights to `place` inside the context, and back home at its end."""
        try:
            module.to(place)
            yield
        finally:
            module.to(home)


@contextmanager
def _of_the_hub(name: str) -> Iterator[None]:
    """Raise `DataError` for any error of the Hub's client, which has had several clients for HTTP with their own."""
    try:
        yield
    except Exception as error:
        raise DataError(f"push_to_hub: {name} was not uploaded ({describe_error(error)[:200]})") from error


@contextmanager
def _undisturbed(places: Sequence[torch.device] = ()) -> Iterator[None]:
    """Compute alike in any of torch's modes: another default device, autocast (the threads of several devices would not
    be in it, and its captions would stay in the cache), and inference mode (weights loaded or moved in it could not be
    used outside)."""
    with ExitStack() as modes:
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        for kind in {"cpu", *(place.type for place in places)}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())  # leaving inference mode would have enabled gradients
        yield


def draw_batch(
    unet: UNet,
    config: StageConfig,
    sampler: SamplerConfig,
    inputs: _Inputs,
    words: list[Words],
    on_step: Callable[[], None],
) -> tuple[Tensor, list[Heat]]:
    """Run one batch through one stage; return uint8 (B, 3, H, W) on the CPU and, with `words`, the attention heat of
    each picture.

    Args:
        words: the words of each caption with the positions of their tokens; empty: no attention is recorded.
        on_step: called after every sampler step.

    Raises:
        DataError: a picture has values that are not numbers.
    """
    maps = WordMaps(unet, len(inputs.seeds)) if words else None

    def after_step(done: int, steps: int) -> None:
        if maps is not None:
            maps.add()
        on_step()

    with maps or nullcontext():
        drawn = sample_stage(
            unet,
            *inputs.text,
            config=config.diffusion,
            sampler=sampler,
            image_size=config.image_size,
            seeds=inputs.seeds,
            low_res=inputs.low_res,
            negative=inputs.negative,
            init=inputs.init,
            strength=inputs.strength,
            mask=inputs.mask,
            callback=after_step,
            shape=inputs.shape,
        )
    if drawn.isnan().any():
        dtype = str(next(unet.parameters()).dtype).removeprefix("torch.")
        raise DataError(
            f"stage {config.name} draws values that are not numbers (NaN): its weights are damaged or have diverged, "
            f"or overflow in {dtype}; try an earlier checkpoint or another dtype"
        )
    heats = [] if maps is None else [maps.of(row, found) for row, found in enumerate(words)]
    return to_uint8(drawn).cpu(), heats


@dataclass
class _Task:
    """Drawings that go through the stages together; lists of pictures have one entry per drawing."""

    plan: list[tuple[int, SamplerConfig]]
    drawings: list[Drawing]
    strengths: list[float]
    explain: bool
    batch: int
    places: list[torch.device]
    meter: _Meter
    sizes: list[tuple[int, int]]
    """(width, height) of the pictures of each stage drawn, pixels."""
    low_res: list[Any] | None = None
    image: list[Any] | None = None
    mask: list[Any] | None = None


@dataclass
class _Inputs:
    """Inputs of a stage, one row per picture: seeds (N,), text (N, T, D) and its mask (N, T), pictures (N, 3, H, W)."""

    seeds: Tensor
    text: tuple[Tensor, Tensor]
    negative: tuple[Tensor, Tensor] | None
    low_res: Tensor | None
    init: Tensor | None
    mask: Tensor | None
    strength: float
    shape: tuple[int, int]
    """(H, W) of the pictures to draw."""

    def part(self, rows: slice, place: torch.device) -> _Inputs:
        """Return some of the rows, on a device."""

        def here(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(here(item) for item in value)
            return value[rows].to(place) if isinstance(value, Tensor) else value

        return _Inputs(**{f.name: here(getattr(self, f.name)) for f in fields(self)})


class _Meter:
    """Counts sampler steps of all devices for a progress callback."""

    def __init__(self, callback: Progress | None, totals: dict[str, int]) -> None:
        self._callback, self._totals = callback, totals
        self._done = dict.fromkeys(totals, 0)
        self._lock = threading.Lock()

    def step(self, stage: str) -> None:
        with self._lock:
            self._done[stage] += 1
            if self._callback is not None:
                self._callback(stage, self._done[stage], self._totals[stage])
