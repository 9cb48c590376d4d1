"""A finished cascade: its bundle, and drawing pictures with it. `Cascade` is imported on first use, because it imports
torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.cascade.cascade import Cascade

__all__ = ["Cascade"]


def __getattr__(name: str) -> Any:
    if name == "Cascade":
        from training.cascade import cascade

        return cascade.Cascade
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
