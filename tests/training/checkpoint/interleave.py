"""All interleavings of several deterministic processes on one store, their requests delayed and delivered twice.

Each process is a plain function that calls the real checkpoint code on a `Stage`, a folder whose operations are steps
of the exploration. To continue a process it is run again from its beginning, with the answers that it has had so far,
up to its next request; so its state is the list of its answers, and two orders of requests that lead to the same
answers and the same content of the store are one state.

A request may be slow: it takes effect at any time before its process goes on, which is what running the processes in
every order means. And it may be delivered again (a client that repeats a request whose answer is late): a write or a
delete that has taken effect once may do so once more at any later time, also after its process has died. A process that
dies is one that does not go on: every state is judged as if nobody did.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Content = dict[str, bytes]
Request = tuple[str, str, bytes]
"""(operation, path, data)"""
CHANGES = ("write", "create", "remove")


class Paused(BaseException):
    """The process wants this answered before it can go on."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.request = request


class Stage:
    """A folder (see data_pipeline/storage/folder.py) that answers from a recording, and pauses at its end."""

    def __init__(self, answers: list[Any], path: str = "") -> None:
        self._answers, self.path = answers, path

    def __str__(self) -> str:
        return self.path or "store"

    def _ask(self, operation: str, path: str, data: bytes = b"") -> Any:
        if not self._answers:
            raise Paused((operation, path, data))
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sub(self, name: str) -> Stage:
        return Stage(self._answers, f"{self.path}{name}/")

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        self._ask("write", self.path + name, b"".join(chunks))

    def create(self, name: str, data: bytes) -> bool:
        return self._ask("create", self.path + name, data)

    def read(self, name: str) -> bytes:
        return self._ask("read", self.path + name)

    def sizes(self) -> dict[str, int]:
        return dict(self._ask("list", self.path))

    def names(self) -> list[str]:
        return sorted(self.sizes())

    def remove_files(self, names: Iterable[str]) -> None:
        for name in names:
            self._ask("remove", self.path + name)


class Memory(Stage):
    """The same on a dictionary, without pausing."""

    def __init__(self, content: Content, path: str = "") -> None:
        super().__init__([], path)
        self._content = content

    def _ask(self, operation: str, path: str, data: bytes = b"") -> Any:
        answer = serve((operation, path, data), self._content)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sub(self, name: str) -> Memory:
        return Memory(self._content, f"{self.path}{name}/")


def serve(request: Request, content: Content) -> Any:
    """Applies a request; returns its answer (an exception where it fails)."""
    operation, path, data = request
    if operation == "list":
        below = {name.removeprefix(path) for name in content if name.startswith(path)}
        return {n.split("/")[0]: -1 if "/" in n else len(content[path + n]) for n in sorted(below)}
    if operation == "read":
        return content.get(path, FileNotFoundError(path))
    if operation == "create" and path in content:
        return False
    if operation == "remove":
        content.pop(path, None)
        return None
    content[path] = data
    return True if operation == "create" else None


Process = Callable[[Stage, list[str]], None]
"""Runs on a folder; appends to the list what it has achieved."""
Judge = Callable[[Content, list[tuple[str, ...]]], str]
"""(content, what each process has achieved) -> what is wrong, or "" """


@dataclass(frozen=True)
class State:
    """The state of all processes, by number (see Explorer). `late`: requests that may arrive once more; `again`: how
    many more of these there may be."""

    processes: tuple[int, ...]
    content: int
    late: tuple[Request, ...]
    again: int


class Explorer:
    """Visits every state that can be reached, and remembers one way to each."""

    def __init__(self, processes: list[Process], content: Content, judge: Judge) -> None:
        self._processes, self._judge = processes, judge
        self._contents: list[Content] = []
        self._content_numbers: dict[tuple[tuple[str, bytes], ...], int] = {}
        self._served: dict[tuple[int, Request], tuple[Any, int]] = {}
        self._histories: list[tuple[list[Any], Request | None, tuple[str, ...]]] = []
        """Answers so far, the next request (None: it has ended), what it has achieved."""
        self._next: dict[tuple[int, str], int] = {}
        self._first = [self._history(number, []) for number in range(len(processes))]
        self._start = self._number(content)
        self.came_from: dict[State, tuple[State, str] | None] = {}

    def run(self, again: int = 0, twice: Callable[[Request], bool] = lambda request: request[0] in CHANGES) -> str:
        """What is wrong with the first bad state, and how it arose; empty if all are good.

        Args:
            again: how many requests in all may arrive a second time, of those that `twice` says may.
        """
        gc.disable()  # what it makes stays, and the search for garbage in it takes a quarter of the time
        try:
            return self._run(again, twice)
        finally:
            gc.enable()

    def _run(self, again: int, twice: Callable[[Request], bool]) -> str:
        first = State(tuple(self._first), self._start, (), again)
        self.came_from, todo = {first: None}, [first]
        judged: set[tuple[int, tuple[int, ...]]] = set()
        while todo:
            state = todo.pop()
            look = (state.content, state.processes)
            if look not in judged:
                judged.add(look)
                achieved = [self._histories[history][2] for history in state.processes]
                if problem := self._judge(self._contents[state.content], achieved):
                    return "\n".join([problem, *self._story(state)])
            for following, event in self._following(state, twice):
                if following not in self.came_from:
                    self.came_from[following] = state, event
                    todo.append(following)
        return ""

    def _following(self, state: State, twice: Callable[[Request], bool]) -> Iterator[tuple[State, str]]:
        for number, history in enumerate(state.processes):
            request = self._histories[history][1]
            if request is None:
                continue
            answer, content = self._serve(state.content, request)
            after = self._answered(number, history, answer)
            processes = (*state.processes[:number], after, *state.processes[number + 1 :])
            event = f"{number}: {request[0]} {request[1]}"
            yield State(processes, content, state.late, state.again), event
            if state.again and twice(request):
                late = tuple(sorted((*state.late, request)))
                yield State(processes, content, late, state.again - 1), f"{event}, which will arrive again"
        for place, request in enumerate(state.late):
            _, content = self._serve(state.content, request)
            rest = (*state.late[:place], *state.late[place + 1 :])
            yield State(state.processes, content, rest, state.again), f"again: {request[0]} {request[1]}"

    def _serve(self, content: int, request: Request) -> tuple[Any, int]:
        if (content, request) not in self._served:
            after = dict(self._contents[content])
            answer = serve(request, after)
            self._served[content, request] = answer, self._number(after)
        return self._served[content, request]

    def _number(self, content: Content) -> int:
        same = tuple(sorted(content.items()))
        if same not in self._content_numbers:
            self._content_numbers[same] = len(self._contents)
            self._contents.append(content)
        return self._content_numbers[same]

    def _answered(self, number: int, history: int, answer: Any) -> int:
        key = history, repr(answer)
        if key not in self._next:
            self._next[key] = self._history(number, [*self._histories[history][0], answer])
        return self._next[key]

    def _history(self, number: int, answers: list[Any]) -> int:
        done: list[str] = []
        request = None
        try:
            self._processes[number](Stage(list(answers)), done)
        except Paused as paused:
            request = paused.request
        self._histories.append((answers, request, tuple(done)))
        return len(self._histories) - 1

    def _story(self, state: State) -> list[str]:
        events: list[str] = []
        while (step := self.came_from[state]) is not None:
            state, event = step
            events.insert(0, event)
        return events
