"""A thread-safe LRU cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A least-recently-used cache for any number of threads. A pickled copy is empty.

    Args:
        room: the most to keep, in units of `size_of`; may be changed later.
        size_of: the size of a value; by default each counts as 1.
    """

    def __init__(self, room: int, size_of: Callable[[V], int] | None = None) -> None:
        self.room, self.size = room, 0
        self._size_of = size_of
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """Return the value and mark it as most recently used; None if it is not cached."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]

    def put(self, key: K, value: V) -> V:
        """Store a value, evict the least recently used ones if there is no room, and return the value."""
        with self._lock:
            if key in self._kept:
                self.size -= self._sized(self._kept.pop(key))
            self._kept[key] = value
            self.size += self._sized(value)
            while self.size > self.room and self._kept:
                self.size -= self._sized(self._kept.popitem(last=False)[1])
        return value

    def change(self, function: Callable[[V], V]) -> None:
        """Replace every value by `function(value)`, which must have the same size."""
        with self._lock:
            for key, value in self._kept.items():
                self._kept[key] = function(value)

    def clear(self) -> None:
        """Evict everything."""
        with self._lock:
            self._kept.clear()
            self.size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> Any:
        return Recent, (self.room, self._size_of)

    def _sized(self, value: V) -> int:
        return 1 if self._size_of is None else self._size_of(value)
