"""Errors the user can fix: one sentence that names the key, the file and the remedy."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

EXIT_USER_ERROR = 2


class CascadeError(Exception):
    """Base class of the errors that this project raises deliberately, except `BadSample`; `str(error)` is a complete
    sentence for the user."""

    exit_code = 1


class UserError(CascadeError):
    """Wrong input (a config key, a path, credentials, a file that is not what it claims): exit code 2, no traceback."""

    exit_code = EXIT_USER_ERROR


class ConfigError(UserError):
    """An invalid config value; the message names the key and the valid values."""


class DataError(UserError):
    """Shards that are missing or unreadable, or do not match the config."""


class NotAnArchive(DataError):
    """A readable shard that is not a tar archive."""


class ShardsError(DataError):
    """The value of a setting that names shards cannot be used.

    Args:
        words: the message after the key, starting with `=VALUE: ` or `: `.
    """

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.key = "data.shards"
        """The setting; the message starts with it."""

    def __str__(self) -> str:
        return f"{self.key}{self.args[0]}"


@contextmanager
def about(key: str) -> Iterator[None]:
    """Make errors about shards name the setting `key`, for the duration of the block.

    Raises:
        ShardsError, DataError: as raised inside, starting with `key`.
    """
    try:
        yield
    except ShardsError as error:
        error.key = key
        raise
    except DataError as error:
        if str(error).startswith(key):
            raise
        raise type(error)(f"{key}: {error}") from error


def of_file(error: OSError) -> CascadeError:
    """Turn a system error into one that names the file: a `StoreError` if it may pass, otherwise a `UserError`."""
    where = "" if error.errno in REMEDIES else " (debug=true shows where)"
    kind = StoreError if error.errno in PASSING else UserError
    return kind(f"{error.filename}: {system_words(error)}{where}")


SERVER_GONE = (
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EREMOTEIO,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ECONNRESET,
    errno.ECONNABORTED,
)
"""errno with which NFS, Lustre and FUSE say that their server does not answer."""
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "your quota is used up, make room",
    errno.EFBIG: "a file may not become so large here, see ulimit -f",
    errno.EIO: "the disk reports a fault, choose another",
    errno.EROFS: "choose a directory that can be written",
    errno.EACCES: "give this user access, or choose another place",
    errno.EPERM: "give this user access, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ESTALE: "the file server no longer has it, mount it again",
    **dict.fromkeys(SERVER_GONE, "the file server does not answer, mount it again"),
}
"""errno -> what the user can do about it."""
PASSING = frozenset((errno.EIO, errno.ESTALE, *SERVER_GONE))
"""errno of file systems over a network that may be gone when the file is opened again; EIO also of a broken disk."""


class Exhausted(CascadeError):
    """This machine has run out of something, or a limit of the shell or the container is too low."""


NO_FILE = {
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine; close some, or use another",
    errno.EAGAIN: "no more processes or threads can be started; raise the limit (ulimit -u, or that of the container)",
    errno.ENOMEM: "out of memory; raise the limit (ulimit -v, or that of the job), or lower data.micro_batch or batch",
}
"""errno -> sentence for errors that concern no particular file."""


SHARED = "failed to map segment from shared object"
"""Message of the dynamic linker without memory, or with a file system that may hold no programs."""
NO_MEMORY = ("DefaultCPUAllocator: ", SHARED)
"""Messages of torch and of the dynamic linker."""


def of_machine(error: BaseException) -> CascadeError | None:
    """Turn an error by which Python or torch says that the machine or the environment is at fault into a sentence; None
    for all others, which may be bugs."""
    if isinstance(error, CascadeError):
        return error
    if isinstance(error, OSError):
        if error.errno in NO_FILE and error.strerror == os.strerror(error.errno):  # not a pipe that is full for now
            where = f"{error.filename}: " if error.filename else ""
            return Exhausted(f"{where}{NO_FILE[error.errno]}")
        if error.filename is not None:
            return of_file(error)
        if "No usable temporary directory" in str(error):
            given = f"TMPDIR={os.environ['TMPDIR']}: " if os.environ.get("TMPDIR") else ""
            return UserError(f"{given}there is no directory for temporary files; point TMPDIR at one with room")
        return None
    said = str(error)
    if isinstance(error, (MemoryError, RuntimeError, ImportError)):
        if folder := _without_programs(said):
            return UserError(
                f"{folder}: compiled code cannot be loaded from a file system that is mounted noexec; point TMPDIR (or "
                f"TORCHINDUCTOR_CACHE_DIR) at a directory on another"
            )
        if isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY):
            return Exhausted(NO_FILE[errno.ENOMEM])
        if said.startswith("CUDA out of memory"):
            return Exhausted(f"{said.partition('. GPU')[0]}; lower data.micro_batch or batch (see cascade plan)")
    if isinstance(error, RuntimeError) and "can't start new thread" in said:
        return Exhausted(NO_FILE[errno.EAGAIN])
    if isinstance(error, ValueError) and (name := _refused_variable(error)):
        library = "DeepSpeed" if name.startswith("DS_") else "torch"
        return ConfigError(f"{name}={os.environ.get(name)}: {library} does not accept it; unset or correct it")
    return None


def check_exhausted(error: BaseException) -> None:
    """Raise `Exhausted` if an error or its cause says that this machine has run out of something."""
    for fault in (of_machine(one) for one in (error, error.__cause__) if one is not None):
        if isinstance(fault, Exhausted):
            raise fault from error


def _refused_variable(error: ValueError) -> str:
    """Return the environment variable whose value a library refuses; empty if the error is another."""
    if _raised_in(error, "torch/_logging/"):
        return "TORCH_LOGS"
    if not any(_raised_in(error, f"/{library}/") for library in ("torch", "deepspeed")):
        return ""
    names = re.findall(r"\b(?:TORCH|DS)_[A-Z_]+", str(error))
    return next((name for name in names if name in os.environ), "")


def _without_programs(said: str) -> str:
    """Return the directory of the library that the dynamic linker could not map, if it is mounted noexec; else ""."""
    if place := re.search(rf"(/[^:\n]+)/[^/:\n]+: {SHARED}", said):
        with suppress(OSError):
            if os.statvfs(place[1]).f_flag & os.ST_NOEXEC:
                return place[1]
    return ""


def _raised_in(error: BaseException, folder: str) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and folder in trace.tb_frame.f_code.co_filename


def system_words(error: OSError) -> str:
    """Return the system's message for an error, with the remedy if there is one."""
    remedy = REMEDIES.get(error.errno or 0, "")
    return f"{error.strerror or error}{remedy and f'; {remedy}'}"


class StoreError(CascadeError):
    """An object store kept failing until the deadline; the message names the object and the last cause."""


BAD_REASONS = (
    "missing_image",
    "missing_caption",
    "empty_image",
    "decode_error",
    "unsupported_image",
    "too_small",
    "too_large",
    "aspect_ratio",
    "bad_text",
    "bad_json",
    "checksum",
)
"""The reasons a training sample can be bad, by which bad samples are counted."""


class BadSample(Exception):
    """A sample that cannot be used for training. It is counted under `reason` and replaced, not reported as an error.

    Args:
        reason: one of `BAD_REASONS`, the key of the counter.
        detail: what exactly is wrong, for the quarantine file.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.reason, self.detail)


def main_reason(dropped: Mapping[str, int], total: int) -> str:
    """Return the reason for which at least half of `total` samples were dropped; empty if there is none."""
    reason = max(dropped, key=lambda name: dropped[name], default="")
    return reason if reason and 0 < total <= 2 * dropped[reason] else ""


def dropped_remark(dropped: Mapping[str, int], total: int, remedy: Callable[[str], str]) -> str:
    """Return the remark that most of `total` samples were dropped for one reason, with its remedy; empty otherwise."""
    reason = main_reason(dropped, total)
    words = remedy(reason) if reason else ""
    return f"{dropped[reason]} samples were dropped as {reason}{f': {words}' if words else ''}" if reason else ""
