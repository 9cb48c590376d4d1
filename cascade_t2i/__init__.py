"""The one import for programs and notebooks. Names are loaded on first use, because most of them import torch.

from cascade_t2i import Cascade, ShardStream, evaluate
"""

from __future__ import annotations

import importlib
import importlib.metadata
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.common.errors import BadSample, CascadeError
    from data_pipeline.content.images import decode
    from data_pipeline.reading.stream import ShardStream
    from data_pipeline.reading.webdataset import register_s3
    from data_pipeline.shards.index import index_shard
    from data_pipeline.shards.writer import ShardWriter
    from training.cascade.cascade import Cascade
    from training.cli.compose import load_config
    from training.evaluation import compare, evaluate

__all__ = [
    "BadSample",
    "Cascade",
    "CascadeError",
    "ShardStream",
    "ShardWriter",
    "compare",
    "decode",
    "evaluate",
    "index_shard",
    "load_config",
    "register_s3",
]

_HOMES = {
    "BadSample": "data_pipeline.common.errors",
    "Cascade": "training.cascade.cascade",
    "CascadeError": "data_pipeline.common.errors",
    "ShardStream": "data_pipeline.reading.stream",
    "ShardWriter": "data_pipeline.shards.writer",
    "compare": "training.evaluation",
    "decode": "data_pipeline.content.images",
    "evaluate": "training.evaluation",
    "index_shard": "data_pipeline.shards.index",
    "load_config": "training.cli.compose",
    "register_s3": "data_pipeline.reading.webdataset",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "__version__":
        with suppress(importlib.metadata.PackageNotFoundError):  # a checkout that was not installed
            return importlib.metadata.version("cascade-t2i")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
