"""Configs from plain values. The values are final: `${x}` in a prompt is text, not a reference."""

from __future__ import annotations

import pickle
import re
from typing import Any, TypeVar

C = TypeVar("C")
_schemas: dict[type, tuple[bytes, Any]] = {}
"""Settings classes as OmegaConf sees them, pickled, and their defaults: to read one takes longer than to build an
instance, and to copy one much longer than to unpickle it."""


def from_plain(schema: type[C], settings: Any) -> C:
    """Build an instance of the settings class from nested dicts, lists and values.

    Raises:
        OmegaConfBaseException: an unknown key or a wrong type.
        ConfigError: an invalid value.
    """
    from omegaconf import OmegaConf

    if schema not in _schemas:
        structured = OmegaConf.structured(schema)
        _schemas[schema] = pickle.dumps(structured), OmegaConf.to_container(structured)
    pickled, defaults = _schemas[schema]
    merged: Any = OmegaConf.to_object(
        OmegaConf.unsafe_merge(pickle.loads(pickled), literal(_changed(settings, defaults)))
    )
    assert isinstance(merged, schema)
    return merged


def _changed(settings: Any, defaults: Any) -> Any:
    """Return the settings without those that are the defaults: OmegaConf takes its time to merge each."""
    if not (isinstance(settings, dict) and isinstance(defaults, dict)):
        return settings
    changed = {}
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            if inner := _changed(value, default):
                changed[name] = inner
        elif name not in defaults or repr(value) != repr(default):  # 1, 1.0 and True are equal
            changed[name] = value
    return changed


def literal(settings: Any) -> Any:
    """Return the values with every `${` escaped, so that OmegaConf does not read it as a reference."""
    if isinstance(settings, dict):
        return {name: literal(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [literal(value) for value in settings]
    return escaped(settings) if isinstance(settings, str) else settings


def escaped(text: str) -> str:
    r"""Escape `${x}` as `\${x}`, doubling any backslashes before it, as OmegaConf requires."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
