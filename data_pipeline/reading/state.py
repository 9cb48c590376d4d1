"""The data's part of a checkpoint: the position, and all that determines which sample it refers to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.common.errors import ConfigError
from data_pipeline.config import DataConfig
from data_pipeline.shards.dataset import Dataset, window_of
from data_pipeline.shards.mixture import Mixture

_CONTENT = {
    "shards": "the number of shards",
    "samples": "the number of samples after data.filter",
    "content": "the content of the shards",
    "filter": "data.filter",
}
_RUN = {"seed": "seed", "global_batch": "data.global_batch", "lanes": "data.lanes"}
_NAMES = {**_CONTENT, **_RUN, "window": "data.window"}


def state_of(dataset: Dataset, config: DataConfig, seed: int, position: int) -> dict[str, Any]:
    """Return the JSON-serializable state at a position (samples consumed by all ranks); the same on every rank."""
    state = {
        **dataset.describe(),
        "licences": dataset.licences,
        "seed": seed,
        "position": position,
        "global_batch": config.global_batch,
        "lanes": config.lane_count,
    }
    if not isinstance(dataset, Mixture):
        state["window"] = window_of(dataset, config)
    return state


def check_state(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Check that a run can continue: neither its data nor its batch layout has changed.

    What a mixture does after the position may change: weights, and data sets that join from there on. A single data set
    may become the first of a mixture.

    Args:
        now: the state according to the current settings.
        before: the state in the checkpoint.

    Raises:
        ConfigError: the message names what changed, with old and new values.
    """
    if "datasets" in now or "datasets" in before:
        changes = _mixture_changes(now, before)
    else:
        changes = _differences(now, before, _NAMES)
    if changes:
        raise ConfigError(
            f"data: the checkpoint at position {before.get('position')} was trained in another order; changed: "
            f"{'; '.join(changes)}. Restore the old order, or start a new run (train.init_from takes over the weights)"
        )


def _differences(now: Mapping[str, Any], before: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    return [
        f"{name} from {before.get(field)} to {now.get(field)}"
        for field, name in names.items()
        if before.get(field) != now.get(field)
    ]


def check_past(now: DataConfig, before: DataConfig, position: int) -> None:
    """Check, from the settings alone, that the shares of the data sets up to a position have not changed.

    Raises:
        ConfigError: the message names both, and how to write a change from this position on.
    """
    changed = _shares_changed(now.shares(), before.shares(), position)
    if changed:
        raise ConfigError(f"data.shards: the run has consumed {position} samples; changed: {changed}")


def _mixture_changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Describe how the order up to the position of `before` differs."""
    position = int(before["position"])
    changes = _differences({"buckets": [], **now}, {"buckets": [], **before}, {**_RUN, "buckets": "data.buckets"})
    parts = (now.get("datasets"), before.get("datasets"))
    mixed = all(any("/" in name for name in found or ()) for found in parts)  # NAME/SHAPE
    if not mixed and (now.get("buckets") or before.get("buckets")):
        return changes + (["the pictures of a bucket"] if not changes and parts[0] != parts[1] else [])
    old, new = _rows(before), _rows(now)
    changed = _shares_changed(new, old, position)
    if changed:
        return [*changes, changed]
    names = {name: None for _, shares in _past(new, position) for name in shares}
    for name in names:
        own, earlier = now.get("datasets", {}).get(name, now), before.get("datasets", {}).get(name, before)
        said = _differences(own, earlier, {**_CONTENT, "window": "window"})
        changes += [f"of data set {name}: {change}" for change in said]
    return changes


_Rows = list[tuple[int, dict[str, str]]]


def _rows(state: Mapping[str, Any]) -> _Rows:
    return [(since, dict(shares)) for since, shares in state.get("schedule") or [(0, {"": "1"})]]


def _past(rows: _Rows, position: int) -> _Rows:
    """Return the rows that took effect before a position."""
    return [(since, shares) for since, shares in rows if since < max(position, 1)]


def _shares_changed(now: _Rows, before: _Rows, position: int) -> str:
    """Describe how the shares up to a position changed; empty if they did not.

    A single data set may get a name.
    """
    old, new = _past(before, position), _past(now, position)
    alone = [len(rows) == 1 and len(rows[0][1]) == 1 for rows in (old, new)]
    unnamed = any("" in shares for rows in (old, new) for _, shares in rows)
    if old == new or (all(alone) and unnamed):
        return ""
    return (
        f"the shares of the data sets before position {position} from {_told(old)} to {_told(new)}; give later changes "
        f"their position (weight: {{0: OLD, {position}: NEW}}, and start: {position} for a new data set)"
    )


def _told(rows: _Rows) -> str:
    words = []
    for since, shares in rows:
        named = " + ".join(f"{share} {name or 'data.shards'}" for name, share in shares.items())
        words.append(f"{named} from {since} on" if since else named)
    return ", ".join(words)
