"""Measuring pictures: features, metrics, the oracle for drawn scenes, the report.

from training.evaluation import compare, evaluate
a = evaluate("runs/demo/bundle", reference="data/demo/heldout", samples=512, output="runs/a")
b = evaluate("runs/demo/bundle", reference="data/demo/heldout", samples=512, output="runs/b", guidance=2)
print(a["kid"]["random_filters_64"])
compare(["runs/a", "runs/b"])
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

__all__ = ["compare", "evaluate"]


def evaluate(bundle: str, *, output: str, seed: int = 0, gpus: bool = True, **settings: Any) -> dict[str, Any]:
    """Run `cascade evaluate` and return the content of result.json.

    Args:
        bundle: directory or s3:// prefix of the bundle.
        output: directory for the results.
        gpus: draw on GPUs if there are any.
        settings: keys of the section `evaluation` (reference, samples, prompts, extractors, ...; the default of `kind`
            is `pictures` here), and guidance, steps, sampler, aug_level, spacing, threshold, original_side.

    Raises:
        ConfigError, DataError: invalid settings or data; one sentence that names the key and the remedy.
    """
    from omegaconf.errors import OmegaConfBaseException

    from data_pipeline.common.errors import ConfigError
    from training.config.commands import COMMANDS, SAMPLER_KEYS, EvaluateCommand
    from training.config.experiment import EvaluationConfig
    from training.config.plain import from_plain

    own = {key: settings.pop(key) for key in SAMPLER_KEYS if key in settings}
    known = [field.name for field in fields(EvaluationConfig) if field.name != "output"]
    for key in settings:
        if key not in known:
            raise ConfigError(f"{key}: evaluate has no such setting; it has {', '.join((*known, *SAMPLER_KEYS))}")
    given = {"seed": seed, "bundle": {"dir": str(bundle)}, "cluster": {"gpus": gpus}, **own}
    given["evaluation"] = {"kind": "pictures", **settings, "output": str(output)}
    try:
        command = from_plain(EvaluateCommand, _plain(given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    found: dict[str, Any] = importlib.import_module(COMMANDS["evaluate"].module).main(command)
    return found


def _plain(value: Any) -> Any:
    """Return settings as JSON has them: no settings classes, paths, tuples, nor values of numpy and torch."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else value


def compare(results: Sequence[str]) -> dict[str, Any]:
    """Return the paired differences of evaluations, see `comparison.compare_results`."""
    from training.evaluation import comparison

    return comparison.compare_results(results)
