"""Exact, elastic streaming of WebDataset shards. Names are imported on first use: `ShardStream` needs torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.reading.stream import ShardStream
    from data_pipeline.reading.webdataset import register_s3

__all__ = ["ShardStream", "register_s3"]

_HOMES = {"ShardStream": "data_pipeline.reading.stream", "register_s3": "data_pipeline.reading.webdataset"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
