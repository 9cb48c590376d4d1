"""A thread that detects when this rank makes no progress, reports where, and finally ends the process.

It runs from the first line of a training and never waits for other ranks: communication with them goes through a second
thread, because the key-value store of a frozen rank 0 accepts connections and never answers, whatever its time-out.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.config.experiment import TrainConfig
from training.processes import flight
from training.processes.endings import DeviceLost, RankLost, blame, device_lost, say
from training.processes.exit_codes import EXIT_HUNG
from training.processes.failures import is_lost_rank, node_name
from training.processes.ranks import Ranks

log = logging.getLogger("cascade")

BEAT_S = 2.0
SILENT_S = 10.0
"""Seconds without a report from a rank's watchdog (due every BEAT_S) after which the rank is frozen or gone."""
ANSWER_S = 3.0
"""Seconds that a report waits for information about the other ranks."""
MARGIN_S = 60.0
"""Seconds that the watchdog waits longer than the process groups, whose time-out errors are more specific."""
PAUSE_S = 10.0
"""Seconds that the watchdog may oversleep; more means that the process was stopped (Ctrl-Z, `scontrol suspend`), which
is no lack of progress."""
PATIENT = ("checkpoint", "samples", "validation", "evaluation", "end")
"""Phases that may always take as long as the first step."""


class Watchdog:
    """Watches the phases that the loop reports with `phase`.

    A phase that takes longer than `warn_s` seconds is reported once, with the stacks of all threads in this rank's log
    (`log_file`; before there is one, on stderr), and its last collectives beside it. One that takes longer than
    `limit_s` (while `patient` is set, until the first step is done, longer than `patient_s`) ends the process with exit
    code EXIT_HUNG, so that a scheduler can restart it.

    After `join`, rank 0 also reports which other ranks are stuck, and the others whether rank 0 is.
    """

    def __init__(
        self,
        ranks: Ranks,
        log_file: Path | None,
        warn_s: float,
        limit_s: float,
        patient_s: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.ranks, self.warn_s, self.limit_s, self.patient_s = ranks, warn_s, limit_s, patient_s
        self.log_file, self._leave = log_file, leave
        self.patient = True
        self._now: tuple[str, int | None, float] = ("imports", None, time.monotonic())
        self._beats: _Beats | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @staticmethod
    def limits(settings: TrainConfig) -> tuple[float, float, float]:
        """Return warn_s, limit_s and patient_s for these settings."""
        return settings.stall_s, settings.timeout_s + MARGIN_S, settings.timeout_first_s + MARGIN_S

    def phase(self, name: str, step: int | None = None) -> None:
        """Report that this rank starts phase `name` of step `step` (None during the start). Costs only an
        assignment."""
        self._now = (name, step, time.monotonic())

    def join(self, connect: Callable[[], Any]) -> None:
        """Start exchanging phases with the other ranks; `connect` opens a separate connection to the store."""
        self._beats = _Beats(self.ranks, connect, lambda: self._now)

    def explain(self, error: RuntimeError, ranks: Ranks) -> DeviceLost | RankLost | None:
        """Return the error to end with for one that this rank's GPU, or another rank, has caused; None for any
        other."""
        if lost := device_lost(error, ranks):
            blame(ranks.rank, lost)
            return lost
        return RankLost(self._last_words(error)) if is_lost_rank(str(error)) else None

    def _last_words(self, error: Exception) -> str:
        name, step, since = self._now
        after = f"phase {name}, after {time.monotonic() - since:.0f} s{self._others()}"
        said = textwrap.shorten(str(error).splitlines()[0], 200, placeholder=" ...")
        if step is None:
            return (
                f"rank {self.ranks.rank}: another rank died or did not respond during the start ({after}): {said}; the "
                f"reason is in that rank's log or output; repeat the command to start again"
            )
        return (
            f"rank {self.ranks.rank}: another rank died or did not respond within the time-outs (step {step}, "
            f"{after}): {said}; the reason is in that rank's log; the same command resumes from the newest checkpoint"
        )

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._beats is not None:
            self._beats.stop.set()
        self._thread.join(timeout=2.0)

    def _watch(self) -> None:
        warned = None
        pause: tuple[object, float] = (None, 0.0)  # the phase during which this process was stopped, and how long
        nap, asleep = min(BEAT_S, self.warn_s / 4), time.monotonic()
        while not self._stop.wait(nap):
            now = name, step, since = self._now
            overslept = time.monotonic() - asleep - nap
            paused = pause[1] if pause[0] is now else 0.0
            if overslept > PAUSE_S:
                paused += overslept
                pause = (now, paused)
            silent = time.monotonic() - since - paused
            where = "the start" if step is None else f"step {step}"
            if silent > self.warn_s and warned is not now:
                warned = now
                log.warning(
                    "rank %d has been in %s, phase %s, for %.0f s%s; the stacks of its threads are in %s",
                    self.ranks.rank,
                    where,
                    name,
                    silent,
                    self._others(),
                    self.log_file or "its output",
                )
                self._dump_stacks()
                self._record_collectives()
            if silent > (self.patient_s if self.patient or name in PATIENT else self.limit_s):
                sentence = (
                    f"rank {self.ranks.rank}: no progress in {where}, phase {name}, for {silent:.0f} s"
                    f"{self._others()}: it exits with code {EXIT_HUNG} so that the job can restart from the newest "
                    f"checkpoint"
                )
                log.error("%s", sentence)
                if self.log_file is not None and not self.ranks.is_main:  # rank 0, whose log is shown, may be frozen
                    say(sentence)
                self._leave(EXIT_HUNG)
                return
            asleep = time.monotonic()

    def _dump_stacks(self) -> None:
        with suppress(OSError, ValueError):
            if self.log_file is None:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                return
            with open(self.log_file, "a") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    def _record_collectives(self) -> None:
        """Write torch's record of this rank's last collectives next to its log, in a thread of its own: asking a GPU
        that hangs may take forever."""
        if self.log_file is None:
            return
        name, step, _ = self._now
        facts = {"rank": self.ranks.rank, "world_size": self.ranks.world_size, "node": node_name()}
        facts |= {"phase": name, "step": step, "time": time.time()}
        place = flight.record_of(self.log_file)
        threading.Thread(target=flight.write_record, args=(place, facts), daemon=True).start()

    def _others(self) -> str:
        """Describe the ranks that are in another phase or have stopped reporting."""
        found = [] if self._beats is None else self._beats.others()
        return f" ({'; '.join(found[:8])})" if found else ""


class _Beats(threading.Thread):
    """Exchanges phases: every rank writes its own to the store; rank 0 reads those of the others, and they read that of
    rank 0. The clocks of nodes may differ, so a rank repeats the time that it has last read of rank 0's."""

    def __init__(
        self, ranks: Ranks, connect: Callable[[], Any], now: Callable[[], tuple[str, int | None, float]]
    ) -> None:
        super().__init__(name="beats", daemon=True)
        self._ranks, self._connect, self._now = ranks, connect, now
        self.stop = threading.Event()
        self._wanted, self._known = threading.Event(), threading.Event()
        self._found: list[str] = []
        self._answered = self._heard = time.monotonic()
        """When the store last answered, and when rank 0's time last changed; on rank 0, when it began to listen."""
        self._time_of_0 = 0.0
        """Time of rank 0, seconds of its monotonic clock, as last read."""
        self.start()

    def others(self) -> list[str]:
        """Return one phrase per rank that is in another phase or silent; waits at most ANSWER_S seconds."""
        self._known.clear()
        self._wanted.set()
        if self._known.wait(ANSWER_S):
            return self._found
        silent = time.monotonic() - self._answered
        return [] if self._ranks.is_main else [f"rank 0 has not responded for {silent:.0f} s"]

    def run(self) -> None:
        with suppress(RuntimeError):  # rank 0, which hosts the store, is gone; the collective will fail
            store = self._connect()
            while not self.stop.is_set():
                name, step, since = self._now()
                mine = f"beat/{self._ranks.rank}"
                self._ask_time(store)
                store.set(mine, json.dumps([name, step, time.monotonic() - since, self._time_of_0]))
                store.check([mine])  # `set` does not wait for an answer
                self._answered = time.monotonic()
                if self._wanted.wait(BEAT_S):
                    self._wanted.clear()
                    self._found = self._read(store)
                    self._known.set()

    def _ask_time(self, store: Any) -> None:
        if self._ranks.is_main:
            self._time_of_0 = time.monotonic()
            store.set("time of rank 0", str(self._time_of_0))
        elif store.check(["time of rank 0"]):
            before, self._time_of_0 = self._time_of_0, float(store.get("time of rank 0"))
            if self._time_of_0 != before:
                self._heard = time.monotonic()

    def _read(self, store: Any) -> list[str]:
        found = []
        here = self._now()[:2]
        for rank in range(self._ranks.world_size if self._ranks.is_main else 1):
            if rank == self._ranks.rank or not store.check([f"beat/{rank}"]):
                continue
            name, step, silent, at = json.loads(store.get(f"beat/{rank}"))
            where = "the start" if step is None else f"step {step}"
            # A rank whose first report was before rank 0's has no time of it yet, and may never send a second one.
            age = time.monotonic() - (at if self._ranks.is_main and at else self._heard)
            if age > SILENT_S:
                found.append(f"rank {rank} has not reported for {age:.0f} s (last in {where}, phase {name})")
            elif (name, step) != here:
                found.append(f"rank {rank} is in {where}, phase {name}, for {silent + age:.0f} s")
        return found
