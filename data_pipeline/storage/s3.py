"""s3:// through s3fs, with a single retry loop of our own, and reads that resume at the byte where they broke.

s3fs and botocore each retry as well (5 x 5 x 5 attempts if a store never answers); both are switched off here.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from base64 import b64encode
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from data_pipeline.common.errors import DataError
from data_pipeline.common.fork_lock import ForkLock
from data_pipeline.storage import s3_errors
from data_pipeline.storage.retry import DEFAULT, FIRST_CONTACT_S, Backoff, Patience, result_of
from data_pipeline.storage.s3_errors import Changed, Denied, Missing, endpoint

__all__ = [
    "Changed",
    "Denied",
    "Missing",
    "S3Stream",
    "call",
    "delete",
    "endpoint",
    "filesystem",
    "forget",
    "head",
    "listing",
    "put",
    "put_new",
    "root",
    "split",
]

PIECE = 1 << 20
"""Bytes per read of a response body; reading bodies is 2 to 4 times faster than `S3FileSystem.open`."""
PART = 64 << 20
"""Bytes per part of a multipart upload, used for objects larger than this."""
PAGE = 1000
"""Objects per page of a listing."""
SESSION_S = 60.0
"""Seconds that creating a client may take: it costs CPU time, of which a busy machine has little, and the credentials
may come over the network."""
_EXISTS = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_RENEWALS = 2
_LATE = "; the credentials have expired and were not renewed: check the tool that does it, then repeat the command"
_METADATA_ATTEMPTS = "3"
"""How often to ask a machine's metadata service for credentials, a second each: asked by many processes at once, it
refuses some, which then would have no credentials."""

_lock = ForkLock()
_filesystems: dict[int, Any] = {}
_inherited: list[Any] = []
"""File systems of the process that this one was forked from."""
_answered = False
_one_by_one: set[str] = set()
"""Buckets whose store has rejected a multi-object delete."""


def split(url: str) -> tuple[str, str]:
    """Split `s3://bucket/some/key` into (`bucket`, `some/key`). Raises `DataError` without a bucket."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise DataError(f"{url}: it has no bucket; write s3://bucket/prefix")
    return bucket, key


def root(url: str) -> str:
    """Return the URL of the bucket."""
    return f"s3://{split(url)[0]}"


def filesystem() -> Any:
    """Return this process's s3fs file system: one per process, because its event loop does not survive a fork.

    Raises:
        DataError: see `s3_errors.check_settings`.
    """
    with _lock:
        fs = _filesystems.get(os.getpid())
        if fs is None:
            import s3fs

            s3_errors.check_settings()
            os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", _METADATA_ATTEMPTS)
            fs = s3fs.S3FileSystem(
                skip_instance_cache=True,
                use_listings_cache=False,
                config_kwargs={
                    "connect_timeout": 5,
                    "read_timeout": 300,  # we abort stalled reads ourselves, after Patience.stall_s
                    "retries": {"max_attempts": 0},
                    "max_pool_connections": 64,
                    "response_checksum_validation": "when_required",
                    "request_checksum_calculation": "when_required",
                },
            )
            fs.retries = 1
            _filesystems.clear()
            _filesystems[os.getpid()] = fs
        return fs


def _keep_inherited() -> None:
    """Keep the parent's file systems: their finalizers would fail, with a traceback, as the event loop is not ours."""
    _inherited.extend(_filesystems.values())
    _filesystems.clear()


os.register_at_fork(after_in_child=_keep_inherited)


def _run(coroutine: Coroutine[Any, Any, Any], patience: Patience = DEFAULT) -> Any:
    """Run a coroutine on the file system's event loop and wait for it, but not for a silent store once the process was
    asked to stop."""
    return result_of(asyncio.run_coroutine_threadsafe(coroutine, filesystem().loop), patience)


async def _request(fs: Any, method: str, arguments: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """One answer of the store within `limit_s`, in which the time to create the client is not counted."""
    limit = max(limit_s, SESSION_S)
    try:
        await asyncio.wait_for(fs.set_session(), limit)
    except ValueError as error:
        raise DataError(f"cannot create an S3 client from the environment and AWS_CONFIG_FILE: {error}") from error
    except TimeoutError as error:
        raise TimeoutError(
            f"no credentials within {limit:.0f} s; check AWS_PROFILE and its credential_process, role or sso settings"
        ) from error
    answer: dict[str, Any] = await asyncio.wait_for(fs._call_s3(method, **arguments), limit_s)
    return answer


def _after_failure(error: Exception, url: str, backoff: Backoff, fs: Any) -> None:
    """Sleep before the next attempt, or raise an error for the user."""
    fatal = s3_errors.permanent(error, url, split(url)[0], _answered)
    if not _answered and not backoff.attempts and endpoint() != "AWS" and _may_be_scheme(error):
        words = s3_errors.scheme_problem(endpoint())
        if words:
            raise DataError(f"{url}: {s3_errors.endpoint_variable()}={endpoint()}: {words}") from error
    if fatal is not None:
        refused = isinstance(fatal, Denied) or (s3_errors.is_wordless(error) and s3_errors.status_of(error) == 400)
        if refused and backoff.renewals < _RENEWALS and _renew(fs):
            backoff.renewals += 1
            return
        if not (_answered and s3_errors.has_expired(error) and _come_from_elsewhere(fs)):
            raise fatal from (None if fatal is error else error)
    if isinstance(error, (ValueError, TypeError, AttributeError)):
        raise error  # a bug, not an outage
    known = _answered or s3_errors.error_code(error)
    cause = s3_errors.client_error(error) or error
    advice = _LATE if fatal is not None else s3_errors.refusal_advice(error)
    backoff.wait(cause, None if known else FIRST_CONTACT_S, advice)


def _may_be_scheme(error: Exception) -> bool:
    """Return whether a first request may have failed because of http:// instead of https:// or the reverse."""
    from botocore.parsers import ResponseParserError

    answer = s3_errors.client_error(error)
    lasting = isinstance(error, DataError) or (answer is not None and s3_errors.status_of(error) != 400)
    return not lasting or isinstance(error, ResponseParserError)


def _renew(used: Any) -> bool:
    """Return whether the credentials have changed since those of `used`, and if so make the next request use them.

    They do, for example, if a tool writes a new token into the credentials file every hour.
    """
    with _lock:
        current = _filesystems.get(os.getpid())
    if current is None or current is not used:
        return True  # another thread has renewed them
    try:
        changed = asyncio.run_coroutine_threadsafe(_have_changed(used), current.loop).result()
    except Exception:  # there are no credentials any more: report the store's error
        return False
    if changed:
        with _lock:
            if _filesystems.get(os.getpid()) is used:
                _filesystems.clear()
    return bool(changed)


def _come_from_elsewhere(fs: Any) -> bool:
    """Return whether the credentials come from a file, a program or a service, which may soon give new ones, and not
    from the environment."""
    with suppress(Exception):
        found = asyncio.run_coroutine_threadsafe(fs.session.get_credentials(), filesystem().loop).result()
        return found is not None and found.method not in ("env", "explicit")
    return False


async def _have_changed(fs: Any) -> bool:
    from aiobotocore.session import AioSession

    before, now = await fs.session.get_credentials(), await AioSession(**fs.kwargs).get_credentials()
    if before is None or now is None:
        return now is not None
    return bool(await before.get_frozen_credentials() != await now.get_frozen_credentials())


def call(url: str, method: str, patience: Patience = DEFAULT, upload: int = 0, **arguments: Any) -> dict[str, Any]:
    """Make one S3 request about `url`, and retry while the store is failing.

    Args:
        url: the object, for messages.
        method: method of the S3 client, such as `head_object`.
        patience: retry limits.
        upload: bytes in the body; the stall time is extended by one second per megabyte for slow lines.
        arguments: arguments of the method.

    Raises:
        DataError: access is denied, there is no such bucket or key, ...
        StoreError: no answer within `patience.deadline_s`.
    """
    global _answered
    backoff = Backoff(url if _answered else f"{url} at {endpoint()}", patience)
    limit = patience.stall_s + upload / 1e6
    while True:
        fs = filesystem()
        try:
            answer: dict[str, Any] = _run(_request(fs, method, arguments, limit), patience)
            _answered = True
            return answer
        except Exception as error:
            _after_failure(error, url, backoff, fs)


class S3Stream:
    """Reads bytes [start, end) of one object in order; after a break, resumes at the same byte of the same ETag."""

    def __init__(
        self,
        url: str,
        start: int = 0,
        end: int | None = None,
        etag: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.url, self.etag = url, etag
        self._fetched, self._end = start, end
        self._buffer = bytearray()
        self._body: Any = None
        self._patience = patience or DEFAULT
        self._backoff = Backoff(url, self._patience)

    def read(self, size: int = -1) -> bytes:
        """Read exactly `size` bytes, fewer only at the end of the range; -1: read the rest.

        Raises:
            DataError: the object is missing, changed or too short, or access is denied.
            StoreError: no progress for `patience.deadline_s`.
        """
        self._backoff.resume()
        while size < 0 or len(self._buffer) < size:
            if self._end is not None and self._fetched >= self._end:
                break
            want = len(self._buffer) + PIECE if size < 0 else size
            fs = filesystem()
            try:
                _run(self._fill(want, fs), self._patience)
            except Exception as error:
                self.close()
                _after_failure(error, self.url, self._backoff, fs)
        size = len(self._buffer) if size < 0 else size
        piece = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return piece

    async def _fill(self, want: int, fs: Any) -> None:
        """Read until the buffer holds `want` bytes or the range ends; bytes that arrived survive an error."""
        stall = self._patience.stall_s
        if self._body is None:
            await self._open(fs)
        while len(self._buffer) < want and (self._end is None or self._fetched < self._end):
            try:
                piece = await asyncio.wait_for(self._body.read(min(PIECE, want - len(self._buffer))), stall)
            except Exception:
                self._take(_unread(self._body))
                raise
            if not piece:
                raise ConnectionError(f"the body ended at byte {self._fetched} of {self._end}")
            self._take(piece)

    def _take(self, piece: bytes) -> None:
        if piece:
            self._buffer += piece
            self._fetched += len(piece)
            self._backoff.progress(len(piece))

    async def _open(self, fs: Any) -> None:
        global _answered
        bucket, key = split(self.url)
        arguments: dict[str, Any] = {"Bucket": bucket, "Key": key}
        if self._fetched or self._end is not None:  # an empty object has no valid range
            arguments["Range"] = f"bytes={self._fetched}-{'' if self._end is None else self._end - 1}"
        if self.etag:
            arguments["IfMatch"] = f'"{self.etag}"'
        answer = await _request(fs, "get_object", arguments, self._patience.stall_s)
        _answered = True
        self._body = answer["Body"]
        self.etag = _etag(answer) or None
        expected = self._fetched + int(answer["ContentLength"])
        if "Range" in arguments and not str(answer.get("ContentRange", "")).startswith(f"bytes {self._fetched}-"):
            raise DataError(f"{self.url}: {endpoint()} does not support range requests, which are required")
        if self._end is not None and expected < self._end:
            raise s3_errors.too_short(self.url, expected, self._end)
        self._end = expected

    def close(self) -> None:
        """Drop the connection; another `read` opens a new one at the next byte."""
        body, self._body = self._body, None
        if body is not None:
            filesystem().loop.call_soon_threadsafe(body.close)

    def __enter__(self) -> S3Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unread(body: Any) -> bytes:
    """Return the bytes that aiohttp received before it noticed the break.

    They would be lost, and over a connection that always breaks early nothing would ever arrive. The attributes are
    private; without them, the bytes are just fetched again.
    """
    content = getattr(getattr(body, "raw_stream", None), "content", None)
    data = b"".join(getattr(content, "_buffer", ()))
    return data[getattr(content, "_buffer_offset", 0) :]


def listing(url: str, delimiter: str = "", patience: Patience = DEFAULT) -> Iterator[tuple[str, int, str]]:
    """Yield (key, size in bytes, etag) of objects whose key starts with the key of `url`, in key order.

    With a `delimiter`, each deeper level appears once, as (prefix ending in the delimiter, -1, "").
    """
    bucket, prefix = split(url)
    wanted: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter, "MaxKeys": PAGE}
    method, after = "list_objects_v2", dict[str, Any]()
    while True:
        try:
            answer = call(url, method, patience, **wanted, **after)
        except DataError as error:
            if method == "list_objects" or not s3_errors.is_not_offered(error):
                raise
            method = "list_objects"
            continue
        deeper = [one["Prefix"] for one in answer.get("CommonPrefixes", [])]
        objects = answer.get("Contents", [])
        yield from ((name, -1, "") for name in deeper)
        yield from ((found["Key"], int(found["Size"]), _etag(found)) for found in objects)
        if not answer.get("IsTruncated"):
            return
        if token := answer.get("NextContinuationToken"):
            after = {"ContinuationToken": token}
        else:  # the store only knows the first version of this call, and ignores what asks for the second
            last = answer.get("NextMarker") or max([*deeper, *(found["Key"] for found in objects)])
            method, after = "list_objects", {"Marker": last}


def _etag(answer: dict[str, Any]) -> str:
    """Return the ETag in an answer; empty if it has none. Proxies that compress mark it as weak (`W/`)."""
    return str(answer.get("ETag", "")).removeprefix("W/").strip('"')


def head(url: str, patience: Patience = DEFAULT) -> tuple[int, str]:
    """Return (size in bytes, etag) of one object. Raises `Missing` if it does not exist."""
    bucket, key = split(url)
    try:
        answer = call(url, "head_object", patience, Bucket=bucket, Key=key)
    except DataError as error:
        if isinstance(error, Missing) or not s3_errors.is_wordless(error):
            raise
        # An answer to HEAD has no message. One to GET says why or, if only HEAD is refused, has the same facts.
        answer = call(url, "get_object", patience, Bucket=bucket, Key=key, Range="bytes=0-0")
        filesystem().loop.call_soon_threadsafe(answer["Body"].close)
        return int(answer["ContentRange"].rpartition("/")[2]), _etag(answer)
    return int(answer["ContentLength"]), _etag(answer)


def put(url: str, data: bytes | memoryview, patience: Patience = DEFAULT) -> None:
    """Write one object atomically."""
    bucket, key = split(url)
    if len(data) <= PART:
        call(url, "put_object", patience, len(data), Bucket=bucket, Key=key, **_body(data))
        return
    target: dict[str, Any] = {"Bucket": bucket, "Key": key}
    upload = call(url, "create_multipart_upload", patience, 0, **target)["UploadId"]
    try:
        parts = []
        for number, start in enumerate(range(0, len(data), PART), 1):
            body = _body(data[start : start + PART])
            answer = call(
                url, "upload_part", patience, len(body["Body"]), **target, UploadId=upload, PartNumber=number, **body
            )
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        try:
            call(
                url, "complete_multipart_upload", patience, **target, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except DataError as error:
            if s3_errors.error_code(error) != "NoSuchUpload" or not _is_written(url, len(data), len(parts), patience):
                raise
    except BaseException:
        with suppress(Exception):
            abort = filesystem()._call_s3("abort_multipart_upload", **target, UploadId=upload)
            _run(asyncio.wait_for(abort, patience.stall_s))
        raise


def _body(data: bytes | memoryview) -> dict[str, Any]:
    """Return the arguments for a body, with the checksum that lets the store refuse damaged ones; buckets with object
    lock require one."""
    body = bytes(data)
    return {"Body": body, "ContentMD5": b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()}


def _is_written(url: str, size: int, parts: int, patience: Patience) -> bool:
    """Return whether an upload of which the store knows nothing any more has become the object: the answer to its
    completion was lost, and a second one is refused."""
    with suppress(Missing):
        found, etag = head(url, patience)
        return found == size and etag.endswith(f"-{parts}")
    return False


def put_new(url: str, data: bytes, patience: Patience = DEFAULT) -> bool:
    """Write one small object unless its name is taken (`If-None-Match: *`); return whether it was written.

    A store that does not support the condition overwrites the object: read it back to find out who won.
    """
    bucket, key = split(url)
    target: dict[str, Any] = {"Bucket": bucket, "Key": key, **_body(data)}
    try:
        call(url, "put_object", patience, len(data), **target, IfNoneMatch="*")
    except DataError as error:
        if s3_errors.error_code(error) in _EXISTS:
            return False
        if not s3_errors.is_not_offered(error):
            raise
        call(url, "put_object", patience, len(data), **target)
    return True


def delete(url: str, keys: list[str], patience: Patience = DEFAULT) -> None:
    """Delete objects from the bucket of `url`; missing ones are no error.

    Stores that reject multi-object deletes (Google Cloud Storage, some that require a Content-MD5) get one request per
    object.
    """
    bucket, _ = split(url)
    for start in range(0, len(keys), PAGE):
        batch = keys[start : start + PAGE]
        if len(batch) > 1 and bucket not in _one_by_one:
            objects = {"Objects": [{"Key": key} for key in batch], "Quiet": True}
            try:
                answer = call(url, "delete_objects", patience, Bucket=bucket, Delete=objects)
            except Denied:
                raise
            except DataError:
                _one_by_one.add(bucket)
            else:
                for kept in answer.get("Errors", []):
                    said = ": ".join(kept[name] for name in ("Code", "Message") if kept.get(name))
                    raise DataError(f"s3://{bucket}/{kept['Key']}: {endpoint()} did not delete it ({said})")
                continue
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: call(url, "delete_object", patience, Bucket=bucket, Key=key), batch))


def forget() -> None:
    """Drop this process's connection and credentials; the next request reads the environment again."""
    global _answered
    with _lock:
        _filesystems.clear()
        _one_by_one.clear()
        _answered = False
