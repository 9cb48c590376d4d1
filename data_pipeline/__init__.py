"""Exact, elastic streaming of WebDataset shards. `ShardStream` is loaded on first use, because it imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.reader import ShardStream

__all__ = ["ShardStream"]


def __getattr__(name: str) -> Any:
    if name == "ShardStream":
        from data_pipeline.reader import ShardStream

        return ShardStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
