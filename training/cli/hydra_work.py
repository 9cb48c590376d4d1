"""Spares Hydra the work that it repeats in every composition: most of its time.

A program composes many configs: one for each stage, job of a sweep or node of a cascade's graph.
"""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

from data_pipeline.common.recent import Recent


@functools.cache
def spare_hydra_work() -> None:
    """Make Hydra parse each file once and merge each choice of files once, and leave out what it does without need.

    What was parsed or merged is kept pickled, since Hydra changes what it gets; to unpickle it takes a tenth of the
    time.
    """
    from hydra._internal import defaults_list
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_repository import ConfigRepository
    from hydra.core.config_store import ConfigStore
    from hydra.core.object_type import ObjectType

    # It copies its sources, and with them all schemas, which it only reads.
    configs = ConfigStore.instance()
    configs.__deepcopy__ = lambda memo: configs  # type: ignore[attr-defined]

    # For every file, it makes a config of all choices so far, which only references in its defaults list need.
    all_choices = defaults_list._create_interpolation_map

    def choices(overrides: Any, defaults: Any, self_added: bool) -> Any:
        refers = any(default.is_interpolation() for default in defaults)
        return all_choices(overrides, defaults, self_added) if refers else None

    parse_file = ConfigRepository.load_config
    merge_files = ConfigLoaderImpl._compose_config_from_defaults_list
    loaded: Recent[Any, bytes] = Recent(500)
    merged: Recent[Any, bytes] = Recent(100)

    def load(repository: Any, config_path: str) -> Any:
        source = repository._find_object_source(config_path, ObjectType.CONFIG)
        if source is None:
            return None
        key = source.scheme(), source.path, source.provider, config_path, _contents(source, config_path)
        kept = loaded.get(key)
        if kept is None:
            result: Any = parse_file(repository, config_path)
            result.key = key
            kept = loaded.put(key, pickle.dumps(result))
        return pickle.loads(kept)

    def merge(loader: Any, defaults: Any, repo: Any) -> Any:
        key = tuple(
            (default.package, default.primary, repo.load_config(default.config_path).key) for default in defaults
        )
        kept = merged.get(key)
        if kept is None:
            kept = merged.put(key, pickle.dumps(merge_files(loader, defaults, repo)))
        return pickle.loads(kept)

    defaults_list._create_interpolation_map = choices  # type: ignore[assignment]
    ConfigRepository.load_config = load  # type: ignore[assignment,method-assign]
    ConfigLoaderImpl._compose_config_from_defaults_list = merge  # type: ignore[assignment,method-assign]


def _contents(source: Any, config_path: str) -> Any:
    """Return what differs whenever this config of one of Hydra's sources does."""
    name = source._normalize_file_name(config_path)
    match source.scheme():
        case "file":
            return Path(source.path, name).read_bytes()
        case "structured":
            return id(source.store._load(name).node)  # the store keeps it
        case "pkg":
            return None  # installed
    return object()  # unknown: never the same
