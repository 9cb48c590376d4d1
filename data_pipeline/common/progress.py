"""Progress bars in a terminal; occasional lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized
from typing import Any

from data_pipeline.common.terminal import can_overwrite

LOG_INTERVAL_S = 15.0


class _Lines:
    """stderr for a bar outside a terminal: writes each update on a line of its own instead of overwriting the last."""

    def write(self, text: str) -> None:
        if state := text.strip():
            sys.stderr.write(state + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(items: Iterable[Any] | None = None, **settings: Any) -> Any:
    """Return a tqdm bar on stderr, hidden if the total is 0. `settings` are passed to tqdm."""
    from tqdm import tqdm

    total = settings.get("total", len(items) if isinstance(items, Sized) else None)
    settings["disable"] = settings.get("disable", False) or total == 0
    if can_overwrite(sys.stderr):
        return tqdm(items, mininterval=0.5, **settings)
    return tqdm(items, mininterval=LOG_INTERVAL_S, file=_Lines(), **settings)
