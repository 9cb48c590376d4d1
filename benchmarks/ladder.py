"""The gain from single ingredients on a ladder of small tasks: paired trainings of stages with and without each.

    python benchmarks/ladder.py OUTPUT [ingredients=muon,x_pred_v_loss+muon] [scene=one] [model=small] [seeds=3]
        [steps=400] [batch=32] [size=16] [widths=32,64] [stage=demo_base] [factor=2] [network=] [equal_time=false]
        [pictures=PATTERN] [dino=DIRECTORY] [dino_side=224] [device=cpu]

    OUTPUT/settings.json   the settings that all arms share; other settings need another OUTPUT
    OUTPUT/results.jsonl   one line per run; repeating the command trains only what is missing
    OUTPUT/paces.json      with equal_time, the time of a step of each arm, in steps of `none`
    OUTPUT/ladder.md       the tables
    OUTPUT/ARM-SEED.png    sampled pictures; for super-resolution, above them the true and the interpolated ones

    scene   one, relations (two objects), three, four (of different colours), counts (two to four equal ones)
    model   small (16 px), medium (32 px), large (64 px, 106e6 parameters, for a GPU); see MODELS
    stage   a stage of conf/stage, whose diffusion and sampler settings `none` uses (with the demo's guidance); the
            network is that of `model`. A super-resolution stage (demo_sr, sr256) makes pictures of `size`, twice that
            of the same model's base stage, from pictures `factor` times smaller (sr256 itself has 4). An
            ingredient `base64:` or `base64:muon+min_snr` has another stage's settings instead, and one may set
            single keys: `residual+stage.diffusion.shift_from=0`
    network=efficient   an Efficient U-Net whose channels hold all values of a patch, as that of sr256 and sr1024 (their
            default): 2x2 pixels of noise and of low-res picture, 24 values, in 32 channels. A network that folds 4x4
            pixels, 96 values, into 32 channels (network=preset) cannot pass the noise on, as a v output must
    equal_time=true   `steps` are those of `none`; each other arm takes as many as fit into the same CPU time
    widths= blocks=   the whole network of the preset: with stage=demo_base, that of the demo
    pictures=FOLDER or SHARD.tar   crops of photographs, without captions, instead of drawn scenes
    dino=DIRECTORY    dino.path of the ingredients repa and perceptual: a DINOv2 model, which sees pictures resized to
            about dino_side pixels; benchmarks/scene_encoder.py makes a stand-in

For each seed, all arms get the same pictures in the same order, the same initial weights, text dropout and noise: these
are functions of (seed, position, stream). The arm `none` is the experiment with `ingredient=[]`. An arm that only
changes sampling (guidance_interval) draws with the network of `none`. `cascade ablate` does the same for your own stage
and data; the ladder needs neither shards nor the files of a run, and reads words from the pictures that it draws.

Three figures, computed with the averaged weights on held-out combinations of words (or photographs):
  error    the mean over fixed log-SNRs (LEVELS) of the logarithm of the x0 error, which does not depend on schedule,
           weighting or parametrisation. Differences are relative changes of the error.
  words    the share of words (background, colour, size, shape, relation) that the oracle reads correctly in sampled
           pictures; only for one object, or two and their relation, and not for super-resolution, which is shown them.
  psnr     super-resolution only: that of pictures sampled from held-out low-res pictures, against the true ones, in dB;
           `bicubic` is that of the low-res pictures interpolated, with the noise of stage.sampler.aug_level as sampling
           adds it, `clean_bicubic` without. A right sample is no best guess: its PSNR is 3 dB below that of the mean of
           all right samples, so that interpolation, which adds no detail, can have the higher PSNR. Hence also
           `detail`, the variance within the pixels of the low-res picture, relative to that of the true pictures (1 is
           right), and `kept`, the PSNR of the sampled pictures, reduced, against their low-res pictures, in dB.
A gain is the mean over seeds of the paired difference, with Student's 95 % interval over seeds; `detectable` is the
gain that this many seeds would detect with a power of 80 % (training/ablation/gains.py).
"""

from __future__ import annotations

import functools
import json
import math
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from data_pipeline.common.errors import ConfigError
from data_pipeline.content.images import training_view
from data_pipeline.content.synthetic import ShapeSpec, caption, crowd_at, example, render
from data_pipeline.order.chance import hash_bits
from data_pipeline.reading.loader import Batch
from training.ablation.gains import Gain, gain, percent, verdict
from training.cascade.requests import to_uint8
from training.cli.compose import load_config
from training.config.experiment import Experiment, StageConfig
from training.config.unet import PRESETS
from training.diffusion.denoiser import to_unit, upsample
from training.diffusion.objective import loss
from training.diffusion.sampler import augmented, sample_stage
from training.evaluation import oracle
from training.evaluation.metrics.psnr import psnr
from training.processes.ranks import Ranks
from training.run.training_state import TrainingState
from training.text.encoder import build_text_encoder

LEVELS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""log-SNRs at which every arm is measured."""
HELDOUT, SAMPLES, QUESTION_SEED = 64, 64, 20_220_523
SHOWN, ENLARGED, LONGEST = 12, 4, 200
"""Pictures in a strip, their magnification, and the most letters of an arm in its file's name."""
MOST_PICTURES = 4000
"""Most different pictures in a run; after that they repeat."""
DRAWN = {"one": (1, False), "relations": (2, False), "three": (3, False), "four": (4, False), "counts": (4, True)}
"""Scene -> number of objects, and whether they are equal."""
MODELS: dict[str, dict[str, Any]] = {
    "small": {"size": 16, "widths": "32,64", "blocks": "1,1", "preset": "demo_base", "steps": 400, "batch": 32},
    "medium": {"size": 32, "widths": "64,128", "blocks": "2,2", "preset": "demo_base", "steps": 1000, "batch": 32},
    "large": {"size": 64, "widths": "", "blocks": "", "preset": "base64_100m", "steps": 5000, "batch": 256},
}
"""Model -> default values of the options with these names."""
SUPER_RESOLUTION = {"demo_base": "demo_sr", "base64_100m": "sr256_100m"}
"""Preset of a base stage -> that of the same model's super-resolution stage, whose pictures are twice as large."""
DEFAULTS = {
    "stage": "demo_base",
    "pictures": "",
    "equal_time": "false",
    "dino": "",
    "dino_side": "224",
    "factor": 2,
    "network": "preset",
}
NETWORKS = {"preset": (), "efficient": ("stage.model.overrides.patch=2", "stage.model.overrides.efficient=true")}
SHARED = ("scene", "model", "size", "widths", "blocks", "preset", "steps", "batch", *DEFAULTS)
SAMPLED = {"words": ("words right", 100, "%", ".1f"), "psnr": ("PSNR", 1, "dB", ".2f")}
"""Figure of sampled pictures -> heading, factor, unit and format in the table."""
BESIDES = ("bicubic", "clean_bicubic", "detail", "kept")
"""Further figures of super-resolution, shown as means."""
PACED, ROUNDS = 10, 3
"""Steps of one measurement of an arm's pace, and how often it is repeated, in turns with `none`."""
RECIPE = ("optimizer.lr=2e-3", "optimizer.warmup_steps=50", "ema.decays=[0.995]", "stage.sampler.guidance=1.5")
"""The demo's settings, used for any stage."""
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class Pictures(NamedTuple):
    """Pictures with their captions."""

    images: torch.Tensor
    """uint8 (N, 3, H, W)."""
    text: torch.Tensor
    mask: torch.Tensor
    frames: torch.Tensor
    """fp32 (N, 6): see `View.frame`."""
    specs: list[ShapeSpec]
    """What drawn pictures show; empty for photographs."""
    low: torch.Tensor | None
    """uint8 (N, 3, H / factor, W / factor): input of super-resolution; None for a base stage."""

    def low_of(self, rows: torch.Tensor, device: str) -> torch.Tensor | None:
        """Return the low-res pictures with these indices, on the device."""
        return None if self.low is None else self.low[rows].to(device)


def drawn(indices: range, scene: str, size: int, seed: int, heldout: bool) -> list[tuple[np.ndarray, ShapeSpec]]:
    """Draw pictures of a scene, uint8 (size, size, 3); return each with what it shows."""
    objects, equal = DRAWN[scene]
    if scene in ("one", "relations"):
        return [example(i, size, seed, heldout, objects) for i in indices]
    specs = [crowd_at(i, seed, objects, equal, heldout) for i in indices]
    places = [hash_bits(seed, i, f"ladder place {heldout}") for i in indices]
    return [(render(spec, size, place), spec) for spec, place in zip(specs, places, strict=True)]


def photographs(pattern: str) -> list[bytes]:
    """Return the encoded pictures of a folder by path, or of a shard in archive order.

    Raises:
        SystemExit: it is neither, or the folder has fewer than four pictures.
    """
    path = Path(pattern)
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            members = [one for one in archive if one.name.lower().endswith(ENDINGS)]
            return [archive.extractfile(one).read() for one in members]  # type: ignore[union-attr]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS) if path.is_dir() else []
    if len(files) < 4:
        raise SystemExit(f"pictures={pattern}: it must be a .tar, or a folder with four pictures or more")
    return [file.read_bytes() for file in files]


def pictures(indices: range, config: Experiment, settings: dict[str, Any], heldout: bool) -> Pictures:
    """Make pictures `indices` of the training or held-out split; a quarter of the photographs is held out."""
    size, specs = settings["size"], []
    if settings["pictures"]:
        encoded = photographs(settings["pictures"])
        cut = len(encoded) * 3 // 4
        encoded = encoded[cut:] if heldout else encoded[:cut]
        views = [
            training_view(encoded[i % len(encoded)], size=size, crop="random", flip=0.5, seed=config.seed, position=i)
            for i in indices
        ]
        made, frames, captions = [v.high for v in views], [v.frame for v in views], [""] * len(views)
    else:
        both = drawn(indices, settings["scene"], size, config.seed, heldout)
        made, specs = [picture for picture, _ in both], [spec for _, spec in both]
        frames, captions = [(size, size, 0, 0, size, size)] * len(made), [caption(spec) for spec in specs]
    text, mask = build_text_encoder(config.text, "cpu").encode(captions)
    stacked = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()
    low = None
    if config.stage.is_super_resolution:  # each pixel the mean of its block, as `training_view` makes it
        low = torch.nn.functional.avg_pool2d(stacked.float(), settings["factor"]).round().byte()
    return Pictures(stacked, text, mask, torch.tensor(frames, dtype=torch.float32), specs, low)


@torch.no_grad()
def log_errors(model: Any, data: Pictures, config: Experiment, device: str) -> list[float]:
    """Return ln(mean x0 error) at each of LEVELS: fixed noise, no text dropout, no noise on the low-res picture."""
    diffusion, found = replace(config.stage.diffusion, text_drop=0.0, aug_max=0.0), []
    everyone = torch.arange(len(data.images))
    for level in LEVELS:
        _, each = loss(
            model,
            data.images.to(device),
            data.text.to(device),
            data.mask.to(device),
            config=diffusion,
            seed=QUESTION_SEED,
            positions=everyone,
            low_res=data.low_of(everyone, device),
            log_snr=torch.full((len(data.images),), level, device=device),
            sizes=data.frames.to(device),
        )
        found.append(math.log(each["x0_error"].mean().item()))
    return found


@torch.no_grad()
def sampled(model: Any, data: Pictures, config: Experiment, device: str) -> np.ndarray:
    """Return pictures sampled from the first SAMPLES captions (and low-res pictures), uint8 (SAMPLES, H, W, 3)."""
    made = sample_stage(
        model,
        data.text[:SAMPLES].to(device),
        data.mask[:SAMPLES].to(device),
        config=config.stage.diffusion,
        sampler=config.stage.sampler,
        image_size=data.images.shape[-1],
        seeds=range(SAMPLES),
        low_res=data.low_of(torch.arange(SAMPLES), device),
    )
    return in_bytes(made)


def in_bytes(made: torch.Tensor) -> np.ndarray:
    """Return pictures (N, 3, H, W) in [-1, 1] as uint8 (N, H, W, 3)."""
    return to_uint8(made).permute(0, 2, 3, 1).cpu().numpy()


def interpolated(data: Pictures, config: Experiment, aug_level: float) -> np.ndarray:
    """Return what `sampled` starts from: its low-res pictures, with its noise of this level, up-sampled."""
    assert data.low is not None
    side, low = data.images.shape[-1], to_unit(data.low[:SAMPLES])
    noised, _ = augmented(low, aug_level, range(SAMPLES), config.stage.diffusion, side)
    return in_bytes(upsample(noised, side))


def words_right(made: np.ndarray, specs: Sequence[ShapeSpec]) -> float:
    """Return the share of words that the oracle reads correctly in pictures (n, H, W, 3) of these specs."""
    right = []
    for picture, spec in zip(made, specs, strict=False):
        large = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC))
        right.append(np.mean(list(oracle.score(oracle.read_drawing(large, len(spec.objects)), spec).values())))
    return float(np.mean(right))


def strips(*rows: np.ndarray) -> Image.Image:
    """Return the first SHOWN pictures of each array (N, H, W, 3), a row for each array, enlarged."""
    whole = np.concatenate([np.concatenate(list(row[:SHOWN]), axis=1) for row in rows])
    return Image.fromarray(whole.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1))


def within(made: np.ndarray, factor: int) -> tuple[np.ndarray, float]:
    """Split pictures (N, H, W, 3) into the means (N, H / factor, W / factor, 3) of blocks of factor x factor pixels and
    the mean variance in the blocks of all pictures."""
    count, height, width, _ = made.shape
    blocks = made.astype(np.float64).reshape(count, height // factor, factor, width // factor, factor, 3)
    return blocks.mean((2, 4)), float(blocks.var((2, 4)).mean())


def judged(model: Any, data: Pictures, config: Experiment, device: str, drawing: Path) -> dict[str, float | None]:
    """Return `words` and `psnr` of sampled pictures, each None where it cannot be measured; for super-resolution also
    the other figures of the module's docstring. Write the first pictures to a file."""
    if data.low is not None:
        true = data.images[:SAMPLES].permute(0, 2, 3, 1).numpy()
        found = {
            "psnr": sampled(model, data, config, device),
            "bicubic": interpolated(data, config, config.stage.sampler.aug_level),
            "clean_bicubic": interpolated(data, config, 0.0),
        }
        strips(true, found["bicubic"], found["psnr"]).save(drawing)
        factor = config.stage.image_size // config.stage.low_res_size
        (low, sharpness), (reduced, own) = within(true, factor), within(found["psnr"], factor)
        dbs = {name: float(psnr(made, true).mean()) for name, made in found.items()}
        return {"words": None, **dbs, "detail": float(own / sharpness), "kept": float(psnr(reduced, low).mean())}
    if not data.specs or len(data.specs[0].objects) > 2 or data.specs[0].is_count:
        return {"words": None, "psnr": None}
    made = sampled(model, data, config, device)
    strips(made).save(drawing)
    return {"words": words_right(made, data.specs), "psnr": None}


def build(config: Experiment, device: str) -> TrainingState:
    """Return the state of a training with the initial weights of `config.seed`."""
    return TrainingState(config, Ranks(device=device), config.text.dim, 1, None)


def train(state: TrainingState, config: Experiment, data: Pictures, steps: range, device: str) -> None:
    """Train these steps on the pictures in order."""
    size = config.data.global_batch
    for step in steps:
        positions = torch.arange(step * size, (step + 1) * size)
        rows = positions % len(data.images)
        images, low, frames = data.images[rows].to(device), data.low_of(rows, device), data.frames[rows].to(device)
        batch = Batch(positions, [], images, low, [], frames=frames)
        mean, _ = state.loss(batch, data.text[rows], data.mask[rows], step)
        state.engine.backward(mean)
        state.engine.step(step, mean.detach())


def pace(arm: str, settings: dict[str, Any], device: str) -> float:
    """Return the CPU time of a step of an arm, in steps of `none`: the ratio of the fastest of ROUNDS measurements,
    since other work on the machine can only make a step slower."""
    configs = [config_of(name, 0, settings) for name in ("none", arm)]
    states, fastest = [build(config, device) for config in configs], [math.inf, math.inf]
    data = pictures(range(settings["batch"]), configs[0], settings, False)
    for number in range(ROUNDS):
        for i, config in enumerate(configs):
            began = time.process_time()
            train(states[i], config, data, range(number * PACED, (number + 1) * PACED), device)
            fastest[i] = min(fastest[i], time.process_time() - began)
    return fastest[1] / fastest[0]


def paces(path: Path, arms: Sequence[str], settings: dict[str, Any], device: str) -> dict[str, float]:
    """Return the pace of each arm, measured once and kept in a file: all seeds take the same number of steps."""
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {"none": 1.0}
    for arm in arms:
        if arm not in found:
            found[arm] = pace(arm, settings, device)
            path.write_text(json.dumps(found, indent=1))
    return found


def config_of(arm: str, seed: int, settings: dict[str, Any]) -> Experiment:
    """Return the settings of an arm: `none`, or ingredients and settings (KEY=VALUE) joined by +, after `STAGE:` if its
    stage is another."""
    return replace(_composed(arm, tuple(settings.items())), seed=seed)


@functools.cache
def _composed(arm: str, of_all: tuple[tuple[str, Any], ...]) -> Experiment:
    settings = dict(of_all)
    other, _, added = arm.rpartition(":")
    name = other or settings["stage"]
    parts = [] if added in ("", "none") else added.split("+")
    ingredients, keys = [part for part in parts if "=" not in part], [part for part in parts if "=" in part]
    words = [f"stage.model.preset={settings['preset']}"]
    if not PRESETS[settings["preset"]].efficient:
        words += NETWORKS[settings["network"]]
    if settings["widths"]:
        words.append(f"stage.model.overrides.widths=[{settings['widths']}]")
    if settings["blocks"]:
        words += [f"stage.model.overrides.blocks=[{settings['blocks']}]", "stage.model.overrides.head_dim=32"]
    if settings["dino"]:
        words += [f"dino.path={json.dumps(settings['dino'])}", f"dino.side={settings['dino_side']}"]
        words += [f"repa.width={4 * int(settings['widths'].split(',')[-1])}"] if settings["widths"] else []
    low = settings["size"] // settings["factor"] if _stage(name).is_super_resolution else 0
    words += [f"stage.low_res_size={low}", "stage.crop_size=0"] if low else []
    config = load_config(
        "train",
        [
            "experiment=demo",
            f"stage={name}",
            f"ingredient=[{','.join(ingredients)}]",
            f"stage.image_size={settings['size']}",
            *words,
            *RECIPE,
            f"train.steps={settings['steps']}",
            f"data.global_batch={settings['batch']}",
            *(["text.max_tokens=40"] if settings["scene"] in ("three", "four") else []),
            "zero=zero0",
            "cluster.processes=1",
            *keys,
        ],
    )
    diffusion = config.stage.diffusion
    if not low or not diffusion.shift_from:
        return config
    return replace(config, stage=replace(config.stage, diffusion=replace(diffusion, shift_from=low)))


@functools.cache
def _stage(name: str) -> StageConfig:
    """As conf/stage has it."""
    return load_config("train", ["experiment=demo", f"stage={name}"]).stage


# --------------------------------------------------------------------------------------------------------- tables


def gains_of(lines: Sequence[dict[str, Any]], arm: str, figure: Any) -> Gain:
    """Return the gain of an arm over `none`, over the seeds that both have."""
    own, none = ({line["seed"]: figure(line) for line in lines if line["arm"] == name} for name in (arm, "none"))
    return gain([own[seed] - none[seed] for seed in sorted({*own} & {*none})])


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return two Markdown tables: gains, and gains by noise level (bold if the interval excludes 0)."""
    arms = list(dict.fromkeys(line["arm"] for line in lines))
    none = [line for line in lines if line["arm"] == "none"]
    drawn_well = next((one for one in SAMPLED if all(line.get(one) is not None for line in lines)), None)
    title, factor, unit, form = SAMPLED.get(drawn_well or "", ("", 1, "", ""))
    said = [
        f"| ingredient | x0 error | detectable | {f'{title} | detectable | ' if drawn_well else ''}time |",
        "|---|---|---|" + ("---|---|" if drawn_well else "") + "---|",
    ]
    error = math.exp(float(np.mean([line["error"] for line in none])))
    own = f"{format(np.mean([factor * line[drawn_well] for line in none]), form)} {unit} | | " if drawn_well else ""
    said.append(f"| none | {error:.4f} | | {own}1 |")
    for arm in arms:
        if arm == "none":
            continue
        found = gains_of(lines, arm, lambda line: line["error"])
        row = f"| {arm} | {_in_percent(found)} | {-percent(-found.detectable):.1f} % "
        if drawn_well:
            better = gains_of(lines, arm, lambda line: factor * line[drawn_well])
            shown = f"{better.mean:+{form}} ± {better.half:{form}} {'points' if unit == '%' else unit}"
            row += f"| {f'**{shown}**' if better.is_seen else shown} | {better.detectable:{form}} "
        clock = _seconds(lines, arm) / _seconds(lines, "none") if _seconds(lines, "none") else math.nan
        said.append(f"{row}| {clock:.2f} |" if math.isfinite(clock) else f"{row}| |")
    said += ["", "| x0 error at log-SNR | " + " | ".join(f"{level:g}" for level in LEVELS) + " |"]
    said.append("|---" * (len(LEVELS) + 1) + "|")
    means = [math.exp(float(np.mean([line["levels"][i] for line in none]))) for i in range(len(LEVELS))]
    said.append("| none | " + " | ".join(f"{mean:.2g}" for mean in means) + " |")
    for arm in arms:
        if arm != "none":
            cells = [_short(gains_of(lines, arm, lambda line, i=i: line["levels"][i])) for i in range(len(LEVELS))]
            said.append(f"| {arm} | " + " | ".join(cells) + " |")
    columns = [name for name in ("psnr", *BESIDES) if all(line.get(name) is not None for line in lines)]
    if len(columns) > 1:
        said += ["", f"| mean | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for arm in arms:
            means = [float(np.mean([line[name] for line in lines if line["arm"] == arm])) for name in columns]
            said.append(f"| {arm} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(said) + "\n"


def _seconds(lines: Sequence[dict[str, Any]], arm: str) -> float:
    """CPU seconds of an arm's trainings, on average; not a number where one is not recorded."""
    return float(np.mean([line.get("seconds") or math.nan for line in lines if line["arm"] == arm]))


def _in_percent(found: Gain) -> str:
    low, high = percent(found.mean - found.half), percent(found.mean + found.half)
    shown = f"{percent(found.mean):+.1f} % ({low:+.1f} to {high:+.1f})"
    return f"**{shown}**" if verdict(found) != "undecided" else shown


def _short(found: Gain) -> str:
    return f"**{percent(found.mean):+.0f} %**" if found.is_seen else f"{percent(found.mean):+.0f} %"


# ----------------------------------------------------------------------------------------------------------- main


def settings_of(given: dict[str, str]) -> dict[str, Any]:
    """Return the settings that all arms share.

    Raises:
        SystemExit: an option, model or scene does not exist.
    """
    equal_time = given.get("equal_time", "false")
    if equal_time not in ("true", "false"):
        raise SystemExit(f"equal_time={equal_time}: it must be true or false")
    unknown = {*given} - {*SHARED, "ingredients", "seeds", "device"}
    model, scene = given.get("model", "small"), given.get("scene", "one")
    if unknown or model not in MODELS or scene not in DRAWN:
        wrong = ", ".join(sorted(unknown)) or f"model={model} scene={scene}"
        raise SystemExit(
            f"{wrong}: not known; models are {', '.join(MODELS)}, scenes {', '.join(DRAWN)}, words "
            f"{', '.join((*SHARED, 'ingredients', 'seeds', 'device'))}"
        )
    base: dict[str, Any] = {**DEFAULTS, **MODELS[model]}
    stage = _stage(given.get("stage", "demo_base"))
    if stage.is_super_resolution:
        base |= {"preset": SUPER_RESOLUTION[base["preset"]], "size": 2 * base["size"]}
        base["network"] = "efficient" if PRESETS[stage.model.preset].efficient else "preset"
    found = {**base, **given, "model": model, "scene": scene}
    if found["network"] not in NETWORKS:
        raise SystemExit(f"network={found['network']}: it must be {' or '.join(NETWORKS)}")
    if int(found["size"]) % int(found["factor"]):
        raise SystemExit(f"factor={found['factor']}: size={found['size']} must be a multiple of it")
    return {key: int(found[key]) if key in ("size", "steps", "batch", "factor") else found[key] for key in SHARED}


def main(words: list[str]) -> None:
    """Train what is missing and print the tables."""
    output = Path(words[0])
    given = dict(word.split("=", 1) for word in words[1:])
    settings, device = settings_of(given), given.get("device", "cpu")
    arms = ["none", *given.get("ingredients", "x_pred_v_loss,sigmoid_weighting,min_snr,muon").split(",")]
    seeds = int(given.get("seeds", 3))
    if seeds < 2:
        raise SystemExit(f"seeds={seeds}: an interval needs at least two seeds")
    for arm in arms:
        try:
            config_of(arm, 0, settings)
        except ConfigError as error:
            raise SystemExit(f"ingredients={arm}: {error}") from error
    output.mkdir(parents=True, exist_ok=True)
    results, shared = output / "results.jsonl", output / "settings.json"
    before = {**settings, **DEFAULTS, **(json.loads(shared.read_text()) if shared.exists() else settings)}
    if before != settings:
        changed = next(key for key in SHARED if before.get(key) != settings[key])
        raise SystemExit(
            f"{changed}={settings[changed]}: {output} was made with {before.get(changed)}; choose another directory"
        )
    shared.write_text(json.dumps(settings, indent=1))
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    steps_of = dict.fromkeys(arms, settings["steps"])
    if settings["equal_time"] == "true":
        found = paces(output / "paces.json", arms, settings, device)
        steps_of = {arm: round(settings["steps"] / found[arm]) for arm in arms}
    for seed in range(seeds):
        missing = [arm for arm in arms if (arm, seed) not in {(line["arm"], line["seed"]) for line in lines}]
        if not missing:
            continue
        first = config_of("none", seed, settings)
        data = pictures(range(min(settings["steps"] * settings["batch"], MOST_PICTURES)), first, settings, False)
        heldout = pictures(range(HELDOUT), first, settings, True)
        trained: list[tuple[Any, TrainingState, float]] = []
        for arm in missing:
            config = config_of(arm, seed, {**settings, "steps": steps_of[arm]})
            stage, features = config.stage, (config.repa, config.perceptual)
            learns = (stage.diffusion, stage.model, config.optimizer, config.train.steps, *features)
            same = next((one for one in trained if one[0] == learns), None)
            if same is None:
                state, began = build(config, device), time.process_time()
                train(state, config, data, range(config.train.steps), device)
                same = (learns, state, time.process_time() - began)
                trained.append(same)
            _, state, seconds = same
            with state.engine.averaged() as model:
                levels = log_errors(model, heldout, config, device)
                line = {
                    "arm": arm,
                    "seed": seed,
                    "error": sum(levels) / len(levels),
                    "levels": levels,
                    **judged(model, heldout, config, device, output / f"{arm[:LONGEST]}-{seed}.png"),
                    "seconds": round(seconds, 1),
                    "steps": steps_of[arm],
                }
            lines.append(line)
            print(json.dumps(line), flush=True)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    said = table([line for line in lines if line["arm"] in arms and line["seed"] < seeds])
    (output / "ladder.md").write_text(said)
    print(said)


if __name__ == "__main__":
    main(sys.argv[1:])
