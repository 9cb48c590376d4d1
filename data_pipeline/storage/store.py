"""The single entry point to storage: file paths, s3:// and fsspec URLs. All other modules read and write through it."""

from __future__ import annotations

import errno
import fnmatch
import glob
import logging
import mmap
import os
import re
import shutil
import stat
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Protocol

from data_pipeline.common.errors import PASSING, DataError, ShardsError, system_words
from data_pipeline.storage import other, s3
from data_pipeline.storage.atomic import replacing
from data_pipeline.storage.retry import DEFAULT, Patience, persist
from data_pipeline.storage.s3_errors import too_short
from data_pipeline.storage.shard_lists import SHARD_SUFFIXES, plain_patterns, stem, store_address

logger = logging.getLogger(__name__)
_named_again: set[str] = set()

_MAGIC = re.compile(r"[*?\[]")
_PACKED = re.compile(r"\.(tar\.(zst|bz2|xz|lz4|lzma)|tzst|tbz2?|txz)$", re.IGNORECASE)
_UNFINISHED = re.compile(
    r"\.(tar|tgz|tar\.gz)\.(crdownload|part|partial|download|filepart|tmp|temp|aria2)$", re.IGNORECASE
)
_told_left_out: set[str] = set()
_WEB = ("http://", "https://")
_S3_ALIASES = ("s3", "s3a", "s3n")
_UNPACK = "only plain and gzip-compressed tars are read; unpack the others, for example with `zstd -d`"


class ByteStream(Protocol):
    """A stream of bytes, read in order."""

    def read(self, size: int = -1) -> bytes:
        """Read exactly `size` bytes, fewer only at the end; -1: read the rest."""

    def close(self) -> None:
        """Release the file or connection."""

    def __enter__(self) -> ByteStream: ...
    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class Entry:
    """A file or object as listed by its store: size in bytes and etag. A local file's etag is its mtime in ns."""

    url: str
    size: int
    etag: str


def is_remote(url: str) -> bool:
    """Return whether a URL names an object in a store rather than a local file."""
    scheme, colon, _ = url.partition("://")
    return bool(colon) and (scheme == "s3" or scheme in other.SCHEMES)


def _door(url: str) -> Any:
    """Return the module for the store of a URL."""
    return s3 if url.startswith("s3://") else other


def local_path(url: str) -> str:
    """Return the file path behind a path or file:// URL.

    Raises:
        DataError: the scheme is not supported, or it is misspelled.
    """
    if ":/" not in url:
        return os.path.expanduser(url)
    if url.startswith("file://"):
        return url.removeprefix("file://")
    scheme, _, rest = url.partition(":/")
    name = "s3" if scheme.lower() in _S3_ALIASES else scheme.lower()
    if name == "s3" or name in other.SCHEMES:
        raise DataError(f"{url}: write {name}://{rest.lstrip('/')}")
    if "://" not in url:
        return os.path.expanduser(url)
    known = ", ".join(f"{name}://" for name in ("s3", *other.SCHEMES))
    raise DataError(f"{url}: only file paths and {known} URLs can be read")


def join(parent: str, name: str) -> str:
    """Return the URL or path of `name` in `parent`."""
    if is_remote(parent):
        return f"{parent.rstrip('/')}/{name}"
    return os.path.join(parent.rstrip("/") or parent[:1], name)


def without_query(url: str) -> str:
    """Return a URL without the query of a web address, such as `?download=true` or a signature."""
    return url.partition("?")[0] if url.startswith(_WEB) else url


def parent(url: str) -> str:
    """Return the directory of a file, or the prefix of an object without its last slash."""
    return without_query(url).rpartition("/")[0] if is_remote(url) else os.path.dirname(local_path(url)) or "."


def basename(url: str) -> str:
    """Return the last component of a path or URL."""
    return without_query(url).rstrip("/").rpartition("/")[2]


class LocalStream:
    """Reads bytes [start, end) of a file in order; if its file system fails for a while, it is opened again.

    Raises:
        DataError: the file is missing, not readable or not a regular file, or was replaced in the meantime.
        StoreError: its file system kept failing.
    """

    def __init__(self, path: str, start: int = 0, end: int | None = None, patience: Patience = DEFAULT) -> None:
        self._path, self._patience = path, patience
        self._position, self._end = start, end
        self._known: tuple[int, int] | None = None
        self._file = self._open()

    def _open(self) -> BinaryIO:
        def open_file() -> BinaryIO:
            status = os.stat(self._path)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{self._path}: not a regular file")
            self._known = check_unchanged(self._path, status, self._known)
            file = open(self._path, "rb")  # noqa: SIM115
            file.seek(self._position)
            return file

        try:
            return persist(self._path, open_file, self._patience)
        except OSError as error:
            raise _local_error(self._path, error) from error

    def read(self, size: int = -1) -> bytes:
        """Read exactly `size` bytes, fewer only at the end; -1: read the rest."""
        if self._end is not None:
            left = max(self._end - self._position, 0)
            size = left if size < 0 else min(size, left)
        try:
            piece = self._file.read(size)
        except OSError as error:
            if error.errno not in PASSING:
                raise _local_error(self._path, error) from error
            piece = self._read_again(size)
        self._position += len(piece)
        return piece

    def _read_again(self, size: int) -> bytes:
        def read() -> bytes:
            self._file.close()
            self._file = self._open()
            return self._file.read(size)

        return persist(self._path, read, self._patience)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> LocalStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stamp(status: os.stat_result) -> tuple[int, int]:
    """Return what changes when a file does: its size in bytes and its mtime in ns."""
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: str, status: os.stat_result, known: tuple[int, int] | None) -> tuple[int, int]:
    """Return the stamp of a file. Raises `DataError` if it is not `known`."""
    if known not in (None, stamp(status)):
        raise DataError(f"{path}: it has changed while it was being read")
    return stamp(status)


def reopen(path: str, descriptor: int, known: tuple[int, int] | None = None) -> None:
    """Open a file again, in the place of a descriptor that other threads may be reading.

    Args:
        known: its `stamp` when it was opened first; None: it may have changed.

    Raises:
        OSError: it cannot be opened.
        DataError: it has changed.
    """
    fresh = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check_unchanged(path, os.fstat(fresh), known)
        os.dup2(fresh, descriptor, inheritable=False)
    finally:
        os.close(fresh)


def _mode(path: str, patience: Patience) -> int:
    """Return the type and permissions of a file or directory; 0 if there is none, or none that this user can see."""
    try:
        return persist(path, partial(os.stat, path), patience).st_mode
    except (OSError, ValueError):
        return 0


def _local_error(path: str, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: {'dangling link' if os.path.islink(path) else 'no such file'}")
    return DataError(f"{path}: {system_words(error)}")


def open_stream(
    url: str, start: int = 0, end: int | None = None, etag: str | None = None, patience: Patience = DEFAULT
) -> ByteStream:
    """Open bytes [start, end) for reading in order; a broken connection is resumed at the byte where it broke.

    Args:
        url: a path or URL.
        start, end: byte range; `end=None` means the end of the file.
        etag: for an object, raise an error if its etag is another one.
        patience: retry limits.

    Raises:
        DataError: missing, denied, changed or shorter than asked for (here or from `read`).
        StoreError: from `read`, if nothing arrives for `patience.deadline_s`.
    """
    if is_remote(url):
        kind = s3.S3Stream if url.startswith("s3://") else other.OtherStream
        return kind(url, start, end, etag, patience)
    return LocalStream(local_path(url), start, end, patience)


def read_range(url: str, start: int, end: int, etag: str | None = None, patience: Patience = DEFAULT) -> bytes:
    """Read all of bytes [start, end).

    Raises:
        DataError, StoreError: see `open_stream`; also if the file or object is shorter.
    """
    with open_stream(url, start, end, etag, patience) as stream:
        data = stream.read()
    if len(data) != end - start:
        raise too_short(url, start + len(data), end)
    return data


def read_bytes(url: str, patience: Patience = DEFAULT) -> bytes:
    """Read a whole file or object. Raises `DataError` or `StoreError`, see `open_stream`."""
    with open_stream(url, patience=patience) as stream:
        return stream.read()


def write_bytes(url: str, data: bytes | memoryview, patience: Patience = DEFAULT) -> None:
    """Write a file or object atomically; directories are created.

    Raises:
        DataError: it cannot be written, or the scheme is read-only.
        StoreError: the store kept failing until the deadline.
    """
    if is_remote(url):
        _door(url).put(url, data, patience)
        return
    path = local_path(url)
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise _local_error(path, error) from error


def create(url: str, data: bytes, patience: Patience = DEFAULT) -> bool:
    """Write a small file or object unless its name is taken; return whether it was written.

    If several processes create the same name, one succeeds (over s3:// only if the store supports `If-None-Match`).
    """
    if is_remote(url):
        return bool(_door(url).put_new(url, data, patience))
    path = local_path(url)
    temporary = f"{path}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        with replacing(temporary) as file:
            file.write(data)
    except OSError as error:
        raise _local_error(path, error) from error
    try:
        try:
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise _local_error(path, error) from error
        return _create_without_link(path, data)
    return True


def _create_without_link(path: str, data: bytes) -> bool:
    """Like `create`, on file systems without hard links, where a reader may see the file before its content."""
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    except OSError as error:
        raise _local_error(path, error) from error
    return True


def upload(url: str, file: Any, patience: Patience = DEFAULT) -> None:
    """Upload an open, non-empty file as one object, atomically, holding one part of it in memory at a time."""
    file.flush()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
        _door(url).put(url, view, patience)


def exists(url: str, patience: Patience = DEFAULT) -> bool:
    """Return whether a file, directory or object exists, or a prefix with objects below it.

    A web server, which need not list what it has, is asked for the address itself.
    """
    if not is_remote(url):
        return _mode(local_path(url), patience) != 0
    if url.startswith(_WEB):
        return other.answers(url, patience)
    _, key = _door(url).split(url)
    below = key.rstrip("/") + "/" if key else ""
    found = _door(url).listing(url.rstrip("/"), delimiter="/", patience=patience)
    return any(name in (key, below) or (not key) for name, _, _ in found)


def present(folder: str, names: Iterable[str], patience: Patience = DEFAULT) -> set[str]:
    """Return those of these names that are in `folder`: by one listing, or by asking a web server for each."""
    if not folder.startswith(_WEB):
        return set(names) & set(list_dir(folder, patience))
    wanted = list(names)
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda name: exists(join(folder, name), patience), wanted)
        return {name for name, there in zip(wanted, found, strict=True) if there}


def size(url: str, patience: Patience = DEFAULT) -> int:
    """Return the size of a file or object in bytes. Raises `DataError` if it does not exist."""
    if is_remote(url):
        return int(_door(url).head(url, patience)[0])
    try:
        return persist(url, lambda: os.stat(local_path(url)).st_size, patience)
    except OSError as error:
        raise _local_error(url, error) from error


def entry(url: str, patience: Patience = DEFAULT) -> Entry:
    """Describe one file or object like `describe`, with a single request."""
    return Entry(url, *_door(url).head(url, patience)) if is_remote(url) else describe([url], patience)[0]


def list_dir(url: str, patience: Patience = DEFAULT) -> list[str]:
    """Return the names of the files and directories in `url`, sorted; empty if it does not exist."""
    if not is_remote(url):
        try:
            return persist(url, lambda: sorted(os.listdir(local_path(url))), patience)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _local_error(url, error) from error
    prefix = url.rstrip("/") + "/"
    _, key = _door(url).split(prefix)
    names = (name[len(key) :].rstrip("/") for name, _, _ in _door(url).listing(prefix, "/", patience))
    return sorted({name for name in names if name})


def sizes(url: str, patience: Patience = DEFAULT) -> dict[str, int]:
    """Return name -> bytes of the files in `url`, with -1 for directories; empty if it does not exist."""
    if not is_remote(url):
        try:
            return local_sizes(local_path(url), patience)
        except OSError as error:
            raise _local_error(url, error) from error
    prefix = url.rstrip("/") + "/"
    _, key = _door(url).split(prefix)
    listed = ((name[len(key) :].rstrip("/"), length) for name, length, _ in _door(url).listing(prefix, "/", patience))
    return {name: length for name, length in listed if name}


def local_sizes(path: str, patience: Patience = DEFAULT) -> dict[str, int]:
    """Like `sizes`, of a directory on disk. Raises `OSError`."""

    def look() -> dict[str, int]:
        found = {}
        with os.scandir(path) as entries:
            for one in entries:
                with suppress(FileNotFoundError):  # removed since it was listed
                    found[one.name] = one.stat().st_size if one.is_file() else -1
        return found

    try:
        return persist(path, look, patience)
    except FileNotFoundError:
        return {}


def remove_files(folder: str, names: Sequence[str], patience: Patience = DEFAULT) -> None:
    """Remove files or objects in `folder`, without listing it; missing ones are no error."""
    if is_remote(folder):
        _, key = _door(folder).split(folder.rstrip("/") + "/")
        _door(folder).delete(folder, [f"{key}{name}" for name in names], patience)
        return
    for name in names:
        path = os.path.join(local_path(folder), name)
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _local_error(path, error) from error


def remove(url: str, patience: Patience = DEFAULT) -> None:
    """Remove a file or object, or a directory or prefix with everything below it; a missing one is no error.

    Raises:
        DataError: it cannot be removed, or `url` is a whole bucket.
    """
    if is_remote(url):
        _, key = _door(url).split(url)
        if not key.strip("/"):
            raise DataError(f"{url}: refusing to delete a whole bucket")
        below = _door(url).listing(url.rstrip("/") + "/", patience=patience)
        _door(url).delete(url, [key.rstrip("/"), *(name for name, _, _ in below)], patience)
        return
    path = local_path(url)
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)
    except FileNotFoundError:
        return  # another process removed it first
    except OSError as error:
        raise _local_error(path, error) from error


def expand(shards: Any, patience: Patience = DEFAULT) -> list[str]:
    """Return the shards that a pattern names, in order and without duplicates.

    Args:
        shards: a path, a glob (`*`, `?`, `[..]`, `**`), a brace pattern (`{00000..00099}`, `{a,b}`), a directory (all
            its shards), the same in a store (s3://, ...), or a list of these; also in other tools' notations, see
            `shard_lists`.
        patience: retry limits.

    Raises:
        DataError: a pattern matches nothing, access is denied, or there is no such bucket; the message names which.
    """
    if not shards:
        raise ShardsError(": it is not set; give a glob, brace pattern, directory or s3:// URL of .tar shards")
    given = [str(shards)] if isinstance(shards, (str, os.PathLike)) else [str(item) for item in shards]
    for item in given:
        if fixed := _respelled(item):
            raise ShardsError(f"={item!r}: write {fixed}")
    patterns = [one for item in given for one in plain_patterns(item, lambda url: read_bytes(url, patience))]
    urls: dict[str, str] = {}
    again = ""
    for pattern in patterns:
        for one in _braces(pattern, patience):
            found = _expand_one(one, patience)
            if not found:
                raise ShardsError(f"={one}: no .tar shards found{_hint(one, patience)}")
            for url in found:
                place = full_path(url)
                again = url if place in urls else again
                urls.setdefault(place, url)
    if again and again not in _named_again:
        _named_again.add(again)
        logger.warning("%s, perhaps among others, is named more than once; each shard is read once per epoch", again)
    refuse_twins(urls)
    return list(urls.values())


def refuse_twins(urls: dict[str, str]) -> None:
    """Refuse two shards that differ only in their ending, as `a.tar` and `a.tar.gz`.

    Args:
        urls: the shards as given, by their full paths or URLs.

    Raises:
        ShardsError: there are two such shards; the message names them.
    """
    seen: dict[str, str] = {}
    for place, url in urls.items():
        name = stem(without_query(place))
        if name in seen:
            raise ShardsError(
                f": {seen[name]} and {url} may be one shard twice, and their indexes would have the same name: name "
                "only one of the two, for example with a pattern that ends in .tar, or rename it"
            )
        seen[name] = url


def full_path(url: str) -> str:
    """Return the full path of a local file, or the URL of a remote one."""
    return url if is_remote(url) else os.path.abspath(local_path(url))


def _respelled(pattern: str) -> str:
    """Return how a URL is written that is almost one; empty for all others."""
    if arn := re.fullmatch(r"\s*arn:aws[\w-]*:s3:::(\S+)\s*", pattern):
        return f"s3://{arn[1]}"
    if slash := re.fullmatch(r"\s*(s3|gs|az|hf|https?):/([^/].*)", pattern):
        return f"{slash[1]}://{slash[2].strip()}"
    if address := store_address(pattern):
        return address
    return pattern.strip() if "://" in pattern and pattern.strip() != pattern else ""


def _braces(pattern: str, patience: Patience) -> Iterable[str]:
    if "{" not in pattern or (not is_remote(pattern) and exists(pattern, patience)):
        return [pattern]
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ShardsError(f"={pattern}: unbalanced braces") from error


def _expand_one(pattern: str, patience: Patience) -> list[str]:
    if is_remote(pattern):
        return _expand_remote(pattern, patience)
    path = local_path(pattern)
    mode = _mode(path, patience)
    if _MAGIC.search(path) and not mode:
        _check_folders(path, patience)
        return _no_directories(_shards_among(sorted(glob.glob(path, recursive=True))))
    if stat.S_ISDIR(mode):
        names = list_dir(path, patience)
        found = [os.path.join(path, name) for name in names if _is_shard_name(name)]
        packed = [name for name in names if _PACKED.search(name)]
        if found and packed:
            logger.warning("%s: %d shards such as %s are skipped: %s", path, len(packed), packed[0], _UNPACK)
        if found:
            _tell_left_out(path, names)
        return _no_directories(found)
    return [path] if mode or path.endswith(SHARD_SUFFIXES) else []


def _tell_left_out(folder: str, names: Sequence[str]) -> None:
    """Warn, once per directory of shards, of others in it: in folders below, and those that are not complete yet."""
    if folder in _told_left_out:
        return
    _told_left_out.add(folder)
    if unfinished := [name for name in names if _UNFINISHED.search(name)]:
        words = "%s: %d files such as %s are not complete yet and are skipped"
        logger.warning(words, folder, len(unfinished), unfinished[0])
    below = next((one for one in glob.iglob(os.path.join(glob.escape(folder), "*", "*.tar"))), None)
    if below:
        every = os.path.join(folder, "**", "*.tar")
        logger.warning("%s: the shards in folders below, such as %s, are not read: %r names all", folder, below, every)


def _check_folders(pattern: str, patience: Patience) -> None:
    """Raise DataError or StoreError if a directory in which a glob looks cannot be listed; `glob` would silently leave
    out its shards."""
    parts = pattern.split(os.sep)
    for number, part in enumerate(parts):
        if _MAGIC.search(part):
            above = os.sep.join([*parts[:number], "**" if part == "**" else "", ""])
            for folder in glob.glob(above, recursive=True) if _MAGIC.search(above) else [above or "."]:
                list_dir(folder, patience)


def _shards_among(found: list[str]) -> list[str]:
    """Return the shards among a glob's matches, without indexes and tables beside them; if there are none, all."""
    return [name for name in found if _is_shard_name(basename(name))] or found


def _no_directories(paths: list[str]) -> list[str]:
    for path in paths:
        if os.path.isdir(path) and _is_shard_name(path):
            logger.warning("%s: this is a directory, not a shard; skipping it", path)
    return [path for path in paths if not os.path.isdir(path)]


def _is_shard_name(name: str) -> bool:
    return name.lower().endswith(SHARD_SUFFIXES) and not name.startswith(".")


def _expand_remote(pattern: str, patience: Patience) -> list[str]:
    if pattern.startswith(_WEB) and "?" in pattern and without_query(pattern).lower().endswith(SHARD_SUFFIXES):
        return [pattern]  # not a glob
    door = _door(pattern)
    root, key = door.root(pattern), door.split(pattern)[1]
    magic = _MAGIC.search(key)
    may_be_name = key.lower().endswith(SHARD_SUFFIXES) or not pattern.startswith(_WEB)
    if magic and not (may_be_name and exists(pattern, patience)):
        matches = re.compile(_glob_regex(key)).fullmatch
        deep = re.search(r"/|\*\*", key[magic.start() :])
        found = door.listing(f"{root}/{key[: magic.start()]}", "" if deep else "/", patience)
        files = (name for name, _, _ in found if not name.endswith("/"))  # some tools mark folders by such objects
        return _shards_among([f"{root}/{name}" for name in files if matches(name)])
    if key.lower().endswith(SHARD_SUFFIXES):
        return [pattern]
    prefix = key.rstrip("/") + "/" if key else ""
    found = door.listing(f"{root}/{prefix}", "/", patience)
    shards = [f"{root}/{name}" for name, length, _ in found if length != -1 and _is_shard_name(basename(name))]
    is_page = pattern.startswith(_WEB)
    if not shards and key and not key.endswith("/") and not is_page and _head_or_none(pattern, patience):
        return [pattern]  # an object of another name
    return shards


def _glob_regex(pattern: str) -> str:
    """Convert a shell glob to a regular expression; only `**` matches across slashes."""
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    out = ""
    for token in re.split(r"(\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\])", pattern):
        if token in special:
            out += special[token]
        elif token.startswith("["):
            token = "[!" + token[2:] if token.startswith("[^") else token
            out += "(?!/)" + fnmatch.translate(token).removesuffix(r"\Z").removesuffix(r"\z")
        else:
            out += re.escape(token)
    return out


def _hint(pattern: str, patience: Patience) -> str:
    """Say what exists instead, for the error about a pattern without matches."""
    if not is_remote(pattern):
        return _hint_on_disk(pattern)
    if pattern.startswith(_WEB):
        return " (its server lists none there: name them, for example with {00000..00009}.tar)"
    door = _door(pattern)
    bucket, key = door.split(pattern)
    begin = re.split(r"[*?\[{]", key)[0]
    prefix = begin.rpartition("/")[0]
    for start in (begin, prefix):
        found = next((name for name, _, _ in door.listing(f"{door.root(pattern)}/{start}", patience=patience)), None)
        if found is not None:
            unpack = f": {_UNPACK}" if _PACKED.search(found) else ""
            return f" (bucket {bucket!r} contains, for example, {found!r}{unpack})"
    return f" (bucket {bucket!r} at {door.endpoint()} is empty below {prefix!r})"


def _hint_on_disk(pattern: str) -> str:
    where = pattern if os.path.isdir(pattern) else parent(pattern)
    one = pattern.split()[:1]
    if pattern.strip() != pattern or (one and one[0] != pattern and os.path.exists(local_path(one[0]))):
        return f" (give the path alone, without blanks around it{f': {one[0]!r}?' if one else ''})"
    if not os.path.isdir(where):
        return f" (the directory {where!r} does not exist; `cascade prepare` makes shards from pictures)"
    names = os.listdir(where)
    if packed := [name for name in names if _PACKED.search(name)]:
        return f" (the directory {where!r} contains {min(packed)!r}: {_UNPACK})"
    below = next(glob.iglob(os.path.join(glob.escape(where), "*", "*.tar")), None)
    if below and where == pattern:
        every = os.path.join(where, "**", "*.tar")
        return f" (but {os.path.dirname(below)!r} contains some: {every!r} names all below)"
    seen = [name for name in names if not name.startswith(".")]
    if not seen:
        return f" (the directory {where!r} is empty)"
    return (
        f" (the directory {where!r} contains, for example, {min(seen)!r}; `cascade prepare` makes shards from pictures)"
    )


def describe(urls: list[str], patience: Patience = DEFAULT) -> list[Entry]:
    """Return size and etag of every shard, in order; objects are listed by prefix, 1,000 per request.

    Raises:
        DataError: some do not exist; the message names the first and counts the others.
        StoreError: the store kept failing until the deadline.
    """
    by_prefix: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        if is_remote(url):
            by_prefix[parent(url)].append(url)
    listed: dict[str, Entry] = {}
    for prefix, wanted in by_prefix.items():
        listed.update(_describe_prefix(prefix, wanted, patience))
    for url in urls:
        if not is_remote(url):
            try:
                status = persist(url, partial(os.stat, local_path(url)), patience)
            except FileNotFoundError:
                if os.path.islink(local_path(url)):
                    listed[url] = Entry(url, 0, "")  # a dangling link: reported when this shard is read
                continue
            except OSError as error:
                raise _local_error(url, error) from error
            listed[url] = Entry(url, status.st_size, str(status.st_mtime_ns))
    missing = [url for url in urls if url not in listed]
    if missing:
        more = f" and {len(missing) - 1} more of {len(urls)}" if len(missing) > 1 else ""
        some = f" (also {', '.join(map(basename, missing[1:6]))}{', ...' if len(missing) > 6 else ''})" if more else ""
        gaps = "; a glob such as *.tar uses those that exist" if len(missing) < len(urls) else ""
        what = "object" if is_remote(missing[0]) else "file"
        raise ShardsError(f": {missing[0]}{more}: no such {what}{some}{gaps}")
    return [listed[url] for url in urls]


def _describe_prefix(prefix: str, wanted: list[str], patience: Patience) -> dict[str, Entry]:
    door = _door(prefix)
    root = door.root(prefix)
    if len(wanted) > 4 and not prefix.startswith(_WEB):  # a web server need not list what it has
        try:
            found = [one for one in door.listing(prefix + "/", "/", patience) if one[1] != -1]
            if any(length < 0 or not etag for _, length, etag in found):
                raise s3.Denied("this listing has no sizes or versions")
            return {
                url: Entry(url, length, etag)
                for url, length, etag in ((f"{root}/{name}", length, etag) for name, length, etag in found)
            }
        except s3.Denied:
            pass  # reading may be allowed where listing is not
    with ThreadPoolExecutor(16) as pool:
        found_heads = list(pool.map(lambda url: _head_or_none(url, patience), wanted))
    if not any(found_heads):
        list_dir(prefix, patience)  # unlike HEAD, a listing can tell a missing bucket from a missing object
    return {url: Entry(url, *found) for url, found in zip(wanted, found_heads, strict=True) if found}


def _head_or_none(url: str, patience: Patience) -> tuple[int, str] | None:
    try:
        found: tuple[int, str] = _door(url).head(url, patience)
        return found
    except s3.Missing:
        return None
