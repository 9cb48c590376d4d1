"""`cascade ablate`: measures what ingredients gain for your own stage on your own data.

    OUTPUT/ARM/seed-#/    the trainings: ordinary runs, which `cascade status` lists and `cascade bundle` accepts
    OUTPUT/ablate.json    errors of every training, gains with their intervals, changed settings, cost
    OUTPUT/ablate.png     gains by noise level

Trainings with the same seed share data, order, initial weights, text dropout and noise, so their differences are
paired. All are measured in the same way: by the x0 error of the averaged weights on held-out samples at fixed log-SNRs.
The validation loss would not be comparable, since its weighting and noise levels change with the ingredient.

Repeating the command resumes it; with more seeds or ingredients, it only runs the missing trainings. Trainings done
elsewhere (`cascade launch` with the overrides that dry_run prints) count too.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.progress import progress
from data_pipeline.reading.loader import Batch
from training.ablation.arms import EXPERIMENT, Arm, Comparison, arms_of, is_done
from training.ablation.gains import Gain, gain, percent, verdict
from training.checkpoint.provenance import code_version
from training.cli.overrides import typed_words
from training.config.commands import AblateCommand
from training.config.experiment import Experiment
from training.pictures.intervals import panels
from training.pictures.sheets import save
from training.plan.checks import check_named, heldout_apart, validation_shards
from training.processes.launcher import launch
from training.processes.ranks import Ranks, read_ranks
from training.run.directory import RunDir, json_lines, replace_file, try_to_write

RESULT, PICTURE = "ablate.json", "ablate.png"
MEAN = "mean"
"""Key of the mean over the levels, all weighted equally."""


def main(config: AblateCommand) -> dict[str, Any]:
    """Run the missing trainings, measure all of them, and report what each ingredient gains.

    Returns:
        The content of ablate.json; with `ablate.dry_run`, only `output` and `trainings`, the command of each training.

    Raises:
        ConfigError: no ingredient, no held-out data, or settings that cannot be trained or compared.
        SystemExit: a training failed or was stopped; repeating the command resumes.
    """
    if read_ranks() is not None:
        raise ConfigError("cascade ablate starts the processes of its trainings itself: run it once, without srun")
    words = typed_words()
    arms, comparisons = arms_of(words, config)
    output = Path(config.ablate.output or f"{config.run.dir}-ablation")
    base = arms[0].config
    check_question(base, arms, config.ablate.levels)
    if config.ablate.dry_run:
        return show(arms, comparisons, output, config.ablate.seeds)
    try_to_write(output, "ablate.output")
    train_all(arms, output, config.ablate.seeds)
    errors = measure_arms(arms, output, config)
    result = {
        "output": str(output),
        "words": words,
        "levels": config.ablate.levels,
        "seeds": [base.seed + number for number in range(config.ablate.seeds)],
        "samples": base.validation.samples,
        "heldout": validation_shards(base)[1],
        "steps": base.train.steps,
        "arms": {
            arm.name: {"ingredients": arm.ingredients, "errors": errors[arm.name], **_cost(arm, output, config)}
            for arm in arms
        },
        "code": code_version(),
    }
    result["gains"] = {one.name: gains_of(one, result) for one in comparisons}
    replace_file(output / RESULT, json.dumps(result, indent=1))
    save(gains_picture(result), output / PICTURE)
    print(gains_table(result))
    print(f"{output / PICTURE}: by noise level; {output / RESULT}: all figures")
    return result


def check_question(base: Experiment, arms: Sequence[Arm], levels: Sequence[float]) -> None:
    """Check that there are held-out pictures, separate from the training data, and that all arms train at the levels to
    be measured.

    Raises:
        ConfigError: otherwise; the message names the key.
    """
    from data_pipeline.shards.mixture import open_dataset
    from training.diffusion.schedule import Schedule

    check_named("train", base)
    if not validation_shards(base)[1]:
        raise ConfigError("validation.shards: name the held-out shards on which to measure the arms")
    for arm in arms:
        stage = arm.config.stage
        schedule = Schedule.of(stage.diffusion, stage.image_size)
        outside = [level for level in levels if not schedule.low <= level <= schedule.high]
        if outside:
            raise ConfigError(
                f"ablate.levels={list(levels)}: {arm.name} is trained at log-SNRs from {schedule.low:g} to "
                f"{schedule.high:g}; leave out {', '.join(f'{level:g}' for level in outside)}"
            )
    heldout_apart(base, open_dataset(base.data).urls)


def show(arms: Sequence[Arm], comparisons: Sequence[Comparison], output: Path, seeds: int) -> dict[str, Any]:
    """Print the settings in which arms differ and the command of each training; return the output directory and these
    commands by ARM/seed-#."""
    for one in comparisons:
        print(f"{one.name}: {one.with_it} against {one.without}")
        for key, without, with_it in one.changes:
            print(f"  {key}: {without} -> {with_it}")
    trainings = {f"{arm.name}/seed-{number}": arm.command(output, number) for number in range(seeds) for arm in arms}
    for command in trainings.values():
        print(command)
    return {"output": str(output), "trainings": trainings}


def train_all(arms: Sequence[Arm], output: Path, seeds: int) -> None:
    """Run the missing trainings, all arms of one seed before the next, so that an interruption leaves complete pairs.

    Raises:
        SystemExit: a training failed or was stopped.
    """
    runs = [(arm, number, arm.run(output, number)) for number in range(seeds) for arm in arms]
    missing = [(arm, number, run) for arm, number, run in runs if not is_done(run)]
    if len(missing) < len(runs):
        print(f"{len(runs) - len(missing)} of {len(runs)} trainings are done already", flush=True)
    for place, (arm, _, run) in enumerate(missing, len(runs) - len(missing) + 1):
        print(f"==> training {place} of {len(runs)}: {arm.name}, seed {run.seed}", flush=True)
        launch("training.train", run)


def measure_arms(arms: Sequence[Arm], output: Path, config: AblateCommand) -> dict[str, list[list[float]]]:
    """Return the mean x0 error by arm, seed and level.

    All arms are measured on the held-out samples with the data and validation settings of the experiment's own arm.
    """
    import torch

    from training.cascade.bundle import collect, load_unet
    from training.run.validation import Validation
    from training.text.encoder import build_text_encoder
    from training.text.identity import pinned

    ranks = Ranks(device="cuda:0" if config.cluster.gpus and torch.cuda.is_available() else "cpu")
    found: dict[str, list[list[float]]] = {}
    with progress(total=len(arms) * config.ablate.seeds, desc="measuring", unit="training") as bar:
        for arm in arms:
            text = build_text_encoder(pinned(arm.config.text), ranks.device)
            question = replace(arm.config, data=arms[0].config.data, validation=arms[0].config.validation)
            validation = Validation(question, ranks, partial(_encoded, text))
            found[arm.name] = []
            for number in range(config.ablate.seeds):
                weights = collect([RunDir(arm.run(output, number)).checkpoints]).stages[0]
                unet = load_unet(weights).to(ranks.device)
                found[arm.name].append(validation.at_levels(unet, config.ablate.levels))
                bar.update()
    return found


def _encoded(encoder: Any, batch: Batch) -> tuple[Any, Any]:
    return encoder.encode(batch.captions)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------- figures


def gains_of(one: Comparison, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the gain at each level and of their mean, as the change of the x0 error in per cent (negative is better),
    with the cost of the comparison."""
    without, with_it = (result["arms"][name] for name in (one.without, one.with_it))
    pairs = list(zip(without["errors"], with_it["errors"], strict=True))
    by_level = [
        gain([math.log(b[place]) - math.log(a[place]) for a, b in pairs]) for place in range(len(result["levels"]))
    ]
    mean = gain([statistics.fmean(math.log(y) - math.log(x) for x, y in zip(a, b, strict=True)) for a, b in pairs])
    more = mean.seeds_for_half - mean.seeds
    hours = [arm["device_hours"] for arm in (without, with_it)]
    seconds = [arm["step_seconds"] for arm in (without, with_it)]
    return {
        "with": one.with_it,
        "without": one.without,
        "changes": {key: [before, after] for key, before, after in one.changes},
        MEAN: _as_dict(mean),
        "by_level": [_as_dict(each) for each in by_level],
        "time": seconds[1] / seconds[0] if None not in seconds else None,
        "half": {
            "seeds": mean.seeds_for_half,
            "trainings": 2 * more,
            "device_hours": more * sum(hours) if None not in hours else None,
        },
    }


def _as_dict(found: Gain) -> dict[str, Any]:
    return {
        "percent": percent(found.mean),
        "interval": [percent(found.mean - found.half), percent(found.mean + found.half)],
        "detectable": -percent(-found.detectable),
        "verdict": verdict(found),
    }


def _cost(arm: Arm, output: Path, config: AblateCommand) -> dict[str, float | None]:
    """Return means over seeds of a training's device hours and of its median step time in seconds; None where a seed
    has no record of them."""
    hours, seconds = [], []
    for number in range(config.ablate.seeds):
        lines = json_lines(Path(arm.run(output, number).run.dir) / "metrics.jsonl")
        lines = [line for line in lines if {"device_hours", "step_seconds"} <= {*line}]
        if lines:
            hours.append(lines[-1]["device_hours"])
            seconds.append(statistics.median(line["step_seconds"] for line in lines))
    if len(hours) < config.ablate.seeds:
        return {"device_hours": None, "step_seconds": None}
    return {"device_hours": statistics.fmean(hours), "step_seconds": statistics.fmean(seconds)}


# ---------------------------------------------------------------------------------------------------------- shown


def gains_picture(result: Mapping[str, Any]) -> Any:
    """Plot the gains by level, one panel per ingredient."""
    rows = {}
    for name, found in result["gains"].items():
        row = [(f"{level:g}", each) for level, each in zip(result["levels"], found["by_level"], strict=True)]
        row += [(MEAN, found[MEAN])] if len(row) > 1 else []
        rows[f"{name}: {found[MEAN]['verdict']} on average"] = [
            (label, each["percent"], *each["interval"]) for label, each in row
        ]
    title = f"change of the x0 error by log-SNR (left: noisy), {len(result['seeds'])} seeds, 95 %; below 0 is better"
    return panels(title, rows)


def gains_table(result: Mapping[str, Any]) -> str:
    """Return the gains as text for the terminal."""
    n, levels = len(result["seeds"]), result["levels"]
    lines = [["ingredient", "x0 error", "95 % interval", "", "detectable", "time"]]
    tails = []
    for name, found in result["gains"].items():
        mean, half = found[MEAN], found["half"]
        low, high = mean["interval"]
        time = "" if found["time"] is None else f"x {found['time']:.2f}"
        lines.append([name, _signed(mean["percent"]), f"{_signed(low)} to {_signed(high)}", mean["verdict"]])
        lines[-1] += [f"{mean['detectable']:.1f} %", time]
        price = "" if half["device_hours"] is None else f", {half['device_hours']:.3g} device hours more"
        more = f"{half['seeds']} seeds, {half['trainings']} trainings{price}"
        tails.append(f"{name}: half of what is detectable here takes {more}")
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    by_level = [
        f"{name:<{widths[0]}}  "
        + " ".join(
            f"{each['percent']:+7.1f}{'*' if each['verdict'] != 'undecided' else ' '}" for each in found["by_level"]
        )
        for name, found in result["gains"].items()
    ]
    heading = f"{'log-SNR':<{widths[0]}}  " + " ".join(f"{level:>7g} " for level in levels)
    return "\n".join(
        [
            f"x0 error of the averaged weights on {result['samples']} held-out samples after {result['steps']} steps, "
            f"{n} seeds, paired; {EXPERIMENT}: "
            + " ".join(f"{e:.3g}" for e in _means(result["arms"][EXPERIMENT]["errors"])),
            *rows,
            "",
            heading,
            *by_level,
            "* the interval excludes 0",
            "",
            *tails,
        ]
    )


def _means(errors: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*errors, strict=True)]


def _signed(value: float) -> str:
    return f"{value:+.1f} %"
