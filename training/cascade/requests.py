"""Inputs and outputs of a cascade: pictures in any form to tensors, settings per stage, numbered drawings."""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data_pipeline.common.errors import BadSample, ConfigError, DataError
from data_pipeline.content.images import to_rgb
from data_pipeline.storage import store
from data_pipeline.storage.retry import PATIENCE, persist
from training.config.diffusion import SamplerConfig, SamplerError
from training.config.experiment import StageConfig
from training.pictures.sheets import Cell, sheet

Pictures = Any
"""One picture or a sequence of them: paths, PIL images, uint8 arrays (H, W, 3), or a uint8 tensor (N, 3, H, W)."""
Words = list[tuple[str, list[int]]]
"""The words of a caption, each with the positions of its tokens (`TextEncoder.words`)."""
Heat = list[tuple[str, np.ndarray]]
"""(word, fp32 (H, W) attention of the pixels to it), in the caption's order."""
Size = int | tuple[int, int]
"""Size of a picture in pixels: one side, or (width, height)."""
NUMBER = (int, float, np.integer, np.floating)
DAMAGED = (OSError, SyntaxError, ValueError)
"""Errors that Pillow raises for files that are not complete pictures."""
SHRINK = Image.Resampling.BOX
"""How pictures are downsized for a super-resolution stage to start from: block means, as in training."""


@dataclass
class Drawing:
    """One picture with its prompt, seed and the output of every stage."""

    prompt: str
    negative_prompt: str
    number: int
    """How many pictures of the same prompt and seed came before it in this call."""
    seed: int
    """The 63-bit seed of its noise."""
    stages: dict[str, Image.Image] = field(default_factory=dict)
    """The picture that each stage drew, by stage name, in the order of drawing."""
    words: dict[str, Heat] = field(default_factory=dict)
    """With `explain`, the attention heat of each stage, by stage name; stages without attention are absent."""

    @property
    def image(self) -> Image.Image:
        """The final picture."""
        return list(self.stages.values())[-1]


def picture_seed(seed: int, prompt: str, number: int) -> int:
    """Return the noise seed (63 bits) of the `number`-th picture of a prompt; other prompts do not affect it."""
    digest = blake2b(f"{seed}/{number}/{prompt}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def as_texts(given: Any, key: str) -> list[Any]:
    """Return the captions: one text, or those of any ordered collection.

    Raises:
        ConfigError: something else.
    """
    given = as_plain(given) if isinstance(given, np.ndarray) else given
    if isinstance(given, str):
        return [given]
    if isinstance(given, (bytes, Mapping, Set)) or not isinstance(given, Iterable):
        raise ConfigError(f"{key}={given!r}: give a caption, or a list of captions")
    return list(given)


def as_plain(value: Any) -> Any:
    """Return arrays, tensors, ranges and the numbers inside collections as Python's own lists and numbers."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: as_plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, range)):
        return tuple(map(as_plain, value)) if isinstance(value, tuple) else list(map(as_plain, value))
    return value


def number_drawings(
    prompts: Sequence[str],
    negatives: Sequence[str],
    seed: int | Sequence[int],
    num_images: int,
    numbers: Sequence[int] | None = None,
) -> list[Drawing]:
    """Return `num_images` numbered drawings per prompt, in order; with `numbers`, one per prompt with that number.

    Args:
        seed: one for all pictures, or one per picture.

    Raises:
        ConfigError: lists of the wrong length, or values of the wrong type.
    """
    for name, texts in (("prompts", prompts), ("negative_prompts", negatives)):
        for text in texts:
            if not isinstance(text, str):
                raise ConfigError(f"{name}: {text!r} is not a string")
            if not _is_unicode(text):
                raise ConfigError(f"{name}: {text!r} contains characters that are not valid Unicode")
    seeds: list[Any] = list(seed) if isinstance(seed, (list, tuple, np.ndarray)) else [seed]
    for name, value in (*(("seed", one) for one in seeds), ("num_images", num_images)):
        if not isinstance(value, (int, np.integer)):
            raise ConfigError(f"{name}={value}: it must be a whole number")
    for one in seeds:
        if one < 0:
            raise ConfigError(f"seed={one}: it must be at least 0; for other pictures each time, draw it at random")
    if len(negatives) not in (0, 1, len(prompts)):
        raise ConfigError(f"negative_prompts: {len(negatives)} for {len(prompts)} prompts; give one, or one per prompt")
    if num_images < 1:
        raise ConfigError(f"num_images={num_images}: it must be at least 1")
    whole = isinstance(numbers, Sequence) and all(isinstance(one, int) and one >= 0 for one in numbers)
    if numbers is not None and not whole:
        raise ConfigError(f"numbers={numbers}: give a list with a whole number, at least 0, for each prompt")
    if numbers is not None and (num_images != 1 or len(numbers) != len(prompts)):
        raise ConfigError(f"numbers: {len(numbers)} for {len(prompts)} prompts; give one per prompt, and num_images=1")
    pictures = len(prompts) * num_images
    if len(seeds) not in (1, pictures):
        raise ConfigError(f"seed: {len(seeds)} for {pictures} pictures; give one for all, or one per picture")
    own = seeds if len(seeds) == pictures else seeds * pictures
    each = list(negatives) if len(negatives) == len(prompts) else list(negatives or [""]) * len(prompts)
    counts: Counter[tuple[str, int]] = Counter()
    drawings = []
    for place in range(pictures):
        index = place // num_images
        prompt, one = prompts[index], int(own[place])  # True is 1
        key = prompt, one
        number = counts[key] if numbers is None else int(numbers[index])
        drawings.append(Drawing(prompt, each[index], number, picture_seed(one, prompt, number)))
        counts[key] += 1
    return drawings


def _is_unicode(text: str) -> bool:
    """Return whether the text can be encoded; input from a terminal with a different encoding can contain lone
    surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --------------------------------------------------------------------------------------------- settings per stage


def plan_stages(configs: Sequence[StageConfig], wanted: Any = None, **settings: Any) -> list[tuple[int, SamplerConfig]]:
    """Return the stages to draw, each as its index and its sampler.

    Args:
        wanted: how many stages, from the first, or a name, or names; None: all.
        settings: fields of `SamplerConfig` (`sampler`: its name), each one value, a list with one per stage drawn, or a
            dict by stage name; None: the stage's own.

    Raises:
        ConfigError: unknown or non-consecutive stages, or invalid settings.
    """
    names = [config.name for config in configs]
    chosen = _chosen(names, wanted)
    if chosen != list(range(chosen[0], chosen[0] + len(chosen))):
        raise ConfigError(f"stages={wanted}: they must be consecutive, in the order {', '.join(names)}")
    told = [configs[index].name for index in chosen if configs[index].diffusion.size_condition]
    _check_used("original_side", settings, told, "was trained with stage.diffusion.size_condition=true")
    enlarging = [configs[index].name for index in chosen if configs[index].is_super_resolution]
    _check_used("aug_level", settings, enlarging, "is for super-resolution")
    plan = []
    for turn, index in enumerate(chosen):
        given = {key: _of_stage(key, value, turn, [names[i] for i in chosen]) for key, value in settings.items()}
        given["name"] = given.pop("sampler", None)
        try:
            sampler = replace(configs[index].sampler, **{k: v for k, v in given.items() if v is not None})
        except SamplerError as error:
            key = "sampler" if error.key == "name" else error.key
            raise ConfigError(f"{key}{error.words}") from error
        except TypeError as error:
            raise ConfigError(str(error)) from error
        if given.get("aug_level") is not None:
            configs[index].check_aug_level(sampler, "aug_level")
        plan.append((index, sampler))
    return plan


def _check_used(key: str, settings: Mapping[str, Any], users: Sequence[str], what: str) -> None:
    """Raise ConfigError if a setting is given, but none of the stages that it is given for can use it."""
    value = settings.get(key)
    named = {name for name, one in value.items() if one is not None} if isinstance(value, dict) else None
    if value is None or named == set():
        return
    if not users:
        raise ConfigError(f"{key}: no stage drawn {what}")
    if named is not None and not named & {*users}:
        raise ConfigError(f"{key}={value}: only {', '.join(users)} {what}")


DISTILLED = {"name": "sampler", "steps": "steps", "guidance": "guidance", "spacing": "spacing"}
"""Sampler settings that are fixed by distillation: field of `SamplerConfig` -> argument of `draw`."""


def check_distilled(
    config: StageConfig,
    origin: dict[str, Any],
    sampler: SamplerConfig,
    strength: float = 1.0,
    keys: Mapping[str, str] = DISTILLED,
    remedy: str = "leave it out, or distil another student",
) -> None:
    """Check that a distilled stage is sampled as it was trained: it knows only its own noise levels, and its guidance
    is part of its weights.

    Args:
        keys, remedy: what to call the settings in an error, and what to do.

    Raises:
        ConfigError: a different sampler, or a start between its levels (`strength` below 1).
    """
    taught = origin.get("distilled")
    if not taught:
        return
    learnt = (
        f"{config.name} is distilled to {taught['steps']} steps with guidance {taught['guidance']:g} in its weights"
    )
    for field_name, key in keys.items():
        own, given = getattr(config.sampler, field_name), getattr(sampler, field_name)
        if own != given:
            raise ConfigError(f"{key}={given}: {learnt}, so it must be {own}; {remedy}")
    if strength < 1:
        raise ConfigError(f"strength={strength:g}: {learnt}, and cannot start in between; use its teacher instead")


def check_start(first: StageConfig, *, low_res: bool, image: bool, mask: bool) -> None:
    """Check which pictures are given to start from.

    Args:
        first: the first stage drawn.

    Raises:
        ConfigError: one is missing, or the stage has no use for it.
    """
    if mask and not image:
        raise ConfigError("mask: inpainting needs `image`, the picture that the mask belongs to")
    if low_res and not first.is_super_resolution:
        raise ConfigError(f"low_res: {first.name} draws from text only; to redraw a picture, give `image`")
    if first.is_super_resolution and not (low_res or image):
        raise ConfigError(f"low_res: {first.name} starts from {first.low_res_size} px pictures; give them")


def _chosen(names: Sequence[str], wanted: Any) -> list[int]:
    if wanted is None:
        return list(range(len(names)))
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(names):
            raise ConfigError(f"stages={wanted}: the cascade has {len(names)} ({', '.join(names)})")
        return list(range(wanted))
    if not isinstance(wanted, (str, Sequence)):
        raise ConfigError(f"stages={wanted}: give a number of stages, a name, or names ({', '.join(names)})")
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in asked:
        if name not in names:
            raise ConfigError(f"stages={name}: no such stage; the cascade has {', '.join(names)}")
    if not asked:
        raise ConfigError("stages: give at least one")
    return [names.index(name) for name in asked]


def _of_stage(key: str, value: Any, turn: int, names: Sequence[str]) -> Any:
    if isinstance(value, dict):
        for name in value:
            if name not in names:
                raise ConfigError(f"{key}: {name} is not one of the stages drawn: {', '.join(names)}")
        value = value.get(names[turn])
    elif key == "guidance_interval" and _is_pair(value):
        value = list(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(names):
            raise ConfigError(f"{key}={list(value)}: {len(value)} values for {len(names)} stages ({', '.join(names)})")
        value = value[turn]
    if key in ("guidance", "aug_level", "original_side") and value is not None:
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}={value}: it must be a number") from error
    if key == "steps" and value is not None:
        if not isinstance(value, (int, np.integer)):
            raise ConfigError(f"{key}={value}: it must be a whole number")
        return int(value)
    if key == "guidance_interval" and value is not None and not _is_pair(value):
        raise ConfigError(f"{key}={value}: give two times, 0 <= first <= second <= 1")
    return value


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(part, (int, float)) for part in value)


def plan_strengths(strength: Any, names: Sequence[str]) -> list[float]:
    """Return how much of its initial picture each stage drawn redraws, in (0, 1]; 1: it starts from noise.

    Args:
        strength: one value, for the first stage drawn; a list with one per stage; or a dict by stage name.

    Raises:
        ConfigError: values outside (0, 1], or stages that are not drawn.
    """
    if isinstance(strength, NUMBER):
        values: list[Any] = [strength] + [1.0] * (len(names) - 1)
    else:
        given = [_of_stage("strength", strength, turn, names) for turn in range(len(names))]
        values = [1.0 if value is None else value for value in given]
    for value in values:
        if not isinstance(value, NUMBER) or not 0 < value <= 1:
            raise ConfigError(f"strength={value}: it must be above 0 and at most 1")
    return [float(value) for value in values]


def plan_places(devices: str | int | torch.device | Sequence[str | int | torch.device]) -> list[torch.device]:
    """Return the devices to draw on. Raises `ConfigError` for none, or one that this machine does not have."""
    given = devices if isinstance(devices, Sequence) and not isinstance(devices, str) else [devices]
    if not given:
        raise ConfigError("devices: give at least one, for example ['cuda:0', 'cuda:1']")
    return [place_of(device, "devices") for device in given]


def place_of(device: str | int | torch.device, key: str) -> torch.device:
    """Return the device. Raises `ConfigError`, naming `key`, if there is none, or nothing can be computed on it."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{key}: {device!r} is not a device; give for example 'cuda', 'cuda:1' or 'cpu'") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key}: torch sees no GPU for {str(device)!r}; use 'cpu'")
    try:
        torch.ones(1, device=place).item()
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise ConfigError(f"{key}: this machine has no {device} ({str(error).partition('. ')[0]})") from error
    return place


# ------------------------------------------------------------------------------------------------------ pictures


def to_uint8(pictures: Tensor) -> Tensor:
    """Convert [-1, 1] to uint8, rounded; the inverse of `denoiser.to_unit` for 8-bit values."""
    return ((pictures.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Convert uint8 (N, 3, H, W) to PIL images."""
    return [Image.fromarray(picture) for picture in pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def as_list(given: Pictures, count: int, name: str) -> list[Any]:
    """Return one picture per prompt; a single picture is repeated.

    Args:
        given: one picture or a sequence of them.
        count: number of prompts.
        name: the argument to name in an error.

    Raises:
        ConfigError: neither one picture nor `count` pictures.
    """
    several = isinstance(given, (list, tuple)) or getattr(given, "ndim", 0) == 4
    pictures = list(given) if several else [given]
    if len(pictures) not in (1, count):
        raise ConfigError(f"{name}: {len(pictures)} pictures for {count} prompts; give one, or one per prompt")
    return pictures * count if len(pictures) == 1 else pictures


def plan_sizes(size: Any, configs: Sequence[StageConfig], divisors: Sequence[int]) -> list[tuple[int, int]]:
    """Return (width, height) of the pictures of each stage drawn, such that those of the last stage have `size`.

    Args:
        size: (width, height) in pixels, or one side; None: the sizes that the stages were trained for.
        divisors: `UNetConfig.divisor` of each stage.

    Raises:
        ConfigError: not two whole numbers, or sides that some stage cannot halve or scale; the message names the
            nearest valid size.
    """
    if size is None:
        return [(config.image_size, config.image_size) for config in configs]
    sides = [size, size] if isinstance(size, (int, np.integer)) else size
    if not _is_pair(sides) or not all(isinstance(side, (int, np.integer)) and side > 0 for side in sides):
        raise ConfigError(f"size={size}: give the width and height of the final picture in pixels, size=[WIDTH,HEIGHT]")
    last = configs[-1].image_size
    unit = 1
    for config, divisor in zip(configs, divisors, strict=True):
        unit = math.lcm(unit, divisor * last // math.gcd(divisor * last, config.image_size))
    if any(side % unit for side in sides):
        near = [max(round(side / unit), 1) * unit for side in sides]
        stages = ", ".join(str(config.image_size) for config in configs)
        raise ConfigError(
            f"size={list(sides)}: with stages of {stages} px each side must be a multiple of {unit}; the nearest is "
            f"size=[{near[0]},{near[1]}]"
        )
    return [
        (int(sides[0]) * config.image_size // last, int(sides[1]) * config.image_size // last) for config in configs
    ]


def to_pictures(pictures: Sequence[Any], size: Size, shrink: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
    """Return uint8 (N, 3, H, W): each picture centre-cropped to the aspect ratio of `size` (one side, or width and
    height) and resized to it, bicubic, or with `shrink` if it becomes smaller.

    Raises:
        DataError: a file is missing or not a picture.
        ConfigError: a picture of another type or shape than `Pictures`, or one that training could not use.
    """
    images = [_image(picture) for picture in pictures]
    bicubic, (width, height) = Image.Resampling.BICUBIC, _sides(size)
    smaller = [min(image.width / width, image.height / height) > 1 for image in images]
    arrays = [np.array(_fit(one, size, shrink if less else bicubic)) for one, less in zip(images, smaller, strict=True)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def to_masks(masks: Sequence[Any], size: Size) -> Tensor:
    """Return bool (N, 1, H, W): True, to be redrawn, where any part of the pixel is light (128 or more)."""
    light = [_image(mask).convert("L").point(lambda value: 255 if value >= 128 else 0) for mask in masks]
    fitted = [np.array(_fit(mask, size, Image.Resampling.BOX)) > 0 for mask in light]
    return torch.from_numpy(np.stack(fitted))[:, None]


class Images(list[Image.Image]):
    """A list of pictures that notebooks show side by side."""

    @property
    def images(self) -> Images:
        """The list itself, under the name that results of diffusers use."""
        return self

    def _repr_png_(self) -> bytes | None:
        if not self:
            return None
        data = io.BytesIO()
        sheet([Cell([picture], "") for picture in self], columns=4).save(data, "PNG")
        return data.getvalue()


def read_picture(file: str | os.PathLike[str]) -> Image.Image:
    """Read a picture from a file or s3:// URL. Raises `DataError` if it is missing or not a picture."""
    name = os.fspath(file)
    if not store.exists(name):
        raise DataError(f"{name}: no such picture")
    return opened(store.read_bytes(name), name)


def stored(file: Path) -> Image.Image:
    """Open a picture file, also if its file system fails for a while. Raises `DAMAGED` or `StoreError`."""
    return Image.open(io.BytesIO(persist(str(file), file.read_bytes, PATIENCE)))


def opened(data: bytes, name: str) -> Image.Image:
    """Return the picture in an encoded file. Raises `DataError`, naming `name`, if it is none."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: not a readable picture ({error})") from error
    return image


def seeds_of(generator: Any) -> int | list[int]:
    """Return the seed of a `torch.Generator`, or the number itself; None gives 0, and a list one seed for each. The
    state of a generator does not matter, since noise here is a function of the seed.

    Raises:
        ConfigError: any other value.
    """
    if isinstance(generator, (list, tuple)):
        return [_seed_of(one) for one in generator]
    return 0 if generator is None else _seed_of(generator)


def _seed_of(generator: Any) -> int:
    if isinstance(generator, torch.Generator):
        return int(generator.initial_seed()) % 2**63
    if isinstance(generator, (int, np.integer)):
        return int(generator)
    raise ConfigError(f"generator={type(generator).__name__}: give a torch.Generator or a seed, or a list of them")


def _image(picture: Any) -> Image.Image:
    """Return the picture in RGB and upright, converted like training pictures."""
    found = _rgb(picture)
    if 0 in found.size:
        raise ConfigError("a picture without pixels: give one of at least 1 x 1")
    return found


def _rgb(picture: Any) -> Image.Image:
    if isinstance(picture, (str, os.PathLike)):
        picture = read_picture(picture)
    if isinstance(picture, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(picture))
        except BadSample as error:
            raise ConfigError(f"this picture cannot be used: {error.detail}") from error
    array = picture.permute(1, 2, 0).cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        raise ConfigError(f"a picture with {array.dtype} values: give PIL images or uint8 values")
    if array.ndim != 2 and array.shape[2:] not in ((3,), (4,)):
        raise ConfigError(f"a picture of shape {array.shape}: give (H, W, 3), or a tensor (N, 3, H, W)")
    return to_rgb(Image.fromarray(array))


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _fit(image: Image.Image, size: Size, kernel: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    return image if image.size == _sides(size) else ImageOps.fit(image, _sides(size), kernel)
