"""Classifies S3 errors: those the user must fix, explained in one sentence, and outages that a retry may survive."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from data_pipeline.common.errors import CascadeError, DataError
from data_pipeline.storage.retry import describe_error
from data_pipeline.storage.shard_lists import SHARD_SUFFIXES

DENIED = {
    "AccessDenied",
    "403",
    "Forbidden",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "ExpiredTokenException",
    "RequestExpired",
    "AllAccessDisabled",
    "AccountProblem",
    "TokenRefreshRequired",
    "InvalidClientTokenId",
    "401",
    "Unauthorized",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
PATH_STYLE = {"SecondLevelDomainForbidden", "PathStyleDomainForbidden", "InvalidPathAccess", "PathStyleAccessDenied"}
"""Errors of stores that require the bucket in the host name."""
REGION = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
TRANSIENT = {
    "SlowDown",
    "RequestTimeout",
    "429",
    "TooManyRequests",
    "Throttling",
    "ThrottlingException",
    "408",
    "OperationAborted",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
}
_TOO_LARGE = "the store, or a proxy in front of it, accepts no object of this size"
_SKEWED = "set the clock of this machine"
_REMEDIES = {
    "InvalidObjectState": "it is archived: restore it first",
    "EntityTooLarge": _TOO_LARGE,
    "RequestTimeTooSkewed": _SKEWED,
    "RequestInTheFuture": _SKEWED,
}
"""Codes of refusals that have nothing to do with credentials -> what to do."""
_FULL = re.compile("quota|storagefull|insufficientstorage", re.IGNORECASE)
"""What the codes of full stores have in common: QuotaExceeded, XMinioStorageFull, InsufficientStorage, ..."""
_UNLISTED = "; shards that may be read but not listed must be named, for example with {00000..00999}.tar"
_PASSING_STATUS = {408, 425, 429}
_LASTING_STATUS = {501, 505, 507, 511}
_OTHER_NAME, _OUT_OF_DATE = {62, 64}, {9, 10}
"""OpenSSL's codes for certificates of another host name or IP address, and for those not yet or no longer valid."""
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")
_PROBE_S = 2.0
"""How long to wait for each answer of a server when looking for the cause of an error, seconds."""
PROXY_ADVICE = "; check HTTPS_PROXY and HTTP_PROXY, or name the store's host in NO_PROXY"
_NOT_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"}
_SETTINGS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "FSSPEC_S3_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
)


class Denied(DataError):
    """The store denies access with these credentials."""


class Missing(DataError):
    """The object does not exist."""


class Changed(DataError):
    """The object has changed: its ETag is not the one asked for."""


def endpoint_variable() -> str:
    """Return the variable or the key of AWS_CONFIG_FILE that sets the store's address, for messages."""
    names = ("FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    found = next((name for name in names if os.environ.get(name)), "")
    return found or ("endpoint_url" if _address_of_profile() else "AWS_ENDPOINT_URL")


def _address_of_profile() -> str:
    """Return the address of the store in AWS_CONFIG_FILE; empty if there is none."""
    return _read_address(*(os.environ.get(name, "") for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "HOME")))


@lru_cache(maxsize=4)
def _read_address(profile: str, *_: str) -> str:
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.session import Session

    try:
        session = Session(profile=profile or None)
        found = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), "s3", environ={}).provide()
    except Exception:  # reported when the client is created
        return ""
    return str(found or "")


def endpoint() -> str:
    """Return the address of the store according to the environment and AWS_CONFIG_FILE, or "AWS", for messages."""
    return os.environ.get(endpoint_variable()) or _address_of_profile() or "AWS"


def overlooked() -> str:
    """Return a remark on an address of the store in a variable of another program, for errors at AWS; else empty."""
    names = ("AWS_S3_ENDPOINT_URL", "AWS_S3_ENDPOINT", "AWS_ENDPOINT", "S3_ENDPOINT_URL", "S3_ENDPOINT")
    found = next((name for name in names if os.environ.get(name)), "")
    if not found or endpoint() != "AWS":
        return ""
    return f" ({found}={os.environ[found]} is not read: set AWS_ENDPOINT_URL to that address)"


def scheme_problem(address: str) -> str:
    """Return why a server cannot be reached by http:// or by https://, found by trying both; empty if that is not why.

    Args:
        address: the URL of the server.
    """
    parts = urlsplit(address)
    host, secure = parts.hostname or "", parts.scheme == "https"
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return ""  # it may not be reachable without the proxy
    port = parts.port or (443 if secure else 80)
    if not secure and _speaks_tls(host, port):
        return "its server speaks TLS: it must start with https://"
    if secure and not _speaks_tls(host, port) and _speaks_http(host, port):
        return "its server does not speak TLS: it must start with http://"
    return ""


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), _PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except (OSError, ValueError) as error:
        return "ALERT" in str(getattr(error, "reason", ""))


def _speaks_http(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), _PROBE_S) as plain:
        plain.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
        return plain.recv(5) == b"HTTP/"
    return False


def _is_shard(url: str) -> bool:
    return url.lower().endswith(SHARD_SUFFIXES)


def after_change(url: str) -> str:
    """Return what to do about a file or object that is no longer what it was."""
    if _is_shard(url):
        return "run `cascade index` again"
    return "repeat the command once nothing writes to it any more"


def too_short(url: str, end: int, expected: int) -> DataError:
    """Return the error for a file or object that ends at byte `end` and not at `expected`."""
    if _is_shard(url):
        return DataError(f"{url}: it ends at byte {end}, but its index says {expected}; {after_change(url)}")
    return DataError(f"{url}: it ends at byte {end} instead of {expected}; {after_change(url)}")


def changed(url: str) -> Changed:
    """Return the error for an object whose ETag has changed."""
    when = "since it was indexed" if _is_shard(url) else "while it was being read"
    return Changed(f"{url}: the object has changed {when} (its ETag differs); {after_change(url)}")


def check_settings() -> None:
    """Check the environment for settings with which no request could succeed.

    Raises:
        DataError: a variable has white space at its ends or a control character, the address is not a URL, or the file
            of certificates cannot be read.
    """
    for name in _SETTINGS:
        value = os.environ.get(name, "")
        if value != value.strip() or any(ord(letter) < 32 for letter in value):
            raise DataError(f"{name} starts or ends with a space, or contains a line break: set it again without that")
    if "@" in endpoint().partition("://")[2].partition("/")[0]:
        raise DataError(
            f"{endpoint_variable()} contains a name or password: leave it out, and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    if endpoint() != "AWS" and not _is_address(endpoint()):
        raise DataError(f"{endpoint_variable()}={endpoint()} is not a URL such as https://host:port")
    name = _bundle_variable()
    bundle = os.environ.get(name, "")
    if bundle and not os.access(bundle, os.R_OK):
        raise DataError(f"{name}={bundle}: no such file, or it cannot be read")
    if bundle:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(bundle)
        except (ssl.SSLError, OSError) as error:
            raise DataError(f"{name}={bundle}: it must be a file of certificates in PEM form ({error})") from error


def _bundle_variable() -> str:
    """Return the variable that names the file of authorities' certificates for s3://."""
    return "REQUESTS_CA_BUNDLE" if os.environ.get("REQUESTS_CA_BUNDLE") else "AWS_CA_BUNDLE"


def certificate_problem(error: BaseException, server: str, variable: str) -> str:
    """Return why a server's certificate is refused and what to do; empty for other errors.

    Args:
        error: the error of a request.
        server: how the message names the server.
        variable: names the file of authorities' certificates.
    """
    for one in causes_of(error):
        found = getattr(one, "certificate_error", one)
        if isinstance(found, ssl.SSLCertVerificationError):
            why = getattr(found, "verify_message", "") or describe_error(found)
            code = getattr(found, "verify_code", 0)
            if code in _OTHER_NAME:
                return f"the certificate of {server} is for another name ({why}): use that name in the address"
            if code in _OUT_OF_DATE:
                return (
                    f"the certificate of {server} is not valid now ({why}): it must be renewed, or this clock is wrong"
                )
            return (
                f"the certificate of {server} is not trusted ({why}); set {variable} to the file with your "
                f"certificate authority's certificates{_value_of(variable)}"
            )
    return ""


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, or an unbalanced bracket
        return False


def passes(status: int) -> bool:
    """Return whether an answer with this HTTP status may be followed by a better one."""
    return status in _PASSING_STATUS or (status >= 500 and status not in _LASTING_STATUS)


def remedy_for(code: str, status: int) -> str:
    """Return what to do about a refusal that has nothing to do with credentials; empty for all others.

    Args:
        code: the store's error code; empty if it has none.
        status: the HTTP status.
    """
    if status == 507 or _FULL.search(code):
        return "the store is full: make room, or raise the quota"
    if code.startswith("KMS."):
        return "check the key with which the bucket is encrypted"
    return _REMEDIES.get(code, _TOO_LARGE if status == 413 else "")


def client_error(error: BaseException | None) -> Any:
    """Return the store's own error behind one that s3fs translated (losing the code), or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(getattr(error, "response", None), dict):
        seen.add(id(error))
        error = error.__cause__
    return error if isinstance(getattr(error, "response", None), dict) else None


def _response(error: BaseException) -> dict[str, Any]:
    answer = client_error(error)
    return answer.response if answer is not None else {}


def error_code(error: BaseException) -> str:
    """Return the store's error code (`NoSuchKey`, `403`, ...); empty if the error did not come from the store."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def status_of(error: BaseException) -> int:
    """Return the HTTP status of the store's answer; 0 if the error did not come from the store."""
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)


def is_wordless(error: BaseException) -> bool:
    """Return whether the answer had no body, as those to HEAD requests: its code is then just the status."""
    return error_code(error).isdigit()


def is_not_offered(error: BaseException) -> bool:
    """Return whether the store does not know this call, or a condition of it."""
    return status_of(error) == 501 or error_code(error) == "NotImplemented"


def has_expired(error: BaseException) -> bool:
    """Return whether the credentials were valid until they expired."""
    return error_code(error) in _EXPIRED


def _region_of(error: BaseException) -> str:
    """Return the region of the bucket, as far as the answer names it, in the form `=eu-west-1`; empty otherwise."""
    response = _response(error)
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    found = headers.get("x-amz-bucket-region") or response.get("Error", {}).get("Region")
    return f"={found}" if found else ""


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes; botocore keeps the cause among its arguments."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        below = getattr(error, "kwargs", None)
        inner = below.get("error") if isinstance(below, dict) else None
        inner = inner or getattr(error, "os_error", None) or error.__cause__ or error.__context__
        error = inner if isinstance(inner, BaseException) else None


def permanent(error: BaseException, url: str, bucket: str, answered: bool) -> CascadeError | None:
    """Return the user error that `error` amounts to; None if a retry may succeed.

    Args:
        error: the error of a request.
        url, bucket: what the request was for.
        answered: the store has answered this process before, so its address is right.
    """
    if isinstance(error, CascadeError):
        return error
    if client_error(error) is not None:
        return _of_answer(error, url, bucket)
    return _of_connection(error, url, answered)


def _of_connection(error: BaseException, url: str, answered: bool) -> CascadeError | None:
    """Like `permanent`, for an error before there was an answer."""
    import aiohttp
    from botocore import exceptions, parsers

    where = f"{endpoint_variable()}={endpoint()}" if endpoint() != "AWS" else "AWS"
    if words := _without_credentials(error) or _on_the_way(error, where, answered):
        return DataError(f"{url}: {words}")
    if isinstance(error, RecursionError):
        return DataError(
            f"{url}: {where} redirects every request; check whether its address begins with https://, and "
            "AWS_DEFAULT_REGION"
        )
    if isinstance(error, exceptions.ParamValidationError):
        bucket, _, key = url.removeprefix("s3://").partition("/")
        wrong = f"{bucket!r} is not a valid bucket name" if key else "it names a bucket but no object in it"
        return DataError(f"{url}: {wrong}; write s3://bucket/name")
    if isinstance(error, parsers.ResponseParserError):
        words = f"{where} does not respond like an S3 store ({describe_error(error)[:200]})"
        return None if answered else DataError(f"{url}: {words}")
    if isinstance(error, exceptions.HTTPClientError) and not isinstance(error, exceptions.ConnectionError):
        passing = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError)
        if any(isinstance(cause, passing) for cause in causes_of(error)):
            return None
        return DataError(f"{url}: the request cannot be made: {describe_error(error)}{_value_of(_bundle_variable())}")
    if isinstance(error, exceptions.BotoCoreError) and not isinstance(error, _passing_errors()):
        return DataError(f"{url}: {describe_error(error)}; {where}{_value_of('AWS_PROFILE')}")
    return None


def _without_credentials(error: BaseException) -> str:
    """Return why there are no credentials, or no region, and what to do; empty for other errors."""
    from botocore import exceptions

    if isinstance(error, (FileNotFoundError, PermissionError)) and error.filename:
        return (
            f"no credentials: {error.filename}: {error.strerror}; check AWS_PROFILE, AWS_CONFIG_FILE (~/.aws/config) "
            "and AWS_WEB_IDENTITY_TOKEN_FILE"
        )
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return (
            f"no credentials for {endpoint()}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE "
            f"(FSSPEC_S3_ANON=true reads a public bucket){overlooked()}"
        )
    if isinstance(error, exceptions.CredentialRetrievalError):
        return f"there are no credentials{_value_of('AWS_PROFILE')}: {describe_error(error)}"
    if isinstance(error, exceptions.NoRegionError):
        return f"{describe_error(error)} Set AWS_DEFAULT_REGION{_value_of('AWS_PROFILE')}"
    return ""


def _on_the_way(error: BaseException, where: str, answered: bool) -> str:
    """Return why a request did not reach the store, if a retry would not either: its certificate, TLS, the proxy or
    the host name; empty for other errors."""
    import aiohttp
    from botocore import exceptions

    if refused := certificate_problem(error, where, _bundle_variable()):
        return refused
    chain = list(causes_of(error))
    for cause in chain:
        reason = getattr(cause, "reason", None)  # aiohttp's versions of these errors have none
        if isinstance(cause, ssl.SSLError) and reason in _NOT_TLS:
            return f"{where} does not speak TLS ({reason}); should it start with http://?"
        if isinstance(cause, aiohttp.ClientHttpProxyError):
            return f"the proxy refused the request ({cause.status} {cause.message}); check HTTPS_PROXY and HTTP_PROXY"
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            if socks := next((name for name in _PROXIES if os.environ.get(name, "").startswith("socks")), ""):
                return f"{socks}={os.environ[socks]}: s3:// works with HTTP proxies, not with SOCKS"
            if answered:
                continue  # the name server is out of order
            proxy = any(isinstance(other, exceptions.ProxyConnectionError) for other in chain)
            name = "HTTPS_PROXY, HTTP_PROXY" if proxy else where
            return f"the host name of {name} is unknown ({cause.strerror}){unread_proxy()}{overlooked()}"
    return ""


def _passing_errors() -> tuple[type[Exception], ...]:
    from botocore import exceptions

    return (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.ChecksumError,
        exceptions.ReadTimeoutError,
        exceptions.ResponseStreamingError,
    )


def _value_of(name: str) -> str:
    return f" ({name}={os.environ[name]})" if os.environ.get(name) else ""


def _of_answer(error: BaseException, url: str, bucket: str) -> CascadeError | None:
    """Like `permanent`, for an answer of the store; quotes its message."""
    code, status = error_code(error), status_of(error)
    words = " ".join(str(_response(error).get("Error", {}).get("Message", "")).split())
    said = f"{code}: {words}" if words else code
    path = urlsplit(endpoint()).path.strip("/") if endpoint() != "AWS" else ""
    hint = f" (its path {path!r} comes before the bucket)" if path else ""
    if more := remedy_for(code, status):
        return DataError(f"{url}: {endpoint()} rejected the request ({said}); {more}")
    if code in TRANSIENT or passes(status):
        return None
    if code in PATH_STYLE:
        return Denied(
            f"{url}: {endpoint()} requires the bucket in the host name ({said}): add `s3 =` and below it, indented, "
            "`addressing_style = virtual` to the profile in AWS_CONFIG_FILE (by default ~/.aws/config)"
        )
    if code in DENIED or status in (401, 403):
        asked = getattr(client_error(error), "operation_name", "")
        unlisted = asked.startswith("ListObjects") and code in ("AccessDenied", "403", "Forbidden")
        return Denied(
            f"{url}: {endpoint()} denies access to bucket {bucket!r} ({asked}: HTTP {status}, {said}); check "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE, and their permissions"
            f"{_UNLISTED if unlisted else ''}{overlooked()}"
        )
    if code == "NoSuchBucket":
        return DataError(
            f"{url}: the bucket {bucket!r} does not exist at {endpoint()}; check the name and "
            f"{endpoint_variable()}{hint}{overlooked()}"
        )
    if code in ("NoSuchKey", "404", "NotFound"):
        return Missing(f"{url}: no such object in bucket {bucket!r} at {endpoint()}{hint}{overlooked()}")
    if code in ("PreconditionFailed", "412"):
        return changed(url)
    if code in ("InvalidRange", "416"):
        return DataError(f"{url}: the object is shorter than it was; {after_change(url)}")
    if code in REGION or status in (301, 307):
        return DataError(
            f"{url}: bucket {bucket!r} is in another region ({said}); set AWS_DEFAULT_REGION"
            f"{_region_of(error)}{overlooked()}"
        )
    return DataError(f"{url}: {endpoint()} rejected the request: {describe_error(client_error(error))}")


def refusal_advice(error: BaseException) -> str:
    """Return what to check if this outage lasts; empty without any advice."""
    from botocore import exceptions

    if any(isinstance(cause, exceptions.ProxyConnectionError) for cause in causes_of(error)):
        return PROXY_ADVICE
    return "" if client_error(error) is not None else f"{unread_proxy()}{overlooked()}"


def unread_proxy() -> str:
    """Return a remark if the only proxy is named in ALL_PROXY, which is not read; otherwise empty."""
    name = next((name for name in ("ALL_PROXY", "all_proxy") if os.environ.get(name)), "")
    if not name or any(os.environ.get(other) for other in _PROXIES):
        return ""
    return f"; {name} is not read: name an HTTP proxy in HTTPS_PROXY and HTTP_PROXY"
