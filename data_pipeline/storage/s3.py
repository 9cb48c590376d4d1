"""s3:// through s3fs: requests with our own single retry loop, and a body that continues at the broken byte.

s3fs and botocore each retry on their own (5 x 5 x 5 attempts when a store never answers); both are switched off here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_pipeline.common.errors import CascadeError, DataError
from data_pipeline.storage.retry import DEFAULT, Backoff, Patience, describe

PIECE = 1 << 20
"""Bytes per read of a body: the fastest way s3fs offers (2 to 4 times `S3FileSystem.open`)."""
PART = 64 << 20
"""Bytes per part of a multipart upload, and the size from which one is used."""
PAGE = 1000
"""Objects per page of a listing."""
FIRST_CONTACT_S = 30.0
"""Deadline for an endpoint that has never answered in this process: rather a wrong address than an outage."""

_lock = threading.Lock()
_filesystems: dict[int, Any] = {}
_answered = False
_one_by_one: set[str] = set()
"""Buckets whose store has refused a multi-object delete."""

_DENIED = {
    "AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
    "AllAccessDisabled", "AccountProblem", "TokenRefreshRequired", "RequestTimeTooSkewed", "InvalidClientTokenId",
}  # fmt: skip
_REGION = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_NEVER = (501, 505)
"""Statuses of what a store cannot do at all: no outage, so no retry."""
_EXISTS = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_TRANSIENT = {"SlowDown", "RequestTimeout", "429", "TooManyRequests", "Throttling", "ThrottlingException", "408"}


class Denied(DataError):
    """The store refuses these credentials."""


class Missing(DataError):
    """The object is not there."""


def split(url: str) -> tuple[str, str]:
    """`s3://bucket/some/key` -> (`bucket`, `some/key`)."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise DataError(f"{url}: it names no bucket; write s3://bucket/prefix")
    return bucket, key


def endpoint() -> str:
    """Where s3:// goes, for messages."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def filesystem() -> Any:
    """This process's s3fs filesystem (one per process: its event loop does not survive a fork)."""
    with _lock:
        fs = _filesystems.get(os.getpid())
        if fs is None:
            import s3fs

            fs = s3fs.S3FileSystem(
                skip_instance_cache=True,
                use_listings_cache=False,
                config_kwargs={
                    "connect_timeout": 5,
                    "read_timeout": 300,  # stalls are ours to break off, by Patience.stall_s
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


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine on the filesystem's event loop and waits for it."""
    return asyncio.run_coroutine_threadsafe(coroutine, filesystem().loop).result()


def _client_error(error: BaseException | None) -> Any:
    """The store's own answer behind an error that s3fs translated (and lost the code of), or None."""
    while error is not None and not isinstance(getattr(error, "response", None), dict):
        error = error.__cause__
    return error


def _response(error: BaseException) -> dict[str, Any]:
    client_error = _client_error(error)
    return client_error.response if client_error is not None else {}


def error_code(error: BaseException) -> str:
    """`NoSuchKey`, `403`, ...; empty for an error that is no answer of the store."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)


def permanent(error: BaseException, url: str) -> CascadeError | None:
    """The user's error behind `error`, or None when another attempt may succeed."""
    from botocore import exceptions

    if isinstance(error, CascadeError):
        return error
    bucket, _ = split(url)
    code, status = error_code(error), _status(error)
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return DataError(
            f"{url}: no credentials for {endpoint()}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE "
            "(FSSPEC_S3_ANON=true reads a public bucket)"
        )
    if isinstance(error, (exceptions.ProfileNotFound, exceptions.ParamValidationError, exceptions.InvalidRegionError)):
        return DataError(f"{url}: {describe(error)}")
    if isinstance(error, exceptions.CredentialRetrievalError):
        return DataError(f"{url}: the credentials could not be renewed: {describe(error)}")
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return DataError(f"{url}: AWS_ENDPOINT_URL={endpoint()} is no address such as https://host:port")
    if not code or code in _TRANSIENT or status == 429 or (status >= 500 and status not in _NEVER):
        return None
    if code in _DENIED or status == 403:
        return Denied(
            f"{url}: {endpoint()} denies access to bucket {bucket!r} ({code}, HTTP 403); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE, and that they may list and read it"
        )
    if code == "NoSuchBucket":
        return DataError(
            f"{url}: the bucket {bucket!r} does not exist at {endpoint()}; check the name and AWS_ENDPOINT_URL"
        )
    if code in ("NoSuchKey", "404", "NotFound"):
        return Missing(f"{url}: no such object in bucket {bucket!r} at {endpoint()}")
    if code in ("PreconditionFailed", "412"):
        return DataError(
            f"{url}: the object changed since it was indexed (its ETag differs); run `cascade index` again"
        )
    if code in ("InvalidRange", "416"):
        return DataError(f"{url}: the object is shorter than its index says; run `cascade index` again")
    if code in _REGION or status in (301, 307):
        return DataError(f"{url}: bucket {bucket!r} lives in another region ({code}); set AWS_DEFAULT_REGION")
    if 400 <= status < 500 or status in _NEVER:
        return DataError(f"{url}: {endpoint()} refuses the request: {describe(error)}")
    return None


def _after_failure(error: Exception, url: str, backoff: Backoff) -> None:
    """Sleeps before the next attempt, or raises what the user must know."""
    fatal = permanent(error, url)
    if fatal is not None:
        raise fatal from error
    if isinstance(error, (ValueError, TypeError, AttributeError)):
        raise error  # a bug, not an outage
    backoff.wait(_client_error(error) or error, None if _answered or error_code(error) else FIRST_CONTACT_S)


def call(url: str, method: str, patience: Patience = DEFAULT, upload: int = 0, **arguments: Any) -> dict[str, Any]:
    """One S3 request about `url`, repeated while the store is out of order.

    Args:
        upload: bytes in the body; a slow line gets a second per megabyte on top of the stall time.

    Raises:
        DataError: access denied, no such bucket or key, ...
        StoreError: no answer within `patience.deadline_s`.
    """
    global _answered
    backoff = Backoff(url if _answered else f"{url} at {endpoint()}", patience)
    limit = patience.stall_s + upload / 1e6
    while True:
        try:
            answer = _run(asyncio.wait_for(filesystem()._call_s3(method, **arguments), limit))
            _answered = True
            return answer
        except Exception as error:
            _after_failure(error, url, backoff)


class S3Stream:
    """Bytes [start, end) of one object, in order; a break is continued at the broken byte of the same ETag."""

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
        """Exactly `size` bytes, fewer only at the end of the range; -1: all that is left."""
        while size < 0 or len(self._buffer) < size:
            if self._end is not None and self._fetched >= self._end:
                break
            want = len(self._buffer) + PIECE if size < 0 else size
            try:
                _run(self._fill(want))
            except Exception as error:
                self.close()
                _after_failure(error, self.url, self._backoff)
        size = len(self._buffer) if size < 0 else size
        piece = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return piece

    async def _fill(self, want: int) -> None:
        """Reads until the buffer holds `want` bytes or the range ends; what has arrived survives an error."""
        stall = self._patience.stall_s
        if self._body is None:
            await asyncio.wait_for(self._open(), stall)
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
            self._backoff.progress()

    async def _open(self) -> None:
        global _answered
        bucket, key = split(self.url)
        arguments: dict[str, Any] = {"Bucket": bucket, "Key": key}
        if self._fetched or self._end is not None:  # an empty object has no valid range
            arguments["Range"] = f"bytes={self._fetched}-{'' if self._end is None else self._end - 1}"
        if self.etag:
            arguments["IfMatch"] = f'"{self.etag}"'
        answer = await filesystem()._call_s3("get_object", **arguments)
        _answered = True
        self._body = answer["Body"]
        self.etag = answer.get("ETag", "").strip('"') or None
        expected = self._fetched + int(answer["ContentLength"])
        if "Range" in arguments and not str(answer.get("ContentRange", "")).startswith(f"bytes {self._fetched}-"):
            raise DataError(f"{self.url}: {endpoint()} does not answer range requests, which this reader needs")
        if self._end is not None and expected < self._end:
            raise DataError(
                f"{self.url}: the object ends at byte {expected}, its index says {self._end}; run `cascade index` again"
            )
        self._end = expected

    def close(self) -> None:
        """Drops the connection; `read` would open a new one at the next byte."""
        body, self._body = self._body, None
        if body is not None:
            filesystem().loop.call_soon_threadsafe(body.close)

    def __enter__(self) -> S3Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unread(body: Any) -> bytes:
    """What aiohttp had received before it noticed the break; it would be dropped, and a connection that always breaks
    early would never bring anything. Its name there is private: without it, the bytes are only fetched again."""
    content = getattr(getattr(body, "raw_stream", None), "content", None)
    data = b"".join(getattr(content, "_buffer", ()))
    return data[getattr(content, "_buffer_offset", 0) :]


def listing(url: str, delimiter: str = "", patience: Patience = DEFAULT) -> Iterator[tuple[str, int, str]]:
    """Objects whose key begins with the key of `url`, in key order: (key, size in bytes, etag).

    With a `delimiter`, deeper levels appear once as (prefix ending in the delimiter, -1, "").
    """
    bucket, prefix = split(url)
    token: dict[str, Any] = {}
    while True:
        answer = call(
            url, "list_objects_v2", patience, Bucket=bucket, Prefix=prefix, Delimiter=delimiter, MaxKeys=PAGE, **token
        )
        for deeper in answer.get("CommonPrefixes", []):
            yield deeper["Prefix"], -1, ""
        for found in answer.get("Contents", []):
            yield found["Key"], int(found["Size"]), found["ETag"].strip('"')
        if not answer.get("IsTruncated"):
            return
        token = {"ContinuationToken": answer["NextContinuationToken"]}


def head(url: str, patience: Patience = DEFAULT) -> tuple[int, str]:
    """(size in bytes, etag) of one object."""
    bucket, key = split(url)
    answer = call(url, "head_object", patience, Bucket=bucket, Key=key)
    return int(answer["ContentLength"]), answer["ETag"].strip('"')


def put(url: str, data: bytes | memoryview, patience: Patience = DEFAULT) -> None:
    """Writes one object; it appears whole or not at all."""
    bucket, key = split(url)
    if len(data) <= PART:
        call(url, "put_object", patience, len(data), Bucket=bucket, Key=key, Body=bytes(data))
        return
    target: dict[str, Any] = {"Bucket": bucket, "Key": key}
    upload = call(url, "create_multipart_upload", patience, 0, **target)["UploadId"]
    try:
        parts = []
        for number, start in enumerate(range(0, len(data), PART), 1):
            body = bytes(data[start : start + PART])
            answer = call(
                url, "upload_part", patience, len(body), **target, UploadId=upload, PartNumber=number, Body=body
            )
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        call(url, "complete_multipart_upload", patience, **target, UploadId=upload, MultipartUpload={"Parts": parts})
    except BaseException:
        with contextlib.suppress(Exception):
            _run(filesystem()._call_s3("abort_multipart_upload", **target, UploadId=upload))
        raise


def put_new(url: str, data: bytes, patience: Patience = DEFAULT) -> bool:
    """Writes one small object unless its name is taken (`If-None-Match: *`); returns whether it was written.

    A store that does not implement the condition overwrites what is there: read the object back to find out who won.
    """
    bucket, key = split(url)
    target: dict[str, Any] = {"Bucket": bucket, "Key": key, "Body": data}
    try:
        call(url, "put_object", patience, len(data), **target, IfNoneMatch="*")
    except DataError as error:
        if error_code(error) in _EXISTS:
            return False
        if _status(error) != 501:
            raise
        call(url, "put_object", patience, len(data), **target)
    return True


def delete(url: str, keys: list[str], patience: Patience = DEFAULT) -> None:
    """Removes objects of the bucket of `url`; missing ones are no error. Stores that refuse multi-object deletes
    (Google Cloud Storage, some that want a Content-MD5) get one request per object."""
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
                    raise DataError(f"s3://{bucket}/{kept['Key']}: {endpoint()} did not delete it ({kept['Code']})")
                continue
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: call(url, "delete_object", patience, Bucket=bucket, Key=key), batch))


def forget() -> None:
    """Drops this process's connection and credentials: the next request reads the environment again."""
    global _answered
    with _lock:
        _filesystems.clear()
        _one_by_one.clear()
        _answered = False
