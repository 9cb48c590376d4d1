"""Which trainings an ablation consists of: an arm is an experiment with some ingredients, one run for each seed.

OUTPUT/experiment/seed-0/      the experiment as it is
OUTPUT/with-muon/seed-0/       ... with an ingredient that it does not name
OUTPUT/without-muon/seed-0/    ... or without one that it names
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
from training.run.directory import RunDir, changed_since, differences, to_dict

EXPERIMENT = "experiment"
"""The arm that all others are compared with."""
OWN = ("ablate.", "json", "run", "run.dir")
"""Settings of the command that its trainings do not take over."""
LEAVE_ALONE = (
    *("json", "debug", "run", "wandb", "trackers", "cluster", "zero", "checkpoint", "validation", "evaluation"),
    *("prepare", "bundle", "sampling", "stage.sampler", "text.sha", "distill"),
    *("dino.path", "dino.sha"),
    *(f"train.{name}" for name in ("log_every", "sample_every", "sample_prompts", "profile", "peak_tflops")),
    *(f"train.{name}" for name in ("stall_s", "timeout_s", "timeout_first_s", "deterministic_reduction")),
    *(f"data.{name}" for name in ("threads", "own_process", "prefetch_mb", "index_dir", "cache_dir", "cache_gb")),
    *(f"data.{name}" for name in ("deadline_s", "stall_s", "max_bad_share", "micro_batch")),
)
"""Settings (and all below them) with which the same is learned; others may change it, and so must be alike."""


@dataclass(frozen=True)
class Arm:
    """An experiment with some ingredients."""

    name: str
    ingredients: tuple[str, ...]
    words: tuple[str, ...]
    """What `cascade train` is given."""
    config: Experiment
    """What that composes to."""

    def run(self, output: Path, number: int) -> Experiment:
        """The training of seed `number`, in its own directory, with its own checkpoints and its own name in W&B."""
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
        """The words that train it by hand."""
        run = self.run(output, number)
        words = [*self.words, f"seed={run.seed}", f"run.dir={run.run.dir}"]
        words += [f"checkpoint.dir={run.checkpoint.dir}"] if run.checkpoint.dir else []
        return shlex.join(["cascade", "train", *words])


@dataclass(frozen=True)
class Comparison:
    """Two arms that differ by one ingredient (or by all together)."""

    name: str
    without: str
    with_it: str
    changes: tuple[tuple[str, Any, Any], ...]
    """(key, value without, value with) of the settings that differ."""


def arms_of(words: Sequence[str], config: AblateCommand) -> tuple[list[Arm], list[Comparison]]:
    """The arms, the experiment's own first, and what is compared with what.

    Args:
        words: all that was typed after `cascade ablate`.

    Raises:
        ConfigError: no ingredient is named, or one that would change nothing; or a training that would be refused.
    """
    rest = [word for word in words if not _is_own(word) and _key(word) != "ingredient"]
    named = list(dict.fromkeys(ingredients_of("ablate", [word for word in words if _key(word) == "ingredient"])))
    if not named:
        raise ConfigError("ingredient: name what is to be measured, for example ingredient=[muon,min_snr]")
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
                "ablate.together=true: it trains with all ingredients that the experiment does not name itself, of "
                f"which {len(new)} is given here; name two at least"
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
    """Raises ConfigError where both would learn the same."""
    found = tuple(differences(to_dict(without.config), to_dict(with_it.config)))
    if not found:
        raise ConfigError(
            f"ingredient={name}: it changes nothing here; the experiment, or the command line, has its settings already"
        )
    if not any(learns(key) for key, _, _ in found):
        raise ConfigError(
            f"ingredient={name}: it only changes {', '.join(key for key, _, _ in found)}, and nothing that is learned; "
            "draw with one bundle both ways, and set the results side by side: cascade evaluate action=compare"
        )
    return found


def learns(key: str) -> bool:
    """Whether what a training learns depends on this setting."""
    return not any(f"{key}.".startswith(f"{section}.") for section in LEAVE_ALONE)


def _check_same_question(base: Arm, other: Arm) -> None:
    """Pictures of one size can be asked for in all arms."""
    for name in ("image_size", "low_res_size", "crop_size"):
        here, there = getattr(base.config.stage, name), getattr(other.config.stage, name)
        if here != there:
            raise ConfigError(
                f"ingredient: {other.name} has stage.{name}={there} and {base.name} {here}; errors in pictures of "
                "different sizes cannot be compared"
            )


# ------------------------------------------------------------------------------------------------ what is done


def is_done(run: Experiment) -> bool:
    """Whether all steps of a training are saved.

    Raises:
        ConfigError: it was trained with other settings.
        DataError: it was told to stop before its last step.
    """
    directory = RunDir(run)
    _check_settings(run, directory.path)
    step = CheckpointStore(directory.checkpoints).newest_whole()
    if step < run.train.steps and step >= 0 and (reason := directory.asked_to_stop()):
        raise DataError(
            f"{directory.path}: told to stop early, at step {step} ({reason}); all arms must have the same steps: "
            f"delete its stop.json, and give the same command again"
        )
    return step >= run.train.steps


def _check_settings(run: Experiment, path: Path) -> None:
    file = path / "config.yaml"
    try:
        before = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        return
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{file}: cannot be read ({error}); choose another ablate.output") from error
    changes = changed_since(before, to_dict(run)) if isinstance(before, dict) else []
    changed = [change for change in changes if learns(change[0])]
    if changed:
        key, old, new = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{key}={new}: {path} was trained with {old}{more}, and all arms must be trained alike; set it back, or "
            "choose another ablate.output"
        )
