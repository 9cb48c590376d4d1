"""The checkpoint store: whole tensors by name in safetensors files, committed by a manifest that is written last.

    checkpoints/attempt-0001.json                ownership: every start takes the next number (attempts.py)
    checkpoints/step-00000500/
        a0001-3f9c21-r00000-p000.safetensors     attempt, save, rank, part; each name is written once, by one process
        manifest.json                            sizes and checksums of the files, the file of each tensor, metadata,
                                                 who wrote it, and a checksum of all of this

A directory without a manifest is not a checkpoint. Deleting removes the manifest first (retention.py). There is no
"latest" pointer: a run resumes from the newest checkpoint that passes verification. Any world size and any ZeRO stage
can read what any other has written.

Two starts of a run may be alive at once, and a request of the earlier one may still take effect at any time. This is
harmless, because the later start never uses a name that the earlier one might write or delete: if the earlier one has
left files in a step's directory, or has committed that step or a later one, the later start's manifest is called
`manifest-a0002-7be01c.json`, and takes precedence over `manifest.json`. A manifest records the step from which its
start resumed (`owner.from`): what an earlier start has committed beyond that no longer belongs to the run.

Importing this file does not import torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.errors import CascadeError, DataError
from data_pipeline.storage.folder import Folder, open_folder
from data_pipeline.storage.retry import PATIENCE, disk_fault, persist
from training.checkpoint.attempts import Attempts, record_name
from training.checkpoint.downloads import Share
from training.checkpoint.retention import DAMAGED, Standing, doomed, leftovers
from training.processes.collectives import all_sum, errors_of_all, gather_json, gather_objects, together
from training.processes.endings import Superseded
from training.processes.ranks import Ranks

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
PINNED = "pinned.json"
"""File next to the checkpoints: steps that `prune` must not delete."""
READ_BYTES = 1 << 22
READERS = 4
"""Files that a process verifies (and fetches from an object store) concurrently."""
PART_BYTES = 1 << 28
"""Tensors are grouped into files of about this size, so that each can be sent to an object store in one request."""
STEP_NAME = re.compile(r"step-(\d{8,})")
LATER_MANIFEST = re.compile(r"manifest-a(\d{4,})-\w+\.json")
LOOK_BACK = 4
"""Number of lower checkpoints that decide whether one still belongs to the run; an earlier start commits at most one
after a later start has begun."""


OURS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of reading a file that say something about this process and its user, not about the file."""


def unreadable(place: str, error: OSError) -> str:
    """Return the sentence about a file of a checkpoint that this process may not read: skipping the checkpoint would
    repeat steps for no reason."""
    remedy = "raise the limits" if error.errno not in OURS[:2] else "give this user access to it"
    return f"{place}: it cannot be read ({error.strerror}); {remedy}, or move the checkpoint away to use an earlier one"


class CheckpointError(CascadeError):
    """A checkpoint could not be written. Training can continue, and the last checkpoint is still good."""


def step_name(step: int) -> str:
    """Return the directory name of the checkpoint of `step`."""
    return f"step-{step:08d}"


@dataclass
class Checkpoint:
    """A committed checkpoint; reads tensors lazily, one file at a time."""

    folder: Folder
    manifest: dict[str, Any]
    sizes: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    """Sizes in bytes of the files in its directory, as listed when it was opened."""
    _files: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Open files by name."""

    @property
    def step(self) -> int:
        """Optimizer steps done when the checkpoint was taken."""
        return int(self.manifest["step"])

    @property
    def meta(self) -> dict[str, Any]:
        """Metadata that the run needs to resume; JSON values."""
        return self.manifest["meta"]

    @property
    def bytes(self) -> int:
        """Total size of its files in bytes."""
        return sum(file["bytes"] for file in self.manifest["files"])

    def recorded(self, key: str) -> Any:
        """Return `meta[key]`, which a run needs to resume.

        Raises:
            DataError: the key is missing: another program wrote the checkpoint, or the manifest was edited.
        """
        if key not in self.meta:
            raise DataError(f"{self.folder}: its {MANIFEST} has no {key}; it was not written by a training run")
        return self.meta[key]

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the tensors that start with `prefix` (`param/`, `ema/0/`, ...)."""
        return [name for name in self.manifest["tensors"] if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor `name`."""
        return tuple(self.manifest["tensors"][name]["shape"])

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor on the CPU, mapped from the file: copy it before changing it.

        Raises:
            KeyError: there is no tensor of this name.
        """
        from training.checkpoint.safetensors import open_tensors

        place = self.manifest["tensors"][name]["file"]
        if place not in self._files:
            self._files[place] = self._persist(place, open_tensors)
        return self._files[place].get_tensor(name)

    def _persist(self, name: str, action: Callable[[Path], Any]) -> Any:
        """Call `action` with the local path of a file; its file system may fail for a while."""
        where = f"{self.folder}/{name}"
        return disk_fault(lambda: persist(where, lambda: action(self.folder.fetch(name)), PATIENCE))

    def problems(self, part: int = 0, parts: int = 1, checksums: bool = True, thorough: bool = False) -> list[str]:
        """Return the problems of the files, each as the end of a sentence ("FILE is missing").

        Args:
            part, parts: check only this share of the files; with an unchanged number of processes, rank and world size
                give the files that this process wrote.
            checksums: also read the files, not only compare sizes.
            thorough: verify SHA-256 instead of XXH3.
        """
        files = self.manifest["files"]
        mine = files[len(files) * part // parts : len(files) * (part + 1) // parts]
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda entry: self._problem(entry, checksums, thorough), mine)
            return [problem for problem in found if problem]

    def _problem(self, entry: dict[str, Any], checksums: bool, thorough: bool) -> str:
        name, kind = entry["name"], "sha256" if thorough or "xxh3" not in entry else "xxh3"
        size = self.sizes.get(name)
        if size is None:
            return f"{name} is missing"
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        try:
            if checksums and self._persist(name, partial(checksum, kind=kind)) != entry[kind]:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            if error.errno in OURS:
                raise DataError(unreadable(f"{self.folder}/{name}", error)) from error
            return f"{name} cannot be read ({error.strerror})"
        return ""


@dataclass(frozen=True)
class Found:
    """A manifest in a step's directory with the sizes of the files next to it, or the problem with it. JSON values, so
    that it can be sent to other ranks."""

    manifest: dict[str, Any] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    committed: bool = False
    """A manifest exists, or may exist."""


def checksum(path: Path, kind: str) -> str:
    """Return the checksum of a file as hex; `kind`: `sha256` or `xxh3` (128 bits)."""
    import xxhash

    digest = hashlib.sha256() if kind == "sha256" else xxhash.xxh3_128()
    block = memoryview(bytearray(READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


class CheckpointStore:
    """All checkpoints of one run."""

    def __init__(self, path: str) -> None:
        self.folder = open_folder(path)
        self.attempts = Attempts(self.folder)
        self._saves = 0
        self._began: int | None = None
        """The step from which this start resumed (-1: a new run), once it has claimed the checkpoints."""
        self._saved = -1
        """The newest step that this start has committed."""
        self._taken = -1
        """The newest committed step when this start claimed the checkpoints."""
        self._standings: dict[int, Standing] = {}
        self._swept: set[int] = set()
        """Kept steps whose directories have already been cleaned of orphaned files."""
        self._damaged: set[int] = set()
        """Damaged steps that `newest` has skipped; they do not count towards `keep_last`."""

    # ------------------------------------------------------------------------------------------- who may write

    @property
    def attempt(self) -> int:
        """The number of this start of the run."""
        return self.attempts.number

    def claim(self, ranks: Ranks) -> int:
        """Take the next attempt number and return it; from then on, earlier attempts of this run can neither commit nor
        delete anything. Collective."""
        claimed = together(lambda: (*self.attempts.claim(), self._newest_committed()), ranks)
        self.attempts.number, self.attempts.token, self._taken = claimed
        return self.attempt

    def disclaim(self) -> None:
        """Give back the attempt number of a start that has written nothing. Rank 0 only."""
        if self.attempt:
            with suppress(OSError, CascadeError):
                self.folder.remove(record_name(self.attempt))

    def resume(
        self, ranks: Ranks, check: Callable[[Checkpoint | None], None], share: Share | None = None
    ) -> Checkpoint | None:
        """Claim the checkpoints for this start, and return the newest undamaged one (None for a new run). Collective.

        Args:
            check: called on rank 0 with that checkpoint before anything is claimed; may raise to refuse it.
            share: see `newest`.
        """
        seen, checkpoint = self._newest_now(ranks, share)
        together(lambda: check(checkpoint), ranks)
        self.claim(ranks)
        if self._taken != seen:  # an earlier start was still alive and has saved in the meantime
            _, checkpoint = self._newest_now(ranks, share)
            together(lambda: check(checkpoint), ranks)
        self._began = checkpoint.step if checkpoint else -1
        return checkpoint

    def _newest_now(self, ranks: Ranks, share: Share | None) -> tuple[int, Checkpoint | None]:
        """Return the newest committed step and the newest undamaged checkpoint. Retries if an earlier start that is
        still alive has saved a checkpoint and deleted older ones in the meantime."""
        while True:
            seen, checkpoint, problem = together(self._newest_committed, ranks), None, None
            try:
                checkpoint = self.newest(ranks, share=share)
            except DataError as error:
                problem = error
            if checkpoint is not None or together(self._newest_committed, ranks) == seen:
                break
        if problem is not None:
            raise problem
        return seen, checkpoint

    def check_owner(self) -> None:
        """Raise `Superseded` if a later start of the same run has claimed the checkpoints."""
        self.attempts.check()

    # ----------------------------------------------------------------------------------------------- writing

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any], ranks: Ranks, group: Any = None
    ) -> None:
        """Write and commit a checkpoint. Collective over `group` (None: the control group).

        Args:
            tensors: this rank's share of the whole tensors by name (CPU); shares do not overlap.
            meta: other data that the run needs to resume; JSON values. Only rank 0's is stored.

        Raises:
            CheckpointError: a rank could not write; nothing was committed.
            Superseded: a later attempt owns the run now.
        """
        from training.checkpoint.safetensors import NAMES, Digest, chunks, split_by_size

        self._saves += 1
        own = f"a{self.attempt:04d}-{_digest([self.attempts.token, self._saves])[:6]}"
        folder = self._folder(step)
        files: list[dict[str, Any]] = []
        error: Exception | None = None
        try:
            if ranks.is_main:
                self.check_owner()
            for part, group_of_tensors in enumerate(split_by_size(tensors, PART_BYTES)):
                name = f"{own}-r{ranks.rank:05d}-p{part:03d}.safetensors"
                digest = Digest(chunks(group_of_tensors))
                folder.write(name, digest)
                where = {n: {"shape": list(t.shape), "dtype": NAMES[t.dtype]} for n, t in group_of_tensors.items()}
                sums = {"sha256": digest.sha256, "xxh3": digest.xxh3}
                files.append({"name": name, "bytes": digest.size, **sums, "tensors": where})
        except (OSError, CascadeError) as caught:
            error = caught
        errors = errors_of_all(error, ranks, group)
        if errors:
            with suppress(OSError, CascadeError):  # half a checkpoint is useless, and the disk may be full
                folder.remove_files([entry["name"] for entry in files])
        self._raise_first(errors, step)
        written = gather_json(files, ranks, group)
        if ranks.is_main:
            try:
                self.check_owner()
                owner = {"token": self.attempts.token, "host": socket.gethostname(), "from": self._began}
                content = _manifest(step, self.attempt, owner, written, meta)
                folder.write(self._manifest_name(step, own), [content])
                self._standings.pop(step, None)
                self._damaged.discard(step)
                self._saved = max(self._saved, step)
            except (OSError, CascadeError) as caught:
                error = caught
        self._raise_first(errors_of_all(error, ranks, group), step)

    def _manifest_name(self, step: int, own: str) -> str:
        """Return a name that no earlier attempt might still write or delete (see the top of this file)."""
        plain = step > self._taken and all(name.startswith(own) for name in self._folder(step).names())
        return MANIFEST if plain else f"manifest-{own}.json"

    def _raise_first(self, errors: list[Exception | None], step: int) -> None:
        for rank, error in enumerate(errors):
            if isinstance(error, Superseded):
                raise error
            if error is not None:
                raise CheckpointError(
                    f"{self.folder}: the checkpoint of step {step} was not written (rank {rank}: {error}); earlier "
                    f"checkpoints are untouched, and training continues: free up space or fix the store before the next"
                ) from error

    def prune(self, keep_last: int, keep_every: int = 0, keep_best: bool = False) -> list[int]:
        """Delete the checkpoints that need not be kept (retention.py), and the remains of unfinished saves up to the
        newest checkpoint; return the deleted steps. Rank 0 only.

        Raises:
            Superseded: a later attempt owns the run now; nothing was deleted.
        """
        self.check_owner()
        steps = self.steps()
        standings = {step: found for step in steps if step not in self._damaged and (found := self._standing(step))}
        pinned = self.pinned()
        gone = [s for s in doomed(steps, standings, self._saved, keep_last, keep_every, keep_best) if s not in pinned]
        for step in gone:
            limit = self.attempt - (step > self._saved)  # we may be writing beyond our newest one
            self._remove(step, leftovers(self._folder(step).names(), (), limit, unknown=True))
            self._standings.pop(step, None)
        for step in [s for s in standings if s not in gone and s < self._saved and s not in self._swept]:
            ours, names = standings[step].files, self._folder(step).names()
            replaced = [MANIFEST] if MANIFEST in names and MANIFEST not in ours else []
            self._remove(step, replaced + leftovers(names, ours, self.attempt))
            self._swept.add(step)
        return gone

    def pin(self, steps: Iterable[int]) -> None:
        """Set the steps that `prune` must not delete, replacing those set before."""
        self.folder.write(PINNED, [json.dumps(sorted(steps)).encode()])

    def pinned(self) -> set[int]:
        """Return the steps set by `pin`; none if the file is missing or damaged."""
        try:
            return {int(step) for step in json.loads(self.folder.read(PINNED))}
        except (OSError, ValueError, TypeError, DataError):
            return set()

    def _remove(self, step: int, names: list[str]) -> None:
        first = manifests(names)
        self._folder(step).remove_files(first)
        self._folder(step).remove_files([name for name in names if name not in first])

    def _standing(self, step: int) -> Standing | None:
        """Return the standing of a committed checkpoint, read once; None if there is none."""
        if step not in self._standings:
            read = self._read(step)
            whole = next((found.manifest for found in read if found.manifest is not None), None)
            if not read[0].committed:
                return None
            self._standings[step] = Standing.of(whole) if whole is not None else DAMAGED
        return self._standings[step]

    # ----------------------------------------------------------------------------------------------- reading

    def _folder(self, step: int) -> Folder:
        return self.folder.sub(step_name(step))

    def steps(self) -> list[int]:
        """Return the steps that have a directory, newest first, committed or not."""
        matches = (STEP_NAME.fullmatch(name) for name in self.folder.names())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def is_committed(self, step: int) -> bool:
        """Return whether a checkpoint of this step was committed, that is, has a manifest."""
        try:
            return bool(manifests(disk_fault(self._folder(step).sizes)))
        except (OSError, DataError):  # there is something, but it cannot be read
            return True

    def _newest_committed(self) -> int:
        return next((step for step in self.steps() if self.is_committed(step)), -1)

    def newest_whole(self) -> int:
        """Return the newest step whose files all exist with the right sizes, without verifying checksums; -1: none."""
        for step in self.steps():
            with suppress(DataError):
                if not self.open(step).problems(checksums=False):
                    return step
        return -1

    def open(self, step: int) -> Checkpoint:
        """Open the checkpoint of a step, without verifying its files.

        Raises:
            DataError: it was not committed, or its manifest is damaged.
        """
        read = self._read(step)
        for found in read:
            if found.manifest is not None:
                return Checkpoint(self._folder(step), found.manifest, found.sizes)
        raise DataError(read[0].problem)

    def _read(self, step: int) -> list[Found]:
        """Read the manifests of the latest start that has committed a step (two, if starts share a number); the list is
        never empty. A damaged one does not bring back that of an earlier start, which the run has left behind."""
        folder = self._folder(step)
        try:
            sizes = disk_fault(folder.sizes)
        except (OSError, DataError) as error:
            if isinstance(error, OSError) and error.errno in OURS:
                raise DataError(unreadable(str(folder), error)) from error
            reason = getattr(error, "strerror", error)
            return [Found(problem=f"{folder}: its {MANIFEST} cannot be read ({reason})", committed=True)]
        found = []
        for name in latest(manifests(sizes)):
            try:
                found.append(
                    Found(
                        {**parse_manifest(disk_fault(partial(folder.read, name)), step, name), "name": name},
                        sizes,
                        committed=True,
                    )
                )
            except OSError as error:
                if error.errno in OURS:
                    raise DataError(unreadable(f"{folder}/{name}", error)) from error
                problem = f"{folder}: its {name} cannot be read ({error.strerror or 'it is gone'})"
                found.append(Found(problem=problem, committed=True))
            except DataError as error:
                found.append(Found(problem=f"{folder}: {error}", committed=True))
        return found or [Found(problem=f"{folder}: no {MANIFEST}, so the checkpoint was never finished")]

    def _plain_manifests(self, step: int) -> list[dict[str, Any]]:
        return [vars(found) for found in self._read(step)]

    def newest(
        self,
        ranks: Ranks | None = None,
        checksums: bool = True,
        wanted: Callable[[dict[str, Any]], bool] = lambda meta: True,
        share: Share | None = None,
    ) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or None if there is no committed one. Collective.

        The ranks share the work of verifying checksums. A damaged checkpoint is skipped, and logged with its problem.

        Args:
            checksums: verify checksums, not only sizes.
            wanted: only consider checkpoints whose metadata satisfies this.
            share: this process's share of its machine's downloads (shared_downloads), from an object store: each
                machine then verifies its own copies.

        Raises:
            DataError: there are committed checkpoints, but all are damaged.
        """
        ranks = ranks or Ranks()
        damaged = []
        steps = together(self.steps, ranks)
        for step in steps:
            for plain in together(partial(self._plain_manifests, step), ranks):
                read = Found(**plain)
                problem = read.problem
                if read.manifest is not None:
                    checkpoint = Checkpoint(self._folder(step), read.manifest, read.sizes)
                    if not wanted(checkpoint.meta) or together(partial(self._left_behind, checkpoint, steps), ranks):
                        continue
                    found = self._problems(checkpoint, ranks, checksums, share)
                    if not found:
                        self._damaged.discard(step)
                        return checkpoint
                    problem = f"{checkpoint.folder}: {'; '.join(found)}"
                if read.committed:
                    damaged.append(problem)
                    self._damaged.add(step)
                if ranks.is_main:
                    log.warning("checkpoint skipped: %s", problem)
        if damaged:
            raise DataError(
                f"{self.folder}: all of its checkpoints are damaged ({damaged[0]}); restore one from a copy, or "
                f"start a new run with another run.dir"
            )
        return None

    def _problems(self, checkpoint: Checkpoint, ranks: Ranks, checksums: bool, share: Share | None) -> list[str]:
        """Return the problems of its files, found by all ranks together."""
        part, parts = (share.index, share.count) if share is not None else (ranks.rank, ranks.world_size)
        mine: list[str] = []
        error: CascadeError | None = None
        try:
            mine = checkpoint.problems(part, parts, checksums)
        except CascadeError as caught:
            error = caught
        for failure in errors_of_all(error, ranks):
            if failure is not None:
                raise failure
        if not all_sum([float(len(mine))], ranks)[0]:
            return []
        return list(dict.fromkeys(problem for problems in gather_objects(mine, ranks) for problem in problems))

    def _left_behind(self, checkpoint: Checkpoint, steps: list[int]) -> bool:
        """Return whether an earlier start committed it after a later start had resumed from an earlier step."""
        mine, step = Standing.of(checkpoint.manifest), checkpoint.step
        if self._began is not None and mine.attempt < self.attempt and step > self._began:
            return True
        below = (self._standing(lower) for lower in steps if lower < step)
        known = islice((standing for standing in below if standing), LOOK_BACK)
        return any(mine.left_behind_by(standing, step) for standing in known)


def manifests(names: Iterable[str]) -> list[str]:
    """Return the manifests among the names in a step's directory, the one that takes precedence first."""
    later = [(int(match[1]), name) for name in names if (match := LATER_MANIFEST.fullmatch(name))]
    return [name for _, name in sorted(later, reverse=True)] + [name for name in names if name == MANIFEST]


def latest(names: list[str]) -> list[str]:
    """Return those of the latest start among `manifests`."""
    attempts = [int(match[1]) if (match := LATER_MANIFEST.fullmatch(name)) else 0 for name in names]
    return [name for name, attempt in zip(names, attempts, strict=True) if attempt == attempts[0]]


def parse_manifest(content: bytes, step: int, name: str = MANIFEST) -> dict[str, Any]:
    """Parse a manifest, and add the tensors of all its files under `tensors`.

    Args:
        step: the step it must belong to.
        name: its file name, for errors.

    Raises:
        DataError: it is damaged, or of another step or format.
    """
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            words = f"format {manifest['format']} is not {FORMAT}, the one this version reads"
            raise DataError(f"{words}; use the version that wrote it, or a newer one")
        if manifest["step"] != step:
            raise ValueError(f"it is for step {manifest['step']}")
        if manifest.pop("sha256", "") not in ("", _digest(manifest)):  # older ones have none
            raise ValueError("it does not match its own checksum")
        tensors: dict[str, Any] = {}
        for entry in manifest["files"]:
            if not (entry["bytes"] >= 0 and "/" not in entry["name"] and ("sha256" in entry or "xxh3" in entry)):
                raise ValueError(f"it does not describe the file {entry['name']}")
            for tensor, where in entry["tensors"].items():
                tensors[tensor] = {**where, "file": entry["name"], "shape": [int(n) for n in where["shape"]]}
        manifest["tensors"] = tensors
        if not (manifest["attempt"] >= 0 and isinstance(manifest["meta"], dict)):
            raise ValueError("its values have the wrong types")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"its {name} is damaged ({error!r})") from error


def _manifest(
    step: int, attempt: int, owner: dict[str, Any], files: list[list[dict[str, Any]]], meta: dict[str, Any]
) -> bytes:
    flat = [entry for rank_files in files for entry in rank_files]
    manifest = {"format": FORMAT, "step": step, "attempt": attempt, "owner": owner, "files": flat, "meta": meta}
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    return json.dumps({**manifest, "sha256": _digest(manifest)}).encode()


def _digest(values: Any) -> str:
    """Return the SHA-256 of JSON values; a manifest must not contain its own."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
