"""The S3 module against a real server over HTTP. Failing servers are in test_faults.py."""

from __future__ import annotations

import json
import os
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from data_pipeline.common.errors import DataError
from data_pipeline.storage import s3, s3_errors, store
from data_pipeline.storage.retry import Patience
from tests.s3 import S3Server

QUICK = Patience(stall_s=2, deadline_s=5)


def test_read_and_write(bucket: str) -> None:
    url = f"s3://{bucket}/deep/odd name +&é.bin"
    data = bytes(range(256)) * 12_000
    store.write_bytes(url, data)
    assert store.read_bytes(url) == data
    assert store.read_range(url, 1_000_000, 2_500_001) == data[1_000_000:2_500_001]
    assert store.size(url) == len(data)
    with store.open_stream(url, 5) as stream:
        assert stream.read(7) == data[5:12]
        assert stream.read() == data[12:]
        assert stream.read(1) == b""


def test_empty_object(bucket: str) -> None:
    store.write_bytes(f"s3://{bucket}/empty", b"")
    assert store.read_bytes(f"s3://{bucket}/empty") == b""


def test_multipart_upload(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART", 5 << 20)
    data = bytes(range(256)) * (11 << 12)
    store.write_bytes(f"s3://{bucket}/large", data)
    assert store.read_bytes(f"s3://{bucket}/large") == data


def test_exists_list_and_remove(bucket: str) -> None:
    for name in ("a/1", "a/2", "a/b/3", "ab", "a"):
        store.write_bytes(f"s3://{bucket}/{name}", b"x")
    assert store.list_dir(f"s3://{bucket}") == ["a", "ab"]
    assert store.list_dir(f"s3://{bucket}/a") == ["1", "2", "b"]
    assert store.list_dir(f"s3://{bucket}/none") == []
    assert store.exists(f"s3://{bucket}/a/b") and not store.exists(f"s3://{bucket}/a/c")
    store.remove(f"s3://{bucket}/a")
    assert store.list_dir(f"s3://{bucket}") == ["ab"]
    with pytest.raises(DataError, match="whole bucket"):
        store.remove(f"s3://{bucket}/")


def test_expand_and_describe(bucket: str, s3_server: S3Server) -> None:
    client = s3_server.client()
    for number in range(7):
        client.put_object(Bucket=bucket, Key=f"set/part-{number % 2}/{number:05d}.tar", Body=b"x" * number)
        client.put_object(Bucket=bucket, Key=f"set/part-{number % 2}/{number:05d}.json", Body=b"x")
    base = f"s3://{bucket}/set"
    assert store.expand(f"{base}/part-0") == [f"{base}/part-0/{n:05d}.tar" for n in (0, 2, 4, 6)]
    assert store.expand(f"{base}/part-*/*.tar") == [f"{base}/part-{n % 2}/{n:05d}.tar" for n in (0, 2, 4, 6, 1, 3, 5)]
    assert store.expand(f"{base}/**/0000[12].tar") == [f"{base}/part-0/00002.tar", f"{base}/part-1/00001.tar"]
    assert store.expand(f"{base}/part-[!1]/0000[]2-4].tar") == [f"{base}/part-0/{n:05d}.tar" for n in (2, 4)]
    assert store.expand(f"{base}/part-[^1]/0000[4!].tar") == [f"{base}/part-0/00004.tar"]
    for nothing in (f"{base}/part-0/0000[9-0].tar", f"{base}/part-0[!x]00002.tar"):
        with pytest.raises(DataError, match=r"no \.tar shards found"):
            store.expand(nothing)
    assert store.expand(f"{base}/part-1/{{00001,00003}}.tar") == [f"{base}/part-1/{n:05d}.tar" for n in (1, 3)]
    entries = store.describe(store.expand(f"{base}/part-*/*.tar"))
    assert [entry.size for entry in entries] == [0, 2, 4, 6, 1, 3, 5]
    assert entries[1].etag == client.head_object(Bucket=bucket, Key="set/part-0/00002.tar")["ETag"].strip('"')
    with pytest.raises(DataError, match=r"00000\.tar and 2 more of 6: no such object"):
        store.describe(store.expand(f"{base}/part-1/{{00000..00005}}.tar"))


def test_more_than_a_page_of_objects(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PAGE", 3)
    urls = [f"s3://{bucket}/{number:05d}.tar" for number in range(8)]
    for url in urls:
        store.write_bytes(url, b"")
    assert store.expand(f"s3://{bucket}/") == urls


def mistakes(bucket: str) -> dict[str, str]:
    return {
        f"s3://{bucket}/*.tar": f"no .tar shards found .*{bucket}' .* is empty",
        f"s3://{bucket}/00000.tar": "no such object",
        f"s3://{bucket}/{{00000..00009}}.tar": r"00000\.tar and 9 more of 10: no such object",
        "s3://no-such-bucket/x/": "the bucket 'no-such-bucket' does not exist .*AWS_ENDPOINT_URL",
        "s3://no-such-bucket/00000.tar": "the bucket 'no-such-bucket' does not exist",
    }


def test_mistakes_are_named_at_once(bucket: str) -> None:
    for pattern, message in mistakes(bucket).items():
        with pytest.raises(DataError, match=message):
            store.describe(store.expand(pattern))


def test_an_endpoint_that_is_not_an_address_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    s3.forget()
    with pytest.raises(DataError, match="AWS_ENDPOINT_URL=nonsense is not a URL"):
        store.expand(f"s3://{bucket}/")


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("credential_process = /bin/echo hello", "cannot create an S3 client|no credentials"),
        ("credential_process = /bin/false", "there are no credentials \\(AWS_PROFILE=mine\\).*custom-process"),
        ("credential_process = /none/such", "no credentials: /none/such: No such file.*check AWS_PROFILE"),
        ("role_arn = arn:aws:iam::1:role/x\nweb_identity_token_file = /none/token", "no credentials: /none/token: No"),
        ("sso_start_url = https://x\nsso_region = x\nsso_account_id = 1\nsso_role_name = x", "SSO"),
    ],
)
def test_credentials_that_a_profile_cannot_get_are_reported_at_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, words: str
) -> None:
    (tmp_path / "config").write_text(f"[profile mine]\n{profile}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    s3.forget()
    for ask in (store.read_bytes, store.size):
        with pytest.raises(DataError, match=words):
            ask(f"s3://{bucket}/x")


class Metadata(BaseHTTPRequestHandler):
    """The metadata service of an Amazon machine, which is slow to answer."""

    busy = 2

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        Metadata.busy -= 1
        names = {"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "t"}
        credentials = {**names, "Expiration": "2099-01-01T00:00:00Z", "Code": "Success"}
        answer = json.dumps(credentials) if self.path.endswith("/a-role") else "a-role"
        self.send_response(503 if Metadata.busy >= 0 else 200)
        self.end_headers()
        self.wfile.write(answer.encode())


def test_credentials_arrive_from_a_busy_metadata_service(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setattr(Metadata, "busy", 2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        s3.forget()
        with pytest.raises(DataError, match="InvalidAccessKeyId"):  # what matters is that these credentials were used
            store.list_dir(f"s3://{bucket}")
        server.shutdown()


def test_an_address_in_a_profile_is_named(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text(f"[default]\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n")
    address = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    s3.forget()
    with pytest.raises(DataError) as error:
        store.size(f"s3://{bucket}/x")
    assert str(error.value).endswith(f"no such object in bucket {bucket!r} at {address}")
    assert s3_errors.endpoint_variable() == "endpoint_url"
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    answer = ClientError({"Error": {"Code": "NoSuchKey"}, "ResponseMetadata": {"HTTPStatusCode": 404}}, "GetObject")
    assert str(s3_errors.permanent(answer, "s3://b/x", "b", True)) == "s3://b/x: no such object in bucket 'b' at AWS"


def test_a_bucket_whose_objects_are_locked(s3_server: S3Server) -> None:
    """Each write must have a checksum; overwritten and removed objects remain as versions."""
    client, name = s3_server.client(), f"locked-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
    locked = {"ObjectLockEnabled": "Enabled", "Rule": rule}
    client.put_object_lock_configuration(Bucket=name, ObjectLockConfiguration=locked)
    for content in (b"one", b"two"):
        store.write_bytes(f"s3://{name}/run/x", content)
    assert store.read_bytes(f"s3://{name}/run/x") == b"two"
    store.remove(f"s3://{name}/run")
    assert store.list_dir(f"s3://{name}/run") == [] and len(client.list_object_versions(Bucket=name)["Versions"]) == 2


def test_a_url_without_an_object_is_refused(bucket: str) -> None:
    for url, words in (
        (f"s3://{bucket}", "names a bucket but no object in it; write s3://bucket/name"),
        ("s3://a:b/x", "'a:b' is not a valid bucket name"),
    ):
        with pytest.raises(DataError, match=words):
            store.write_bytes(url, b"x")
        with pytest.raises(DataError, match=words):
            store.read_bytes(url)


def test_wrong_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_bytes(f"s3://{bucket}/00000.tar", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3.forget()
    for pattern in (f"s3://{bucket}/", f"s3://{bucket}/00000.tar", f"s3://{bucket}/{{00000..00009}}.tar"):
        with pytest.raises(DataError, match=f"denies access to bucket '{bucket}'.*403.*AWS_SECRET_ACCESS_KEY"):
            store.describe(store.expand(pattern))


def test_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3.forget()
    with pytest.raises(DataError, match=r"no credentials .*AWS_ACCESS_KEY_ID"):
        store.read_bytes(f"s3://{bucket}/x")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.tar", "since it was indexed.*`cascade index` again"),
        ("x.safetensors", "while it was being read.*nothing writes"),
    ],
)
def test_a_changed_or_shorter_object_is_noticed(bucket: str, name: str, words: str) -> None:
    url = f"s3://{bucket}/{name}"
    store.write_bytes(url, b"0123456789")
    etag = store.describe([url])[0].etag
    store.write_bytes(url, b"9876543210")
    with pytest.raises(DataError, match=words):
        store.read_range(url, 2, 5, etag)
    for start in (8, 20):
        with pytest.raises(DataError, match=words.rpartition("*")[2]):
            store.read_range(url, start, 30)


def test_a_versioned_bucket_is_read_in_its_current_state(bucket: str, s3_server: S3Server) -> None:
    """Overwritten and removed objects stay in the bucket as versions and delete markers, and are not visible."""
    client = s3_server.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    place = f"s3://{bucket}/run/a.json"
    store.write_bytes(place, b"one")
    store.write_bytes(place, b"second")
    assert (store.read_bytes(place), store.sizes(f"s3://{bucket}/run")) == (b"second", {"a.json": 6})
    store.remove(f"s3://{bucket}/run")
    assert not store.exists(place) and store.list_dir(f"s3://{bucket}/run") == []
    with pytest.raises(DataError, match="no such object"):
        store.read_bytes(place)
    assert store.create(place, b"three") and not store.create(place, b"four")
    assert store.read_bytes(place) == b"three"
    found = client.list_object_versions(Bucket=bucket)
    assert len(found["Versions"]) == 3 and found["DeleteMarkers"]


def test_unusual_names_in_a_bucket_are_read(bucket: str) -> None:
    names = (
        "a/UP.TAR",
        "a/shard-000",
        "b/x.tar",
        "b/x.tar/",
        "b/c/y.tar",
        "p+q/a #1?.tar",
        "w?[1]/é%25.tar",
        "z/a.tar.zst",
        "i/1.jpg",
    )
    for name in names:
        store.write_bytes(f"s3://{bucket}/{name}", b"x")
    found = {
        "a/UP.TAR": ["a/UP.TAR"],
        "a/shard-000": ["a/shard-000"],
        "a": ["a/UP.TAR"],
        "b/**": ["b/c/y.tar", "b/x.tar"],
        "p+q": ["p+q/a #1?.tar"],
        "p+q/a #1?.tar": ["p+q/a #1?.tar"],
        "w?[1]": ["w?[1]/é%25.tar"],
        "w?*/*.tar": ["w?[1]/é%25.tar"],
        "b/?.tar": ["b/x.tar"],
    }
    for pattern, shards in found.items():
        assert store.expand(f"s3://{bucket}/{pattern}") == [f"s3://{bucket}/{name}" for name in shards], pattern
    refused = {
        f"s3://{bucket}/z": r"a\.tar\.zst': only plain and gzip",
        f"s3://{bucket}/i": r"contains, for example, 'i/1\.jpg'",
        f" s3://{bucket}/b": f"write s3://{bucket}/b",
        f"s3:/{bucket}/b": f"write s3://{bucket}/b",
        f"arn:aws:s3:::{bucket}/b": f"write s3://{bucket}/b",
    }
    for pattern, words in refused.items():
        with pytest.raises(DataError, match=words):
            store.expand(pattern)
