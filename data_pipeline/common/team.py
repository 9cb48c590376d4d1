"""The processes that open the same data set at the same time: one of them asks the store, the others are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Team:
    """This process, by itself. Processes that can talk to each other give a subclass whose methods are collective: all
    call them in the same order, and an error of one is raised on all."""

    rank, count = 0, 1

    def once(self, call: Callable[[], Any]) -> Any:
        """What `call` gives on the first process, on every process."""
        return call()

    def everyone(self, call: Callable[[], Any]) -> list[Any]:
        """What `call` gives on each process, in their order, on every process."""
        return [call()]


ALONE = Team()
