"""A thread pool whose threads never keep the process alive (concurrent.futures waits for its threads at exit)."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

CLOSE_S = 1.0
"""How long closing waits for threads that are busy."""


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
        """The future result of `function(*arguments)`."""
        future: Future[Any] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            if self._closed:
                future.cancel()
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # raised where the result is awaited
                future.set_exception(error)
            del task, future, function, arguments

    def close(self) -> None:
        """Cancels pending work and waits up to `CLOSE_S` for running work: a thread still inside C++ code (decoding,
        resizing) when the interpreter exits would abort the process."""
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
