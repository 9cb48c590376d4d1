"""A mapping that remembers what was used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The values that were used last, for any number of threads. A pickled copy is empty.

    Args:
        room: how much is kept; may be changed later.
        size_of: how much of it a value takes (by default each takes 1).
    """

    def __init__(self, room: int, size_of: Callable[[V], int] | None = None) -> None:
        self.room, self.size = room, 0
        self._size_of = size_of
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The value, which thereby counts as the last one used; None where it is not kept."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]

    def put(self, key: K, value: V) -> V:
        """Keeps a value, and drops those that were not used for the longest time if there is no room; returns it."""
        with self._lock:
            if key in self._kept:
                self.size -= self._sized(self._kept.pop(key))
            self._kept[key] = value
            self.size += self._sized(value)
            while self.size > self.room and self._kept:
                self.size -= self._sized(self._kept.popitem(last=False)[1])
        return value

    def change(self, function: Callable[[V], V]) -> None:
        """Puts `function(value)` in the place of every value, of the same size."""
        with self._lock:
            for key, value in self._kept.items():
                self._kept[key] = function(value)

    def clear(self) -> None:
        """Drops everything."""
        with self._lock:
            self._kept.clear()
            self.size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> Any:
        return Recent, (self.room, self._size_of)

    def _sized(self, value: V) -> int:
        return 1 if self._size_of is None else self._size_of(value)
