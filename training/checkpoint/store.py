"""Checkpoints that always come back: whole fp32 tensors by name in safetensors files, committed by a manifest that is
written last.

    checkpoints/attempt.json                     who may write: every start of a run takes the next attempt number
    checkpoints/step-00000500/
        a0001-3f9c21-r00000-p000.safetensors     attempt and its token, rank, part; no two writers touch the same file
        manifest.json                            sizes and checksums of the files, where each tensor lies, metadata, and
                                                 a checksum of all that

Importing this file does not import torch. A directory without `manifest.json` is no checkpoint. Deleting removes the
manifest first. Nothing points at "the latest": the newest checkpoint that proves healthy is the one to resume from.
Any world size and any ZeRO stage reads what any other has written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.errors import CascadeError, DataError
from data_pipeline.storage.folder import Folder, open_folder
from training.processes.distributed import Ranks, all_gather, broadcast, together
from training.processes.endings import Superseded

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
ATTEMPT = "attempt.json"
READ_BYTES = 1 << 22
READERS = 4
"""Files that a process verifies (and fetches from an object store) at a time."""
PART_BYTES = 1 << 28
"""Tensors are cut into files of about this size, so that a part can be sent to an object store in one request."""
STEP_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(CascadeError):
    """A checkpoint could not be written; training can go on, and the last one is still good."""


def step_name(step: int) -> str:
    """The name of the directory of the checkpoint of `step`."""
    return f"step-{step:08d}"


@dataclass
class Checkpoint:
    """A committed checkpoint; reads tensors lazily, one file at a time."""

    folder: Folder
    manifest: dict[str, Any]
    _files: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Open files by name."""

    @property
    def step(self) -> int:
        """Optimizer steps done when it was taken."""
        return int(self.manifest["step"])

    @property
    def meta(self) -> dict[str, Any]:
        """What else the run needs to resume; JSON values."""
        return self.manifest["meta"]

    @property
    def bytes(self) -> int:
        """Size of all its files together."""
        return sum(file["bytes"] for file in self.manifest["files"])

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors that begin with `prefix` (`param/`, `ema/0/`, ...)."""
        return [name for name in self.manifest["tensors"] if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor `name`."""
        return tuple(self.manifest["tensors"][name]["shape"])

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU (mapped from the file: copy it before changing it).

        Raises:
            KeyError: no tensor of this name.
        """
        from safetensors import safe_open

        place = self.manifest["tensors"][name]["file"]
        if place not in self._files:
            self._files[place] = safe_open(self.folder.fetch(place), framework="pt")
        return self._files[place].get_tensor(name)

    def problems(self, part: int = 0, parts: int = 1, checksums: bool = True, thorough: bool = False) -> list[str]:
        """What is wrong with the files (each an unfinished sentence).

        Args:
            part, parts: look at this part of the files (at the same number of processes: those that this one wrote).
            checksums: read them, not only compare sizes.
            thorough: by SHA-256 instead of XXH3.
        """
        files = self.manifest["files"]
        mine = files[len(files) * part // parts : len(files) * (part + 1) // parts]
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda entry: self._problem(entry, checksums, thorough), mine)
            return [problem for problem in found if problem]

    def _problem(self, entry: dict[str, Any], checksums: bool, thorough: bool) -> str:
        name, kind = entry["name"], "sha256" if thorough or "xxh3" not in entry else "xxh3"
        try:
            size = self.folder.size(name)
            if size is None:
                return f"{name} is missing"
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if checksums and checksum(self.folder.fetch(name), kind) != entry[kind]:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return ""


def checksum(path: Path, kind: str) -> str:
    """`sha256` or `xxh3` (128 bits) of a file."""
    import xxhash

    digest = hashlib.sha256() if kind == "sha256" else xxhash.xxh3_128()
    block = memoryview(bytearray(READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


class CheckpointStore:
    """All checkpoints of one run."""

    def __init__(self, path: str, attempt: int = 0, token: str = "") -> None:
        self.folder = open_folder(path)
        self.attempt, self._token = attempt, token
        self._standings: dict[int, tuple[bool, float | None]] = {}
        self._damaged: set[int] = set()
        """Steps that `newest` has passed over: they do not count among those to keep."""

    # ------------------------------------------------------------------------------------------- who may write

    def claim(self, ranks: Ranks) -> int:
        """Takes the next attempt number; from now on earlier attempts of this run can commit and delete nothing.
        Collective."""
        self.attempt, self._token = together(self._claim, ranks)
        return self.attempt

    def _claim(self) -> tuple[int, str]:
        attempt, token = self._owner()[0] + 1, uuid.uuid4().hex
        self._write_claim(attempt, token)
        return attempt, token

    def _write_claim(self, attempt: int, token: str) -> None:
        record = {
            "attempt": attempt,
            "token": token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
        }
        self.folder.write(ATTEMPT, [json.dumps(record).encode()])

    def _owner(self) -> tuple[int, str, str]:
        try:
            record = json.loads(self.folder.read(ATTEMPT))
            return int(record["attempt"]), str(record["token"]), str(record["host"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or damaged
            return 0, "", ""

    def check_owner(self) -> None:
        """Raises `Superseded` when a later start of the same run has claimed the checkpoints. Where the record is gone
        (a directory that was deleted, another disk in its place) nobody has: it is written again."""
        attempt, token, host = self._owner()
        if not token and self._token:
            self._write_claim(self.attempt, self._token)
        elif token != self._token:
            raise Superseded(
                f"{self.folder}: attempt {attempt} of this run on {host} has taken over; attempt {self.attempt} on "
                f"{socket.gethostname()} stops without touching its checkpoints"
            )

    # ----------------------------------------------------------------------------------------------- writing

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any], ranks: Ranks, group: Any = None
    ) -> None:
        """Writes and commits a checkpoint. Collective over `group` (None: the control group).

        Args:
            tensors: this rank's share of the whole tensors by name; shares do not overlap.
            meta: what else the run needs; JSON values. Rank 0's counts.

        Raises:
            CheckpointError: some rank could not write; nothing was committed.
            Superseded: another attempt owns the run now.
        """
        from training.checkpoint.safetensors import NAMES, Digest, chunks, split

        folder = self.folder.sub(step_name(step))
        files: list[dict[str, Any]] = []
        error: Exception | None = None
        try:
            if ranks.is_main:
                self.check_owner()
                self._standings.pop(step, None)
                folder.remove(MANIFEST)
                self._damaged.discard(step)
            for part, group_of_tensors in enumerate(split(tensors, PART_BYTES)):
                name = f"a{self.attempt:04d}-{self._token[:6]}-r{ranks.rank:05d}-p{part:03d}.safetensors"
                digest = Digest(chunks(group_of_tensors))
                folder.write(name, digest)
                where = {n: {"shape": list(t.shape), "dtype": NAMES[t.dtype]} for n, t in group_of_tensors.items()}
                sums = {"sha256": digest.sha256, "xxh3": digest.xxh3}
                files.append({"name": name, "bytes": digest.size, **sums, "tensors": where})
        except (OSError, CascadeError) as caught:
            error = caught
        reports = all_gather((files, error), ranks, group)
        if any(report[1] for report in reports):
            for entry in files:  # a part of a checkpoint is of no use to anyone, and the disk may be full
                with suppress(OSError, CascadeError):
                    folder.remove(entry["name"])
        self._raise_first([report[1] for report in reports], step)
        if ranks.is_main:
            try:
                self.check_owner()
                folder.write(MANIFEST, [_manifest(step, self.attempt, [report[0] for report in reports], meta)])
            except (OSError, CascadeError) as caught:
                error = caught
        self._raise_first([broadcast(error, ranks, group)], step)

    def _raise_first(self, errors: list[Exception | None], step: int) -> None:
        for rank, error in enumerate(errors):
            if isinstance(error, Superseded):
                raise error
            if error is not None:
                raise CheckpointError(
                    f"{self.folder}: the checkpoint of step {step} was not written (rank {rank}: {error}); earlier "
                    f"checkpoints are untouched, and training goes on: make room or mend the store before the next one"
                ) from error

    def prune(self, keep_last: int, keep_every: int = 0, keep_best: bool = False) -> list[int]:
        """Deletes committed checkpoints, and what unfinished saves left behind below the newest one. Rank 0 only.

        Kept are the newest `keep_last`, multiples of `keep_every`, the newest healthy one (`meta["healthy"]`: a run
        can go back to it) and, if `keep_best`, the one with the lowest validation loss. Those that `newest` found
        damaged count for nothing. Returns the deleted steps.
        """
        self.check_owner()
        committed = [step for step in self.steps() if step not in self._damaged and self._is_committed(step)]
        keep = {*committed[:keep_last], *(s for s in committed if keep_every and s % keep_every == 0)}
        keep.update([step for step in committed if self._standing(step)[0]][:1])
        measured = [(loss, step) for step in committed if (loss := self._standing(step)[1]) is not None]
        if keep_best and measured:
            keep.add(min(measured)[1])
        newest = committed[0] if committed else -1
        doomed = [step for step in self.steps() if step not in keep and step < newest]
        for step in doomed:
            self._folder(step).remove(MANIFEST)
            self._folder(step).remove_all()
        return doomed

    def _standing(self, step: int) -> tuple[bool, float | None]:
        """(healthy, validation loss) of a committed checkpoint; read once."""
        if step not in self._standings:
            try:
                meta = self.open(step).meta
                self._standings[step] = bool(meta.get("healthy", True)), meta.get("validation")
            except DataError:
                self._standings[step] = False, None
        return self._standings[step]

    # ----------------------------------------------------------------------------------------------- reading

    def _folder(self, step: int) -> Folder:
        return self.folder.sub(step_name(step))

    def steps(self) -> list[int]:
        """Steps that have a directory, newest first, committed or not."""
        matches = (STEP_NAME.fullmatch(name) for name in self.folder.names())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def _is_committed(self, step: int) -> bool:
        try:
            return self._folder(step).size(MANIFEST) is not None
        except OSError:  # something is there, and cannot be read
            return True

    def newest_whole(self) -> int:
        """The newest step whose files are all there with their sizes, their checksums not looked at; -1: none."""
        for step in self.steps():
            with suppress(DataError):
                if not self.open(step).problems(checksums=False):
                    return step
        return -1

    def open(self, step: int) -> Checkpoint:
        """The checkpoint of a step, its files not yet verified.

        Raises:
            DataError: not committed, or its manifest is damaged.
        """
        folder = self._folder(step)
        try:
            manifest = json.loads(folder.read(MANIFEST))
            if manifest["format"] != FORMAT:
                raise DataError(f"{folder}: format {manifest['format']} is not {FORMAT}, the one this version reads")
            if manifest["step"] != step:
                raise ValueError(f"it is of step {manifest['step']}")
            if manifest.pop("sha256", "") not in ("", _digest(manifest)):  # older ones have none
                raise ValueError("it does not match its own checksum")
            tensors: dict[str, Any] = {}
            for entry in manifest["files"]:
                tensors.update((n, {**where, "file": entry["name"]}) for n, where in entry["tensors"].items())
            manifest["tensors"] = tensors
            checkpoint = Checkpoint(folder, manifest)
            if not (checkpoint.bytes >= 0 <= manifest["attempt"] and isinstance(checkpoint.meta, dict)):
                raise ValueError("its values have other types")
            return checkpoint
        except FileNotFoundError as error:
            raise DataError(f"{folder}: no {MANIFEST}, so the checkpoint was never finished") from error
        except OSError as error:
            raise DataError(f"{folder}: its {MANIFEST} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder}: its {MANIFEST} is damaged ({error!r})") from error

    def newest(
        self,
        ranks: Ranks | None = None,
        checksums: bool = True,
        wanted: Callable[[dict[str, Any]], bool] = lambda meta: True,
    ) -> Checkpoint | None:
        """The newest undamaged checkpoint (whose metadata is `wanted`), or None when there never was one. Collective;
        the ranks share the checksum work.

        Each checkpoint that is passed over is logged with what is wrong with it.

        Raises:
            DataError: there are committed checkpoints, but all are damaged.
        """
        ranks = ranks or Ranks()
        damaged = []
        for step in together(self.steps, ranks):
            checkpoint, problem, committed = together(lambda step=step: self._try_open(step), ranks)
            if checkpoint is not None and not wanted(checkpoint.meta):
                continue
            if checkpoint is not None:
                mine = checkpoint.problems(ranks.rank, ranks.world_size, checksums)
                found = [p for problems in all_gather(mine, ranks) for p in problems]
                if not found:
                    return checkpoint
                problem = f"{checkpoint.folder}: {'; '.join(found)}"
            if committed:
                damaged.append(problem)
                self._damaged.add(step)
            if ranks.is_main:
                log.warning("checkpoint passed over: %s", problem)
        if damaged:
            raise DataError(
                f"{self.folder}: none of its checkpoints is healthy ({damaged[0]}); "
                f"restore one, or move the directory away to start from step 0"
            )
        return None

    def _try_open(self, step: int) -> tuple[Checkpoint | None, str, bool]:
        """The checkpoint, or what is wrong with it; and whether it was committed."""
        try:
            return self.open(step), "", True
        except DataError as error:
            return None, str(error), self._is_committed(step)


def _manifest(step: int, attempt: int, files: list[list[dict[str, Any]]], meta: dict[str, Any]) -> bytes:
    flat = [entry for rank_files in files for entry in rank_files]
    manifest = {"format": FORMAT, "step": step, "attempt": attempt, "files": flat, "meta": meta}
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    return json.dumps({**manifest, "sha256": _digest(manifest)}).encode()


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
