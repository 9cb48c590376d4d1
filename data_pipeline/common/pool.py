"""Threads that never keep the process alive (concurrent.futures joins its threads at exit): a pool, and single ones."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

CLOSE_S = 1.0
"""How long `close` waits for busy threads, seconds."""


def in_daemon(function: Callable[[], T]) -> Future[T]:
    """Start a function in a daemon thread of its own; return its future."""
    future: Future[T] = Future()
    threading.Thread(target=_fulfil, args=(future, function), daemon=True).start()
    return future


def _fulfil(future: Future[T], function: Callable[..., T], *arguments: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*arguments))
    except BaseException as error:  # re-raised by future.result()
        future.set_exception(error)


class DaemonPool:
    """Runs functions on a fixed number of daemon threads, first come first served."""

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queue `function(*arguments)` and return its future."""
        future: Future[Any] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            if self._closed:
                future.cancel()
                continue
            _fulfil(future, function, *arguments)
            del task, future, function, arguments

    def close(self) -> None:
        """Cancel pending work and wait up to `CLOSE_S` for running work.

        A thread still in C++ code (decoding, resizing) when the interpreter exits would abort the process.
        """
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
