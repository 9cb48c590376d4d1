"""Records an evaluation in a bundle: figures with their protocol in the model card, and the best sampler settings.

The weights are not touched; `bundle.json` is written last, so readers see either the old or the new bundle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.folder import open_folder
from training.cascade.bundle import CARD, INDEX, from_dict, model_card
from training.config.diffusion import SamplerConfig
from training.evaluation.measure import flattened

TOLD = ("size", "seed", "images_per_prompt", "reference", "reference_rule", "precision", "commit")
"""Fields of the protocol that the card shows."""


def record(path: str, result: Mapping[str, Any], samplers: bool = False) -> dict[str, Any]:
    """Write the figures of an evaluation into the bundle that it evaluated; return the content of bundle.json.

    Args:
        result: the content of a result.json.
        samplers: also make the sampler settings of that evaluation the bundle's own.

    Raises:
        ConfigError: the evaluation used other weights, or only some of the stages.
        DataError: there is no bundle.
    """
    folder = open_folder(path)
    try:
        content = json.loads(folder.read(INDEX))
    except (OSError, ValueError) as error:
        raise DataError(f"bundle.dir={path}: it is not a bundle ({error})") from error
    evaluated = {stage["name"]: stage for stage in result["protocol"]["stages"]}
    for stage in content["stages"]:
        there = evaluated.get(stage["name"], {}).get("sha256")
        if there != stage["sha256"]:
            raise ConfigError(
                f"bundle.dir={path}: its {stage['name']} is {stage['sha256'][:12]}, but the evaluation used "
                f"{str(there)[:12]}; use the bundle that was evaluated, with all its stages"
            )
    content["figures"] = {
        "values": {name: {key: entry[key] for key in ("value", "interval", "n")} for name, entry in flattened(result)},
        "n": dict(result["n"]),
        "protocol": {key: result["protocol"].get(key) for key in TOLD}
        | {"extractors": result["protocol"]["extractors"]}
        | {"samplers": {name: stage["sampler"] for name, stage in evaluated.items()}},
    }
    if samplers:
        for stage in content["stages"]:
            sampler = evaluated[stage["name"]]["sampler"]
            from_dict(SamplerConfig, sampler, f"{path}/{INDEX}")  # refuses settings unknown to this version
            stage["config"]["sampler"] = dict(sampler)
    folder.write(CARD, [model_card(path, content).encode()])
    folder.write(INDEX, [json.dumps(content, indent=1, ensure_ascii=False).encode()])
    return dict(content)
