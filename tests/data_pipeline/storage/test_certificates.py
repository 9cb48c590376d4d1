"""Servers with certificates of a private authority, and proxies: what works, and which messages explain what does
not."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from data_pipeline.common.errors import DataError, StoreError
from data_pipeline.storage import other, s3, store
from data_pipeline.storage.retry import Patience

CALM = Patience(stall_s=30, deadline_s=60)
QUICK = Patience(stall_s=2, deadline_s=1, base_s=0.01, cap_s=0.05)


def write_certificate(place: Path, days: int = 1) -> None:
    """A certificate for `localhost` that is its own authority, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    ends = datetime.now(UTC) + timedelta(days=days)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(ends - timedelta(days=10))
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    place.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + made.public_bytes(pem))


class Web(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def serving(folder: Path, certificate: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: Web(*given, directory=str(folder)))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    yield
    forget()


def forget() -> None:
    """Makes the next request read the settings of the environment again."""
    s3._filesystems.clear()
    other._filesystems.clear()


def trust(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that starts with SSL_CERT_FILE, which aiohttp reads when it is imported."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", ssl.create_default_context())
    forget()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    write_certificate(tmp_path / "ca.pem")
    (tmp_path / "x").write_bytes(b"content")
    yield from serving(tmp_path, tmp_path / "ca.pem")


def test_https_with_a_private_authority(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    with pytest.raises(
        DataError, match=r"the certificate of its server is not trusted \(self.signed.*set SSL_CERT_FILE"
    ):
        store.read_bytes(f"https://localhost:{port}/x", CALM)
    trust(tmp_path / "ca.pem", monkeypatch)
    assert store.read_bytes(f"https://localhost:{port}/x", CALM) == b"content"
    with pytest.raises(DataError, match=r"is for another name .* use that name in the address"):
        store.read_bytes(f"https://127.0.0.1:{port}/x", CALM)


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_s3_with_a_private_authority(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://localhost:{port}")
    forget()
    with pytest.raises(DataError, match=r"not trusted \(self.signed.*set AWS_CA_BUNDLE to the file"):
        store.read_bytes("s3://bucket/x", CALM)
    write_certificate(tmp_path / "{other}.pem")
    monkeypatch.setenv(variable, str(tmp_path / "{other}.pem"))
    forget()
    with pytest.raises(DataError, match=rf"not trusted .* \({variable}=.*\{{other\}}\.pem\)"):
        store.read_bytes("s3://bucket/x", CALM)
    monkeypatch.setenv(variable, str(tmp_path / "ca.pem"))
    forget()
    with pytest.raises((DataError, StoreError), match=r"not respond like an S3 store|rejected|no such"):
        store.size("s3://bucket/x", CALM)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{port}")
    forget()
    with pytest.raises(DataError, match=r"is for another name"):
        store.read_bytes("s3://bucket/x", CALM)


def test_a_certificate_that_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_certificate(tmp_path / "old.pem", days=-1)
    trust(tmp_path / "old.pem", monkeypatch)
    for port in serving(tmp_path, tmp_path / "old.pem"):
        with pytest.raises(DataError, match=r"is not valid now .* it must be renewed"):
            store.read_bytes(f"https://localhost:{port}/x", CALM)


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize(("name", "words"), [("nowhere", "no such file"), (".", "PEM form"), ("x", "PEM form")])
def test_a_file_that_holds_no_certificates_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, name: str, words: str
) -> None:
    (tmp_path / "x").write_bytes(b"no certificate")
    monkeypatch.setenv(variable, str(tmp_path / name))
    forget()
    with pytest.raises(DataError, match=f"^{variable}=.*{words}"):
        store.read_bytes("s3://bucket/x", CALM)


def test_a_name_in_the_address_of_the_store_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://user:secret@localhost:9000")
    forget()
    with pytest.raises(DataError, match=r"AWS_ENDPOINT_URL contains a name or password") as error:
        store.read_bytes("s3://bucket/x", CALM)
    assert "secret" not in str(error.value)


def test_proxies_of_https_are_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    forget()
    with pytest.raises(StoreError, match=r"check HTTPS_PROXY and HTTP_PROXY"):
        store.read_bytes("http://nowhere.invalid/x", QUICK)


def test_a_socks_proxy_is_not_blamed_on_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget()
    with pytest.raises(DataError, match=r"HTTP_PROXY=socks5://127.0.0.1:9: s3:// works with HTTP proxies"):
        store.read_bytes("s3://bucket/x", QUICK)


def plain(folder: Path) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: Web(*given, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.mark.parametrize(("scheme", "wanted"), [("http", "its server speaks TLS"), ("https", "does not speak TLS")])
def test_confusing_http_and_https_is_reported_at_once(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, wanted: str
) -> None:
    monkeypatch.setattr(s3, "_answered", False)
    server = plain(tmp_path)
    address = f"{scheme}://localhost:{port if scheme == 'http' else next(server)}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    forget()
    waited: list[float] = []
    monkeypatch.setattr("data_pipeline.storage.retry.time.sleep", waited.append)
    with pytest.raises(DataError, match=f"AWS_ENDPOINT_URL={address}.*{wanted}"):
        store.read_bytes("s3://bucket/x", CALM)
    with pytest.raises(DataError, match=f"^{address}/x: {wanted if scheme == 'http' else f'its server {wanted}'}"):
        store.read_bytes(f"{address}/x", CALM)
    assert not waited
    list(server)


@pytest.mark.parametrize("name", ["S3_ENDPOINT_URL", "AWS_S3_ENDPOINT", "S3_ENDPOINT", "AWS_ENDPOINT"])
def test_an_address_in_a_variable_that_is_not_read_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other_name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FSSPEC_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(other_name, raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv(name, "http://localhost:9000")
    forget()
    with pytest.raises(DataError, match=rf"{name}=http://localhost:9000 is not read: set AWS_ENDPOINT_URL"):
        store.read_bytes("s3://bucket/x", CALM)


def test_a_proxy_in_all_proxy_is_named_when_no_connection_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://localhost:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:1")
    forget()
    for url in ("s3://bucket/x", "http://localhost:1/x"):
        with pytest.raises(StoreError, match="ALL_PROXY is not read: name an HTTP proxy in HTTPS_PROXY"):
            store.read_bytes(url, QUICK)
