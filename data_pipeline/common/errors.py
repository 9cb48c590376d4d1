"""Errors the user can fix: one sentence that names the key, the file and the remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2


class CascadeError(Exception):
    """Base class of all errors this project raises deliberately; `str(error)` is a complete sentence for the user."""

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


def of_file(error: OSError) -> UserError:
    """Turn a system error into a `UserError` that names the file."""
    where = "" if error.errno in REMEDIES else " (debug=true shows where)"
    return UserError(f"{error.filename}: {system_words(error)}{where}")


REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "your quota is used up, make room",
    errno.EFBIG: "a file may not become so large here, see ulimit -f",
    errno.EIO: "the disk reports a fault, choose another",
    errno.EROFS: "choose a directory that can be written",
}
"""errno -> what the user can do about it."""


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
