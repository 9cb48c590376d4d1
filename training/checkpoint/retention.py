"""Which checkpoints to keep, and which files in their directories are orphaned. Names and numbers only, no I/O."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

OF_ATTEMPT = re.compile(r"\.?(?:manifest-)?a(\d{4,})-.+")
"""Names of files that contain the attempt that wrote them; those with a leading dot are unfinished files on disk."""


@dataclass(frozen=True)
class Standing:
    """What retention needs to know about a committed checkpoint."""

    healthy: bool = True
    """Its last step was applied, so a run can roll back to it."""
    validation: float | None = None
    """Validation loss of the averaged weights; None if it was not measured or is not finite."""
    attempt: float = 0
    began: float = math.inf
    """The step from which the start that wrote it resumed; infinity if not recorded."""
    files: frozenset[str] = frozenset()
    """Its own files, including the manifest."""

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Standing:
        """Return the standing recorded in a manifest."""
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
        """Return whether this checkpoint of `step` no longer belongs to the run, because a later start resumed from an
        earlier step and has saved `other`."""
        return other.attempt > self.attempt and other.began < step


DAMAGED = Standing(healthy=False, attempt=math.inf)
"""Standing of a checkpoint whose manifest cannot be read."""


def doomed(
    steps: Iterable[int], standings: dict[int, Standing], saved: int, keep_last: int, keep_every: int, keep_best: bool
) -> list[int]:
    """Return the steps to delete, in the order of `steps`.

    The newest `keep_last`, multiples of `keep_every`, the newest healthy one and, with `keep_best`, the one with the
    lowest validation loss are kept. So is everything from `saved` on, the newest step that this start has committed: a
    save may be in progress there, or belong to a later start. The only exceptions are checkpoints that an earlier start
    has committed and that no longer belong to the run.
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
    """Return the names that are not in `files` and belong to attempts up to `limit`; with `unknown`, also those that do
    not contain an attempt."""
    rest = [name for name in names if name not in files]
    return [n for n in rest if (int(match[1]) <= limit if (match := OF_ATTEMPT.fullmatch(n)) else unknown)]
