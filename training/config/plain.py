"""Configs from plain values. The values are final: `${x}` in a prompt is text, not a reference."""

from __future__ import annotations

import re
from typing import Any, TypeVar

C = TypeVar("C")


def from_plain(schema: type[C], settings: Any) -> C:
    """Build an instance of the settings class from nested dicts, lists and values.

    Raises:
        OmegaConfBaseException: an unknown key or a wrong type.
        ConfigError: an invalid value.
    """
    from omegaconf import OmegaConf

    merged: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), literal(settings)))
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
