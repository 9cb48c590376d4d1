"""Two starts of a run on one store, in every order of their requests, with requests delivered again later: the real
code, not a model of it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.training.checkpoint.interleave import Content, Explorer, Memory, Process, Stage
from training.checkpoint.attempts import Attempts
from training.checkpoint.store import MANIFEST, Checkpoint, CheckpointStore
from training.processes.endings import Superseded
from training.processes.ranks import Ranks

ONE = Ranks()


@pytest.fixture(autouse=True)
def _same_each_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that is run again does the same: no clock, no threads, files compared by size; and it logs nothing."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)
    monkeypatch.setattr("training.checkpoint.attempts.time.time", lambda: 0.0)

    def by_size(self: Checkpoint, *_: Any, **__: Any) -> list[str]:
        return [problem for entry in self.manifest["files"] if (problem := self._problem(entry, False, False))]

    monkeypatch.setattr(Checkpoint, "problems", by_size)
    yield


def opened(folder: Any, token: str, number: int = 0, began: int = -1) -> CheckpointStore:
    store = CheckpointStore("nowhere")
    store.folder = folder
    store.attempts = Attempts(folder, number, token)
    store._began, store._taken = (began, began) if number else (None, -1)
    return store


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, {"param/w": torch.tensor([float(step)])}, {"by": store.attempts.token}, ONE)


def before(*steps: int) -> Content:
    """The state after attempt 1 (token "one", from step 0) has saved."""
    content: Content = {}
    store = opened(Memory(content), "one")
    store.claim(ONE)
    store._began = 0
    for step in steps:
        save(store, step)
    return content


def goes_on(*steps: int) -> Process:
    """Attempt 1 is alive and saves these steps."""

    def run(folder: Stage, done: list[str]) -> None:
        done.append("claimed 1")
        _save_and_prune(opened(folder, "one", number=1, began=0), steps, done)

    return run


def starts(token: str, distance: int, prunes: bool = True) -> Process:
    """A new start: resumes, saves so many steps from where it begins, and deletes the others."""

    def run(folder: Stage, done: list[str]) -> None:
        store = opened(folder, token)
        found = store.resume(ONE, lambda checkpoint: None)
        assert found is not None
        done.extend([f"claimed {store.attempt}", f"began {found.step}"])
        _save_and_prune(store, [found.step + distance], done, prunes)

    return run


def _save_and_prune(store: CheckpointStore, steps: Sequence[int], done: list[str], prunes: bool = True) -> None:
    try:
        for step in steps:
            save(store, step)
            done.append(f"saved {step}")
            if prunes:
                store.prune(keep_last=1)
    except Superseded:
        done.append("superseded")


@functools.cache
def numbers(done: tuple[str, ...], word: str) -> list[int]:
    return [int(line.split()[1]) for line in done if line.startswith(word)]


def nothing_is_lost(content: Content, achieved: list[tuple[str, ...]]) -> str:
    """A start that looks now finds a whole checkpoint: the last that the newest attempt has saved, or a later one of
    its own; before it has saved any, one from where it began or later. No two attempts have one number."""
    claims = [number for done in achieved for number in numbers(done, "claimed")]
    if len(claims) != len(set(claims)):
        return f"two starts have one number: {claims}"
    if not (found := recovered(content)):
        return f"no checkpoint is left: {sorted(content)}"
    by, step = found
    newest = max(achieved, key=lambda done: max(numbers(done, "claimed"), default=0))
    token = ("one", "two")[achieved.index(newest)]
    if saved := numbers(newest, "saved"):
        return "" if by == token and step >= saved[-1] else f"saved {saved} by {token}, found step {step} by {by}"
    least = max([10, *numbers(newest, "began")])
    return "" if step >= least else f"found step {step} instead of {least} or later"


_looked: dict[tuple[tuple[str, bytes], ...], tuple[str, int] | None] = {}


def recovered(content: Content) -> tuple[str, int] | None:
    """(attempt, step) of the checkpoint that a start would resume from."""
    same = tuple(sorted(content.items()))
    if same not in _looked:
        found = opened(Memory(dict(content)), "later").newest(checksums=False)
        _looked[same] = None if found is None else (found.meta["by"], found.step)
    return _looked[same]


@pytest.mark.parametrize(("distance", "again"), [(10, 1), (5, 0)])
def test_an_earlier_start_takes_nothing_from_a_later_one(distance: int, again: int) -> None:
    """They save the same step or different ones; each is stopped at any point, and any one request arrives a second
    time."""
    explorer = Explorer([goes_on(20), starts("two", distance)], before(10), nothing_is_lost)
    assert explorer.run(again) == ""
    assert len(explorer.came_from) > 20_000, "all of them"


def test_an_earlier_start_takes_nothing_even_if_the_newest_checkpoint_is_damaged() -> None:
    """The later start falls back to an older one; the earlier start does not know this and continues to save."""
    content = before(10, 20)
    file = next(name for name in content if name.startswith("step-00000020") and name.endswith("safetensors"))
    content[file] = content[file][:-1]
    assert Explorer([goes_on(30), starts("two", 10, prunes=False)], content, nothing_is_lost).run() == ""


def test_two_starts_at_once() -> None:
    assert (
        Explorer([starts("one", 10, prunes=False), starts("two", 10, prunes=False)], before(10), nothing_is_lost).run()
        == ""
    )


def test_the_search_finds_a_planted_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one name for the manifests of all attempts, a late request of the earlier one undoes what the later one has
    saved."""
    monkeypatch.setattr(CheckpointStore, "_manifest_name", lambda *_: MANIFEST)
    problem = Explorer([goes_on(20), starts("two", 10)], before(10), nothing_is_lost).run(again=1)
    assert "saved [20] by two, found step 20 by one" in problem and problem.endswith(
        "write step-00000020/manifest.json"
    )
