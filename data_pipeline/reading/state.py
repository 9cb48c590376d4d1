"""What a checkpoint keeps of the data: the position, and all that must be unchanged for it to mean the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.common.errors import ConfigError
from data_pipeline.config import DataConfig
from data_pipeline.shards.dataset import Dataset, window_of

_NAMES = {
    "shards": "the number of shards",
    "samples": "the number of samples after data.filter",
    "content": "the content of the shards",
    "filter": "data.filter",
    "seed": "seed",
    "global_batch": "data.global_batch",
    "lanes": "data.lanes",
    "window": "data.window",
}


def state_of(dataset: Dataset, config: DataConfig, seed: int, position: int) -> dict[str, Any]:
    """The state at a position (samples consumed by all ranks together), for JSON; the same on all ranks."""
    return {
        **dataset.describe(),
        "seed": seed,
        "position": position,
        "global_batch": config.global_batch,
        "lanes": config.lane_count,
        "window": window_of(dataset, config),
    }


def check_state(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Refuses to continue a run whose data or batch layout changed.

    Raises:
        ConfigError: it names what changed, from what to what.
    """
    changes = [
        f"{name} from {before.get(field)} to {now[field]}"
        for field, name in _NAMES.items()
        if before.get(field) != now[field]
    ]
    if changes:
        raise ConfigError(
            f"data: the checkpoint at position {before.get('position')} was trained in another order: it changed "
            f"{'; '.join(changes)}. Restore that, or start a new run (train.init_from takes over the weights)"
        )
