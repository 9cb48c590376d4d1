"""Which checkpoints are kept, and what in their directories is nobody's any more. Names and numbers only, no I/O."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

OF_ATTEMPT = re.compile(r"\.?(?:manifest-)?a(\d{4,})-.+")
"""Files whose name says which attempt has written them; with a dot: unfinished ones on disk."""


@dataclass(frozen=True)
class Standing:
    """What retention must know of a committed checkpoint."""

    healthy: bool = True
    """Its last step was applied: a run can go back to it."""
    validation: float | None = None
    """Loss of the averaged weights; None where it was not measured or is not finite."""
    attempt: float = 0
    began: float = math.inf
    """The step from which its start went on; infinity where it does not say."""
    files: frozenset[str] = frozenset()
    """Its own files, the manifest among them."""

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Standing:
        """What the metadata of a checkpoint says about it."""
        meta, began = manifest["meta"], (manifest.get("owner") or {}).get("from")
        loss = meta.get("validation")
        measured = isinstance(loss, (int, float)) and math.isfinite(loss)
        return cls(
            healthy=bool(meta.get("healthy", True)),
            validation=float(loss) if measured else None,
            attempt=manifest["attempt"],
            began=math.inf if began is None else began,
            files=frozenset([manifest["name"], *(entry["name"] for entry in manifest["files"])]),
        )

    def left_behind_by(self, other: Standing, step: int) -> bool:
        """Whether this checkpoint of `step` is off the run, which a later start has continued from an earlier step and
        saved (`other`)."""
        return other.attempt > self.attempt and other.began < step


DAMAGED = Standing(healthy=False, attempt=math.inf)
"""Of one whose manifest cannot be read: nothing is known of it."""


def doomed(
    steps: Iterable[int], standings: dict[int, Standing], saved: int, keep_last: int, keep_every: int, keep_best: bool
) -> list[int]:
    """The steps to delete, in the order of `steps`.

    Kept are the newest `keep_last`, multiples of `keep_every`, the newest healthy one and, if `keep_best`, the one with
    the lowest validation loss. Nothing from `saved` on is touched, the newest step that this start has committed: one
    may be on its way there, or belong to a later start. Only what an earlier start has committed off the run goes.
    """
    off = {s for s, a in standings.items() if any(a.left_behind_by(b, s) for t, b in standings.items() if t < s)}
    committed = sorted(standings.keys() - off, reverse=True)
    keep = {*committed[:keep_last], *(s for s in committed if keep_every and s % keep_every == 0)}
    keep.update([step for step in committed if standings[step].healthy][:1])
    measured = [(loss, step) for step in committed if (loss := standings[step].validation) is not None]
    if keep_best and measured:
        keep.add(min(measured)[1])
    return [step for step in steps if step in off or (step not in keep and step < saved)]


def leftovers(names: Iterable[str], files: Collection[str], limit: int, unknown: bool = False) -> list[str]:
    """The names that are not among `files` and belong to attempts up to `limit`; `unknown`: also those that do not say
    whose they are."""
    rest = [name for name in names if name not in files]
    return [n for n in rest if (int(match[1]) <= limit if (match := OF_ATTEMPT.fullmatch(n)) else unknown)]
