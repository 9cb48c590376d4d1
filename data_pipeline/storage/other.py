"""Other schemes through fsspec (`gs://`, `az://`, `hf://`, `https://`, `memory://`), with the functions of `s3.py`.

fsspec's own listing caches are off. Reads are retried here, piece by piece, by the same retry loop as over s3.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from data_pipeline.common.errors import CascadeError, DataError
from data_pipeline.common.fork_lock import ForkLock
from data_pipeline.common.pool import in_daemon
from data_pipeline.storage.retry import DEFAULT, FIRST_CONTACT_S, Backoff, Patience, describe_error, result_of
from data_pipeline.storage.s3_errors import (
    PROXY_ADVICE,
    Denied,
    Missing,
    after_change,
    causes_of,
    certificate_problem,
    changed,
    passes,
    remedy_for,
    scheme_problem,
    too_short,
    unread_proxy,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

SCHEMES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "memory": "fsspec",
}
"""Scheme -> package that fsspec needs for it."""
_EXTRAS = {"gcsfs": "gs", "adlfs": "az"}
_CREDENTIALS = {
    "gcsfs": "GOOGLE_APPLICATION_CREDENTIALS",
    "adlfs": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "huggingface_hub": "HF_TOKEN",
    "aiohttp": "the address, NETRC (~/.netrc) and FSSPEC_HTTPS",
}
"""Package -> where its credentials come from."""
_NO_BUCKET = re.compile("ContainerNotFound|specified (bucket|container) does not exist")
"""What stores call a missing bucket."""
_NO_PLACE = ("RepositoryNotFoundError", "RevisionNotFoundError")
"""The Hub's errors about more than one file."""
_READ_ONLY, _GOOGLE = ("http", "https"), ("gs", "gcs")
WORDS = 500
"""Most bytes of a web server's explanation to read."""
PIECE = 8 << 20
"""Bytes per request of a stream."""
SLOWEST = 1e6
"""Bytes per second by which the time for a request is extended beyond `Patience.stall_s`, for slow lines."""
LISTING_S = 120.0
"""Seconds that a listing may take, over all its pages."""
_ETAGS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "last_modified", "Last-Modified", "mtime", "created")
"""Fields by which file systems distinguish versions of an object; the first one present is used."""

_lock = ForkLock()
_filesystems: dict[tuple[int, str], Any] = {}
_answered: set[str] = set()


def scheme_of(url: str) -> str:
    """Return the scheme of a URL, lower case."""
    return url.partition("://")[0].lower()


def filesystem(url: str) -> Any:
    """Return this process's file system for the scheme of `url`.

    Raises:
        DataError: its package is missing, or its settings are invalid.
    """
    scheme = scheme_of(url)
    with _lock:
        found = _filesystems.get((os.getpid(), scheme))
        if found is None:
            import fsspec

            package = SCHEMES[scheme]
            try:
                options = _session_options(scheme)
                found = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
                _switch_retries_off(found, package)
            except ImportError as error:
                extra = _EXTRAS.get(package)
                how = f"pip install 'cascade-t2i[{extra}]'" if extra else f"pip install {package}"
                raise DataError(f"{url}: {scheme}:// needs the package {package}: {how}") from error
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{url}: cannot create a file system for {scheme}://: {describe_error(error)}{_check(url)}"
                ) from error
            _filesystems[os.getpid(), scheme] = found
        return found


def _session_options(scheme: str) -> dict[str, Any]:
    """Return the options of a file system for aiohttp, which ignores HTTPS_PROXY and NO_PROXY unless told otherwise.

    A web server must send bytes as they are stored: ranges of compressed ones are not those of the file. The user's own
    options, from fsspec's settings, are kept.
    """
    from fsspec.config import conf

    name = "client_kwargs" if scheme in _READ_ONLY else "session_kwargs"
    same = next((group for group in (_READ_ONLY, _GOOGLE) if scheme in group), ())
    own = {key: value for one in same for key, value in conf.get(one, {}).get(name, {}).items()}
    if scheme in _READ_ONLY:
        headers = {"Accept-Encoding": "identity", **own.pop("headers", {})}
        plain = {"headers": headers, "auto_decompress": False, "raise_for_status": _refuse}
        return {name: {"trust_env": True, **plain, **own}}
    return {name: {"trust_env": True, **own}} if scheme in _GOOGLE else {}


async def _refuse(answer: Any) -> None:
    """Raise an error that has the server's explanation, and no signature of the address; fsspec handles 404 itself.

    Also if other bytes come than were asked for, as from a cache that ignores ranges.
    """
    import aiohttp

    asked = answer.request_info
    sent, wanted = answer.headers.get("Content-Range", ""), asked.headers.get("Range", "").replace("=", " ")
    if answer.status == 206 and not sent.startswith(wanted.partition("-")[0] + "-"):
        address = asked.real_url.with_query(None)
        raise DataError(f"{address}: its server was asked for {wanted!r} and sent {sent!r}; it does not support ranges")
    if answer.status < 400 or answer.status == 404:
        return
    words = b""
    with suppress(Exception):  # the status says enough
        words = await answer.content.read(WORDS)
    said = " ".join(re.sub("<[^>]*>", " ", words.decode("utf-8", "replace")).split())
    raise aiohttp.ClientResponseError(
        asked._replace(real_url=asked.real_url.with_query(None)),
        answer.history,
        status=answer.status,
        message=f"{answer.reason}: {said}" if said else str(answer.reason),
        headers=answer.headers,
    )


def _switch_retries_off(fs: Any, package: str) -> None:
    """Switch off the retries inside gcsfs and Azure's client: they last longer than a request may take, and the cause
    would be lost.

    Neither gcsfs nor adlfs (up to 2026.10) has a setting for that, so these attributes are private ones; without them,
    requests just time out. The tests count the requests of the versions that are installed.
    """
    try:
        if package == "gcsfs":
            fs._request = MethodType(type(fs)._request.__wrapped__, fs)
        elif package == "adlfs":
            fs.service_client._config.retry_policy.total_retries = 0
    except AttributeError as error:
        logger.warning(
            "%s: its own retries cannot be switched off in this version (%s), so a failing store is noticed late; "
            "install an older version",
            package,
            error,
        )


def split(url: str) -> tuple[str, str]:
    """Split `gs://bucket/some/key` into (`bucket`, `some/key`); in an http URL the host takes the bucket's place."""
    root, _, key = url.partition("://")[2].partition("/")
    if not root:
        raise DataError(f"{url}: it has no bucket; write {scheme_of(url)}://bucket/prefix")
    return root, key


def root(url: str) -> str:
    """Return the URL of the bucket."""
    return f"{url.partition('://')[0]}://{split(url)[0]}"


def endpoint() -> str:
    """Return how messages name the store."""
    return "its store"


def _ask(fs: Any, method: str, patience: Patience, limit_s: float, *arguments: Any, **options: Any) -> Any:
    """Call a method of a file system, and cancel it if it takes longer than `limit_s` or the process must stop.

    `hf://` is not asynchronous and itself waits as long as the Hub asks it to: it may take until the deadline.
    """
    from fsspec.asyn import AsyncFileSystem

    if isinstance(fs, AsyncFileSystem):
        request = getattr(fs, f"_{method}")(*arguments, **options)
        return result_of(asyncio.run_coroutine_threadsafe(request, fs.loop), patience, limit_s)
    work = partial(getattr(fs, method), *arguments, **options)
    if fs.protocol != "hf":
        return work()
    return result_of(in_daemon(work), patience, max(limit_s, patience.deadline_s))


def _status(error: BaseException) -> int:
    for holder in (error, getattr(error, "response", None)):  # the Hub's errors keep the answer
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return 0


def _check(url: str) -> str:
    """Return the remark about where the credentials of a scheme come from; empty if it has none."""
    names = _CREDENTIALS.get(SCHEMES[scheme_of(url)])
    return f"; check {names}" if names else ""


def _certificates(url: str) -> str:
    """Return the variables from which the package of a scheme takes certificates of authorities."""
    return "SSL_CERT_FILE" if scheme_of(url) in _READ_ONLY else "SSL_CERT_FILE and REQUESTS_CA_BUNDLE"


def _permanent(error: BaseException, url: str) -> CascadeError | None:
    """Return the user error that `error` amounts to; None if a retry may succeed."""
    import aiohttp

    if isinstance(error, CascadeError):
        return error
    if isinstance(error, FileNotFoundError) and scheme_of(url) in _READ_ONLY:
        error = error.__cause__ or error  # fsspec calls a file missing whatever kept it from asking
    status, said = _status(error), re.split(" RequestId:| Content: <", describe_error(error))[0]
    if any(_NO_BUCKET.search(str(one)) for one in causes_of(error)):
        return DataError(f"{url}: there is no {split(url)[0]!r} in its store ({said}); check the name{_check(url)}")
    unknown_place = any(type(one).__name__ in _NO_PLACE for one in causes_of(error)) or "not found)" in said
    if scheme_of(url) == "hf" and unknown_place:
        return DataError(f"{url}: {said}")
    if isinstance(error, FileExistsError):  # of a write that replaces: Azure's conflicts, such as an immutable object
        return DataError(
            f"{url}: it cannot be replaced ({describe_error(error.__cause__ or error.__context__ or error)})"
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        return Missing(f"{url}: no such object")
    if isinstance(error, aiohttp.TooManyRedirects):
        return DataError(f"{url}: its server redirects the request in a circle, or too often")
    if more := remedy_for(str(getattr(error, "error_code", None) or ""), status):
        return DataError(f"{url}: its store rejected the request ({said}); {more}")
    if status == 416:
        return DataError(f"{url}: the object is shorter than it was; {after_change(url)}")
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden:")  # gcsfs's words for a 403
    if isinstance(error, PermissionError) or status in (401, 403) or forbidden:
        return Denied(f"{url}: access is denied ({said}){_check(url)}")
    if isinstance(error, NotImplementedError):
        return DataError(f"{url}: {scheme_of(url)}:// does not support this operation ({said})")
    unknown = any(isinstance(one, socket.gaierror) and one.errno == socket.EAI_NONAME for one in causes_of(error))
    if refused := certificate_problem(error, "its server", _certificates(url)):
        return DataError(f"{url}: {refused}")
    if isinstance(error, aiohttp.InvalidURL) or (unknown and root(url) not in _answered):
        return DataError(f"{url}: {said}{unread_proxy() if unknown else ''}")
    if status in (409, 412) and scheme_of(url) == "hf":
        return None  # another process has committed at the same time
    if status:
        return None if passes(status) else DataError(f"{url}: {said}")
    network = (OSError, aiohttp.ClientError, asyncio.TimeoutError)
    if isinstance(error, network) or type(error).__module__.startswith(("azure.core", "requests", "httpx")):
        return None
    return DataError(f"{url}: {said}")


def _may_be_scheme(error: Exception, fatal: CascadeError | None) -> bool:
    """Return whether a first request may have failed because of http:// instead of https:// or the reverse."""
    return fatal is None or 400 in (_status(error), _status(error.__cause__ or error))


def _call(url: str, work: Callable[[Any], T], patience: Patience, backoff: Backoff | None = None) -> T:
    """Call `work(file system)`, and retry while the store is failing.

    Raises:
        DataError: access is denied, there is no such object, or the scheme does not support the operation.
        StoreError: no answer within `patience.deadline_s`.
    """
    import aiohttp

    backoff = backoff or Backoff(url, patience)
    while True:
        try:
            answer = work(filesystem(url))
            _answered.add(root(url))
            return answer
        except Exception as error:
            fatal = _permanent(error, url)
            known = root(url) in _answered
            if not known and not backoff.attempts and scheme_of(url) in _READ_ONLY and _may_be_scheme(error, fatal):
                words = scheme_problem(url)
                if words:
                    raise DataError(f"{url}: {words}") from error
            if fatal is not None:
                raise fatal from (None if fatal is error else error)
            proxy = any(isinstance(one, aiohttp.ClientProxyConnectionError) for one in causes_of(error))
            hidden = error.__cause__ if isinstance(error, FileNotFoundError) else None  # an answer, see `_permanent`
            backoff.wait(hidden or error, None if known else FIRST_CONTACT_S, PROXY_ADVICE if proxy else unread_proxy())


def _etag(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _ETAGS if info.get(name)), "")


class OtherStream:
    """Reads bytes [start, end) of one object in order, by ranged requests.

    Args:
        etag: without `end`: raise an error if the object has another etag. Ranges are not tied to a version, which not
            all schemes support; readers of samples verify their checksums.
    """

    def __init__(
        self, url: str, start: int = 0, end: int | None = None, etag: str | None = None, patience: Patience = DEFAULT
    ) -> None:
        self.url, self._fetched, self._end, self._patience = url, start, end, patience
        self._etag = etag
        self._buffer, self._at = b"", 0
        self._backoff = Backoff(url, patience)

    def read(self, size: int = -1) -> bytes:
        """Read exactly `size` bytes, fewer only at the end of the range; -1: read the rest.

        Raises:
            DataError: the object is missing, changed or too short, access is denied, or ranges are not supported.
            StoreError: no progress for `patience.deadline_s`.
        """
        self._backoff.resume()
        pieces, missing = [], size
        while missing:
            if self._at == len(self._buffer) and not self._fill():
                break
            piece = self._buffer[self._at : self._at + missing] if missing > 0 else self._buffer[self._at :]
            self._at += len(piece)
            missing -= len(piece) if missing > 0 else 0
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _fill(self) -> bool:
        """Fetch the next piece; return False at the end."""
        if self._end is None:
            self._end, found = head(self.url, self._patience)
            if self._etag and found != self._etag:
                raise changed(self.url)
        begin, end = self._fetched, min(self._fetched + PIECE, self._end)
        if begin >= end:
            return False
        limit = self._patience.stall_s + (end - begin) / SLOWEST
        exact = {"cache_type": "none"} if scheme_of(self.url) == "hf" else {}  # otherwise hf reads 5 MB per range
        data = _call(
            self.url,
            lambda fs: _ask(fs, "cat_file", self._patience, limit, self.url, start=begin, end=end, **exact),
            self._patience,
            self._backoff,
        )
        if len(data) > end - begin and not begin:  # the server ignored the range and sent the whole object
            data = data[: self._end]
        elif len(data) > end - begin:
            raise DataError(f"{self.url}: its server does not support range requests, which are required")
        elif len(data) < end - begin:
            raise too_short(self.url, begin + len(data), self._end)
        self._buffer, self._at = data, 0
        self._fetched += len(data)
        self._backoff.progress(len(data))
        return True

    def close(self) -> None:
        """Discard the buffer."""
        self._buffer, self._at = b"", 0

    def __enter__(self) -> OtherStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listing(url: str, delimiter: str = "", patience: Patience = DEFAULT) -> Iterator[tuple[str, int, str]]:
    """Yield (key, size in bytes, etag) of objects whose key starts with the key of `url`, in key order.

    With a `delimiter`, each deeper level appears once, as (prefix ending in the delimiter, -1, ""). A size of -2 means
    that the listing does not give it.
    """
    folder = url if url.endswith("/") else url.rpartition("/")[0] + "/"
    bucket, prefix = split(url)

    def find(fs: Any) -> list[dict[str, Any]]:
        fs.invalidate_cache()
        if delimiter:
            place = folder.rstrip("/") if scheme_of(url) not in _READ_ONLY else folder
            return list(_ask(fs, "ls", patience, LISTING_S, place, detail=True))
        return list(_ask(fs, "find", patience, LISTING_S, folder, detail=True).values())

    try:
        found = _call(url, find, patience)
    except Missing:
        return
    entries = []
    for info in found:
        name = str(info["name"])
        key = name.partition("://")[2] if "://" in name else name.lstrip("/")
        key = key.removeprefix(f"{bucket.partition('@')[0]}/")
        if not key.startswith(prefix) or key == prefix.rstrip("/") + "/":
            continue
        if info.get("type") == "directory":
            entries.append((key.rstrip("/") + "/", -1, ""))
        else:
            entries.append((key, -2 if info.get("size") is None else int(info["size"]), _etag(info)))
    yield from sorted(entries)


def head(url: str, patience: Patience = DEFAULT) -> tuple[int, str]:
    """Return (size in bytes, etag) of one object.

    Raises:
        Missing: it does not exist, or is a directory.
        DataError: its server does not report its size.
    """

    def ask(fs: Any) -> dict[str, Any]:
        if scheme_of(url) != "hf":
            return dict(_ask(fs, "info", patience, patience.stall_s, url))
        fs.invalidate_cache(url)  # it keeps listings, which other processes may have outdated
        # without `expand_info`, it lists the whole folder first
        return dict(_ask(fs, "info", patience, patience.stall_s, url, expand_info=True))

    info = _call(url, ask, patience)
    if info.get("type") == "directory":
        raise Missing(f"{url}: no such object")
    if info.get("size") is None:
        raise DataError(f"{url}: its server does not report its size, which is required")
    return int(info["size"]), _etag(info)


def answers(url: str, patience: Patience = DEFAULT) -> bool:
    """Return whether a web server has something at an address."""
    try:
        _call(url, lambda fs: _ask(fs, "info", patience, patience.stall_s, url), patience)
    except Missing:
        return False
    return True


def _writable(url: str) -> None:
    if scheme_of(url) in _READ_ONLY:
        raise DataError(f"{url}: {scheme_of(url)}:// is read-only")


def put(url: str, data: bytes | memoryview, patience: Patience = DEFAULT) -> None:
    """Write one object; in object stores the write is atomic."""
    _writable(url)
    limit = patience.stall_s + len(data) / SLOWEST
    _call(url, lambda fs: _ask(fs, "pipe_file", patience, limit, url, bytes(data)), patience)


def put_new(url: str, data: bytes, patience: Patience = DEFAULT) -> bool:
    """Write one small object unless its name is taken; return whether it was written."""
    _writable(url)

    def create(fs: Any) -> bool:
        def ask(method: str, *arguments: Any, **options: Any) -> Any:
            return _ask(fs, method, patience, patience.stall_s, *arguments, **options)

        try:
            ask("pipe_file", url, data, mode="create")
        except FileExistsError:
            return False
        except TypeError:  # a file system without this mode: two writers at once may both believe they are first
            if ask("exists", url):
                return False
            ask("pipe_file", url, data)
        return True

    return _call(url, create, patience)


def delete(url: str, keys: list[str], patience: Patience = DEFAULT) -> None:
    """Delete objects from the bucket of `url`; missing ones are no error."""
    _writable(url)
    base = root(url)
    for key in keys:
        try:
            _call(url, partial(_on_object, "rm_file", patience, f"{base}/{key}"), patience)
        except (Missing, Denied):
            if _call(url, partial(_on_object, "isfile", patience, f"{base}/{key}"), patience):
                raise


def _on_object(method: str, patience: Patience, place: str, fs: Any) -> Any:
    return _ask(fs, method, patience, patience.stall_s, place)
