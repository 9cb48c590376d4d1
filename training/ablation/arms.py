"""The trainings of an ablation: an arm is an experiment with some ingredients; it has one run per seed.

OUTPUT/experiment/seed-0/      the experiment as it is
OUTPUT/with-muon/seed-0/       with an ingredient added
OUTPUT/without-muon/seed-0/    without one of the experiment's own ingredients
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.common.errors import ConfigError, DataError
from training.checkpoint.store import CheckpointStore
from training.cli.compose import ingredients_of, load_config
from training.config.commands import AblateCommand
from training.config.experiment import Experiment
from training.run.directory import RunDir, changed_since, differences, read_text, to_dict

EXPERIMENT = "experiment"
"""Name of the arm that all others are compared with."""
OWN = ("ablate.", "json", "run", "run.dir")
"""Overrides of the command that are not passed on to its trainings."""
LEAVE_ALONE = (
    *("json", "debug", "run", "wandb", "trackers", "cluster", "zero", "checkpoint", "validation", "evaluation"),
    *("prepare", "bundle", "sampling", "stage.sampler", "text.sha", "distill"),
    *("dino.path", "dino.sha"),
    *(f"train.{name}" for name in ("log_every", "sample_every", "sample_prompts", "profile", "peak_tflops")),
    *(f"train.{name}" for name in ("stall_s", "timeout_s", "timeout_first_s", "deterministic_reduction")),
    *(f"data.{name}" for name in ("threads", "own_process", "prefetch_mb", "index_dir", "cache_dir", "cache_gb")),
    *(f"data.{name}" for name in ("deadline_s", "stall_s", "max_bad_share", "micro_batch")),
)
"""Settings (each including all keys below it) that do not affect what is learned; all others do."""


@dataclass(frozen=True)
class Arm:
    """One arm: an experiment with some ingredients."""

    name: str
    ingredients: tuple[str, ...]
    words: tuple[str, ...]
    """Overrides for `cascade train`."""
    config: Experiment
    """The settings they compose to."""

    def run(self, output: Path, number: int) -> Experiment:
        """Return the settings of training `number` (from 0), with its own seed, directory, checkpoints and W&B name."""
        config, place = self.config, f"{self.name}/seed-{number}"
        checkpoints, wandb = config.checkpoint.dir, config.wandb
        title = f"{config.run.name}/{config.stage.name}"
        return replace(
            config,
            seed=config.seed + number,
            run=replace(config.run, dir=str(output / place)),
            checkpoint=replace(config.checkpoint, dir=f"{checkpoints.rstrip('/')}/{place}" if checkpoints else None),
            wandb=replace(wandb, name=f"{title} {place}"[:128], group=wandb.group or f"{title} ablation"[:128]),
        )

    def command(self, output: Path, number: int) -> str:
        """Return the shell command that runs the same training by hand."""
        run = self.run(output, number)
        words = [*self.words, f"seed={run.seed}", f"run.dir={run.run.dir}"]
        words += [f"checkpoint.dir={run.checkpoint.dir}"] if run.checkpoint.dir else []
        return shlex.join(["cascade", "train", *words])


@dataclass(frozen=True)
class Comparison:
    """Two arms that differ by one ingredient (or, with ablate.together, by all of them)."""

    name: str
    without: str
    with_it: str
    changes: tuple[tuple[str, Any, Any], ...]
    """(key, value without, value with) of the settings that differ."""


def arms_of(words: Sequence[str], config: AblateCommand) -> tuple[list[Arm], list[Comparison]]:
    """Return the arms, the experiment's own first, and the comparisons between them.

    Args:
        words: all overrides typed after `cascade ablate`.

    Raises:
        ConfigError: no ingredient is named, one would change nothing that is learned, or a training would be refused.
    """
    rest = [word for word in words if not _is_own(word) and _key(word) != "ingredient"]
    named = list(dict.fromkeys(ingredients_of("ablate", [word for word in words if _key(word) == "ingredient"])))
    if not named:
        raise ConfigError("ingredient: name the ingredients to measure, for example ingredient=[muon,min_snr]")
    own = ingredients_of("train", rest)
    base = _arm(EXPERIMENT, own, rest)
    arms, comparisons = [base], []

    def compare(name: str, other: Arm, swapped: bool = False) -> None:
        without, with_it = (other, base) if swapped else (base, other)
        arms.append(other)
        comparisons.append(Comparison(name, without.name, with_it.name, _changes(name, without, with_it)))

    for name in named:
        if name in own:
            compare(name, _arm(f"without-{name}", [one for one in own if one != name], rest), swapped=True)
        else:
            compare(name, _arm(f"with-{name}", [*own, name], rest))
    new = [name for name in named if name not in own]
    if config.ablate.together:
        if len(new) < 2:
            raise ConfigError(
                "ablate.together=true: it combines all ingredients that are not already in the experiment; name at "
                f"least two such ingredients, not {len(new)}"
            )
        compare("+".join(new), _arm(f"with-{'+'.join(new)}", [*own, *new], rest))
    for other in arms[1:]:
        _check_same_question(base, other)
    return arms, comparisons


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _is_own(word: str) -> bool:
    return _key(word).startswith(OWN[0]) or _key(word) in OWN[1:]


def _arm(name: str, ingredients: Sequence[str], rest: Sequence[str]) -> Arm:
    words = (*rest, f"ingredient=[{','.join(ingredients)}]")
    return Arm(name, tuple(ingredients), words, load_config("train", words))


def _changes(name: str, without: Arm, with_it: Arm) -> tuple[tuple[str, Any, Any], ...]:
    """Return the settings that differ. Raises ConfigError if none of them affects what is learned."""
    found = tuple(differences(to_dict(without.config), to_dict(with_it.config)))
    if not found:
        raise ConfigError(
            f"ingredient={name}: it changes nothing here; the experiment or the command line already has its settings"
        )
    if not any(learns(key) for key, _, _ in found):
        raise ConfigError(
            f"ingredient={name}: it only changes {', '.join(key for key, _, _ in found)}, which does not affect "
            "training; evaluate one bundle both ways instead, and compare them with cascade evaluate action=compare"
        )
    return found


def learns(key: str) -> bool:
    """Return whether this setting affects what a training learns."""
    return not any(f"{key}.".startswith(f"{section}.") for section in LEAVE_ALONE)


def _check_same_question(base: Arm, other: Arm) -> None:
    """Raise ConfigError unless both arms have the same picture sizes."""
    for name in ("image_size", "low_res_size", "crop_size"):
        here, there = getattr(base.config.stage, name), getattr(other.config.stage, name)
        if here != there:
            raise ConfigError(
                f"ingredient: {other.name} has stage.{name}={there} and {base.name} {here}; errors on pictures of "
                "different sizes cannot be compared"
            )


# ------------------------------------------------------------------------------------------------------- state


def is_done(run: Experiment) -> bool:
    """Return whether a training is complete: it has a checkpoint of its last step.

    Raises:
        ConfigError: it was trained with different settings.
        DataError: it was stopped on request before its last step, or its config.yaml cannot be read.
    """
    directory = RunDir(run)
    store = CheckpointStore(directory.checkpoints)
    step = store.newest_whole()
    before, where = _settings_before(directory, store, step)
    _check_settings(run, before, where)
    if step < run.train.steps and step >= 0 and (reason := directory.asked_to_stop()):
        raise DataError(
            f"{directory.path}: it was asked to stop early, at step {step} ({reason}), but all arms must train for the "
            f"same number of steps: delete its stop.json and repeat the command"
        )
    return step >= run.train.steps


def _settings_before(directory: RunDir, store: CheckpointStore, step: int) -> tuple[Any, str]:
    """What a training was started with, and where it is; None where it was not: as its directory says, or where that
    is elsewhere (another ablate.output, another machine), its newest checkpoint."""
    file = directory.path / "config.yaml"
    try:
        return yaml.safe_load(read_text(file)), str(directory.path)
    except FileNotFoundError:
        return (store.open(step).recorded("config"), directory.checkpoints) if step >= 0 else (None, "")
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{file}: cannot be read ({error}); choose another ablate.output") from error


def _check_settings(run: Experiment, before: Any, where: str) -> None:
    changes = changed_since(before, to_dict(run)) if isinstance(before, dict) else []
    changed = [change for change in changes if learns(change[0])]
    if changed:
        key, old, new = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{key}={new}: {where} was trained with {old}{more}, but all arms must be trained alike; restore it, or "
            f"choose another {'checkpoint.dir' if where == run.checkpoint.dir else 'ablate.output'}"
        )
