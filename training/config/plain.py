"""A config as plain values and back. What stands in them is final: `${x}` in a prompt is text, not a reference."""

from __future__ import annotations

import re
from typing import Any, TypeVar

C = TypeVar("C")


def from_plain(schema: type[C], settings: Any) -> C:
    """An object of the settings class from nested dicts, lists and values.

    Raises:
        OmegaConfBaseException: an unknown key or a wrong type; ConfigError: a value that cannot work.
    """
    from omegaconf import OmegaConf

    merged: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), literal(settings)))
    assert isinstance(merged, schema)
    return merged


def literal(settings: Any) -> Any:
    """The same values, written so that OmegaConf takes no `${` for the beginning of a reference."""
    if isinstance(settings, dict):
        return {name: literal(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [literal(value) for value in settings]
    return escaped(settings) if isinstance(settings, str) else settings


def escaped(text: str) -> str:
    r"""`\${x}` for `${x}`; backslashes before it are doubled, as OmegaConf wants them."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
