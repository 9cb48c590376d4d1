"""Configs from plain values. The values are final: `${x}` in a prompt is text, not a reference."""

from __future__ import annotations

import re
from typing import Any, TypeVar

C = TypeVar("C")
_schemas: dict[type, Any] = {}
"""Settings classes as OmegaConf sees them: reading one takes a third of the time of `from_plain`. Merging copies it."""


def from_plain(schema: type[C], settings: Any) -> C:
    """Build an instance of the settings class from nested dicts, lists and values.

    Raises:
        OmegaConfBaseException: an unknown key or a wrong type.
        ConfigError: an invalid value.
    """
    from omegaconf import OmegaConf

    if schema not in _schemas:
        _schemas[schema] = OmegaConf.structured(schema)
    merged: Any = OmegaConf.to_object(OmegaConf.merge(_schemas[schema], literal(settings)))
    assert isinstance(merged, schema)
    return merged


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
