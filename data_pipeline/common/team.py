"""Processes that open the same data set together: one asks the store and shares the answer with the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Team:
    """A team of one: this process alone.

    Processes that can communicate pass a subclass whose methods are collective: every process calls them in the same
    order, and an error on one is raised on all.
    """

    rank, count = 0, 1

    @property
    def start(self) -> float:
        """Where this process begins with work that every process would do, 0 to 1, so that each does another part."""
        return self.rank / self.count

    def once(self, call: Callable[[], Any]) -> Any:
        """Run `call` on the first process and return its result on every process."""
        return call()

    def everyone(self, call: Callable[[], Any]) -> list[Any]:
        """Run `call` on each process and return the results, by rank, on every process."""
        return [call()]


ALONE = Team()


class Strangers(Team):
    """One of `count` processes that open the same data set and cannot communicate: each does everything itself."""

    def __init__(self, rank: int, count: int) -> None:
        self._start = rank / count

    @property
    def start(self) -> float:
        """As `Team.start`."""
        return self._start
