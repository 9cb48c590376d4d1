"""The gain of single ingredients: small base stages trained on drawn scenes, with and without each, paired.

    python benchmarks/ladder.py OUTPUT [ingredients=muon,x_pred_v_loss+muon] [experiment=demo] [size=16] [objects=1]
        [widths=32,64] [steps=250] [batch=32] [seeds=3]

    OUTPUT/results.jsonl   one line per run; the same command again trains only what is missing
    OUTPUT/ladder.md       the table

Of each seed, all arms see the same pictures in the same order, the same initial weights, text dropout and noise: these
are functions of (seed, position, stream). The arm `none` is the experiment with `ingredient=[]`. An arm that changes
sampling alone (guidance_interval) draws with the network of `none`.

Two figures of the averaged weights, on held-out combinations of words:
  error    the mean over fixed log-SNRs (LEVELS) of the logarithm of the x0 error: a question that depends on neither
           schedule, weighting nor parametrisation. Differences are relative changes of the error.
  words    the share of words (background, colour, size, shape) that the oracle reads right in sampled pictures.
A gain is the mean over seeds of the paired difference, with Student's 95 % interval over seeds; `detectable` is the
gain that this many seeds would show four times in five. Half of it costs four times the seeds.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.content.synthetic import caption, example
from training.cli.compose import load_config
from training.config.experiment import Experiment
from training.config.unet import for_stage
from training.diffusion.objective import loss
from training.diffusion.sampler import sample_stage
from training.engine.start import build_engine
from training.evaluation import oracle
from training.model.unet import UNet
from training.processes.ranks import Ranks
from training.text.encoder import build_text_encoder

LEVELS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""log-SNRs at which every arm is asked."""
HELDOUT, SAMPLES, QUESTION_SEED = 64, 64, 20_220_523
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Two-sided 95 % quantile by number of seeds."""
POWER = 0.8416
"""Normal quantile of four times in five."""

Pictures = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Any]]


def pictures(indices: range, config: Experiment, size: int, objects: int, heldout: bool) -> Pictures:
    """uint8 pictures (N, 3, H, W), their text (N, T, D), its mask, and what they show."""
    made = [example(i, size, config.seed, heldout, objects) for i in indices]
    encoder = build_text_encoder(config.text, "cpu")
    text, mask = encoder.encode([caption(spec) for _, spec in made])
    stacked = torch.from_numpy(np.stack([picture for picture, _ in made])).permute(0, 3, 1, 2).contiguous()
    return stacked, text, mask, [spec for _, spec in made]


@torch.no_grad()
def log_errors(model: Any, data: Pictures, config: Experiment) -> list[float]:
    """ln(mean x0 error) at each of LEVELS, with fixed noise and no text dropout."""
    images, text, mask, _ = data
    diffusion, found = config.stage.diffusion, []
    kept, diffusion.text_drop = diffusion.text_drop, 0.0
    for level in LEVELS:
        _, each = loss(
            model,
            images,
            text,
            mask,
            config=diffusion,
            seed=QUESTION_SEED,
            positions=torch.arange(len(images)),
            log_snr=torch.full((len(images),), level),
        )
        found.append(math.log(each["x0_error"].mean().item()))
    diffusion.text_drop = kept
    return found


@torch.no_grad()
def words_right(model: Any, data: Pictures, config: Experiment) -> float:
    """Share of words that the oracle reads right in pictures sampled from held-out captions."""
    images, text, mask, specs = data
    size, right = images.shape[-1], []
    drawn = sample_stage(
        model,
        text[:SAMPLES],
        mask[:SAMPLES],
        config=config.stage.diffusion,
        sampler=config.stage.sampler,
        image_size=size,
        seeds=range(SAMPLES),
    )
    for picture, spec in zip(((drawn + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), specs, strict=False):
        large = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC))
        right.append(np.mean(list(oracle.score(oracle.read_drawing(large, len(spec.objects)), spec).values())))
    return float(np.mean(right))


def train(config: Experiment, data: Pictures, size: int) -> Any:
    """The engine after `train.steps` steps on the pictures in their order."""
    torch.manual_seed(config.seed)
    images, text, mask, _ = data
    engine = build_engine(UNet(for_stage(config.stage, config.text.dim)), config, Ranks())
    batch = config.data.global_batch
    for step in range(config.train.steps):
        positions = torch.arange(step * batch, (step + 1) * batch)
        rows = positions % len(images)
        mean, _ = loss(
            engine,
            images[rows],
            text[rows],
            mask[rows],
            config=config.stage.diffusion,
            seed=config.seed,
            positions=positions,
            image_size=size,
            global_batch=batch,
        )
        engine.backward(mean)
        engine.step(step, mean.detach())
    return engine


def row(name: str, arm: list[float], none: list[float]) -> dict[str, float]:
    """Mean paired difference over seeds, half its 95 % interval, and the smallest gain that is likely to be seen."""
    apart = np.array(arm) - np.array(none)
    error = float(apart.std(ddof=1) / math.sqrt(len(apart)))
    return {
        "gain": float(apart.mean()),
        "half": STUDENT[len(apart)] * error,
        "detectable": (STUDENT[len(apart)] + POWER) * error,
    }


def table(lines: list[dict[str, Any]], seeds: int) -> str:
    """The results as Markdown."""
    by = {(line["arm"], line["seed"]): line for line in lines}
    said = [
        "| ingredient | x0 error at fixed levels | detectable | words right | detectable | time |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        mine = [by[arm, seed] for seed in range(seeds)]
        none = [by["none", seed] for seed in range(seeds)]
        clock = sum(line["seconds"] for line in mine) / sum(line["seconds"] for line in none)
        if arm == "none":
            error, words = (float(np.mean([line[key] for line in mine])) for key in ("error", "words"))
            said.append(f"| none | {math.exp(error):.4f} | | {words:.1%} | | 1 |")
            continue
        error_row, words_row = (row(arm, [m[key] for m in mine], [n[key] for n in none]) for key in ("error", "words"))
        said.append(
            f"| {arm} | {error_row['gain']:+.1%} ± {error_row['half']:.1%} | {error_row['detectable']:.1%} "
            f"| {100 * words_row['gain']:+.1f} ± {100 * words_row['half']:.1f} points "
            f"| {100 * words_row['detectable']:.1f} | {clock:.2f} |"
        )
    return "\n".join(said) + "\n"


def main(words: list[str]) -> None:
    """Trains what is missing and prints the table."""
    output = Path(words[0])
    given = dict(word.split("=", 1) for word in words[1:])
    names = given.get("ingredients", "x_pred_v_loss,sigmoid_weighting,min_snr,muon").split(",")
    size, objects, seeds = (int(given.get(k, d)) for k, d in (("size", 16), ("objects", 1), ("seeds", 3)))
    if seeds not in STUDENT:
        raise SystemExit(f"seeds={seeds}: it must be one of {', '.join(map(str, STUDENT))}")
    steps, batch = int(given.get("steps", 250)), int(given.get("batch", 32))
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(line["arm"], line["seed"]) for line in lines}
    for seed in range(seeds):
        data = heldout = None
        trained: list[tuple[Any, Any, float]] = []
        for arm in ("none", *names):
            if (arm, seed) in done:
                continue
            config = load_config(
                "train",
                [
                    f"experiment={given.get('experiment', 'demo')}",
                    f"ingredient=[{'' if arm == 'none' else arm.replace('+', ',')}]",
                    f"stage.image_size={size}",
                    f"stage.model.overrides.widths=[{given.get('widths', '32,64')}]",
                    "stage.model.overrides.blocks=[1,1]",
                    "stage.model.overrides.head_dim=32",
                    f"train.steps={steps}",
                    f"data.global_batch={batch}",
                    f"seed={seed}",
                    "zero=zero0",
                    "cluster.processes=1",
                ],
            )
            if data is None or heldout is None:
                data = pictures(range(min(steps * batch, 4000)), config, size, objects, heldout=False)
                heldout = pictures(range(HELDOUT), config, size, objects, heldout=True)
            learns = (config.stage.diffusion, config.stage.model, config.optimizer)
            same = next((one for one in trained if one[0] == learns), None)
            if same is None:
                began = time.process_time()
                engine = train(config, data, size)
                same = (learns, engine, time.process_time() - began)
                trained.append(same)
            _, engine, seconds = same
            with engine.averaged() as model:
                levels = log_errors(model, heldout, config)
                line = {
                    "arm": arm,
                    "seed": seed,
                    "error": sum(levels) / len(levels),
                    "levels": levels,
                    "words": words_right(model, heldout, config),
                    "seconds": round(seconds, 1),
                }
            lines.append(line)
            print(json.dumps(line), flush=True)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    said = table(lines, seeds)
    (output / "ladder.md").write_text(said)
    print(said)


if __name__ == "__main__":
    main(sys.argv[1:])
