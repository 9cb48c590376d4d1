"""Converts lists of shards in other tools' notations: `a::b`, `pipe:aws s3 cp URL -`, `@list.txt`, `file:PATH`."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import unquote

from data_pipeline.common.errors import ShardsError

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Endings of the names of shards, in lower case."""
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S+")
_PAGES = (
    (r"https://(?:[\w-]+\.)?console\.aws\.amazon\.com/s3/\w+/([^/?]+)\?(?:.*&)?prefix=([^&]*).*", r"s3://\1/\2"),
    (r"https://s3[.-](?:[\w-]+\.)*amazonaws\.com/([^/]+)/(.*)", r"s3://\1/\2"),
    (r"https://([\w.-]+?)\.s3[.-](?:[\w-]+\.)*amazonaws\.com/(.*)", r"s3://\1/\2"),
    (r"https://console\.cloud\.google\.com/storage/browser/([^;?]*).*", r"gs://\1"),
    (r"https://storage\.googleapis\.com/(.*)", r"gs://\1"),
    (r"https://huggingface\.co/((?:datasets/)?[^/]+/[^/]+)/\w+/main/?(.*)", r"hf://\1/\2"),
    (r"https://huggingface\.co/((?:datasets/)?[^/]+/[^/]+)/\w+/([^/]+)/?(.*)", r"hf://\1@\2/\3"),
)
"""Web addresses in stores -> the same place in the store itself."""


def stem(shard: str) -> str:
    """Return the name or URL of a shard without its ending; the names of the files that belong to it begin so."""
    return next((shard.removesuffix(suffix) for suffix in SHARD_SUFFIXES if shard.endswith(suffix)), shard)


def store_address(url: str) -> str:
    """Return the address in a store of what a web address shows as a page; empty if it has none.

    The web address of a shard itself (not its page on the Hub) can be read as it is.
    """
    path = url.partition("?")[0]
    if path.lower().endswith(SHARD_SUFFIXES) and not re.search(r"[*\[]|/blob/", path):
        return ""
    return next((re.sub(page, place, unquote(url)) for page, place in _PAGES if re.fullmatch(page, url)), "")


def plain_patterns(pattern: str, read: Callable[[str], bytes], depth: int = 0) -> list[str]:
    """Return the plain patterns behind a pattern in another tool's notation, each a path or URL.

    Args:
        pattern: the pattern; a plain one is returned as is.
        read: reads the file of a list.
        depth: level of nesting of lists.

    Raises:
        ShardsError: a list is empty, not text or includes itself, or a command does more than copy one object.
    """
    if "::" in pattern and not os.path.exists(pattern):
        parts = [part for part in pattern.split("::") if part]
        return [one for part in parts for one in plain_patterns(part, read, depth)]
    if pattern.startswith("@"):
        return _listed(pattern[1:], read, depth)
    if pattern.startswith("pipe:"):
        return [_piped(pattern)]
    if pattern.startswith("file:") and not pattern.startswith("file://"):
        return [pattern.removeprefix("file:")]
    return [pattern]


def _listed(place: str, read: Callable[[str], bytes], depth: int) -> list[str]:
    if depth > 3:
        raise ShardsError(f"=@{place}: the lists include each other")
    try:
        lines = read(place).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ShardsError(f"=@{place}: a list of shards must be a text file with one pattern per line") from error
    patterns = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not patterns:
        raise ShardsError(f"=@{place}: the list is empty; it needs one path or URL per line")
    return [one for pattern in patterns for one in plain_patterns(_beside(place, pattern), read, depth + 1)]


def _beside(place: str, pattern: str) -> str:
    """Resolve a path in a list: relative to the working directory or, if it matches nothing there, to the list."""
    if "://" in place or os.path.isabs(pattern) or ":" in pattern.partition("/")[0] or pattern.startswith("@"):
        return pattern
    beside = os.path.join(os.path.dirname(os.path.expanduser(place)), pattern)
    return beside if not _is_there(pattern) and _is_there(beside) else pattern


def _is_there(pattern: str) -> bool:
    from braceexpand import braceexpand

    with suppress(ValueError):
        return any(any(glob.iglob(one)) for one in braceexpand(pattern))
    return False


def _piped(pattern: str) -> str:
    """Return the object that a command would copy to its output; the command itself is never run."""
    command = pattern.removeprefix("pipe:")
    found = _ADDRESS.findall(command.replace("'", " ").replace('"', " "))
    if len(found) == 1 and "|" not in command:
        return str(found[0])
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if len(words) == 2 and words[0] == "cat" and not found:
        return words[1]
    raise ShardsError(
        f"={pattern}: commands are not run; give the URL or path itself, such as "
        "s3://bucket/{00000..00099}.tar (over s3://, a broken read then resumes automatically)"
    )
