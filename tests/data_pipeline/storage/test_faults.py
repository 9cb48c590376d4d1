"""A broken network between us and a real S3 server: reads are complete, or the run ends with a clear message.

All of it against moto, and against Ceph's radosgw where its packages are installed.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from data_pipeline import ShardStream
from data_pipeline.common.errors import DataError, StoreError
from data_pipeline.shards import dataset
from data_pipeline.shards.index import index_shard
from data_pipeline.storage import retry, s3, s3_errors, store
from data_pipeline.storage.retry import Patience, StoppedWaiting
from tests.data_pipeline.small_shards import write_shards
from tests.faultproxy import FaultProxy
from tests.s3 import S3Server

QUICK = Patience(stall_s=20, deadline_s=60, base_s=0.01, cap_s=0.1)
"""A server on a busy machine may be slow: requests are given up soon only where silence is the fault under test."""
DATA = bytes(range(251)) * 12_000  # 3 MB


@pytest.fixture(scope="session", params=["moto", "ceph"])
def s3_process(request: pytest.FixtureRequest, ceph_starting: Any) -> S3Server:
    server: S3Server = request.getfixturevalue(f"{request.param}_process")
    return server


@pytest.fixture
def url(bucket: str) -> str:
    store.write_bytes(f"s3://{bucket}/object", DATA)
    return f"s3://{bucket}/object"


@pytest.fixture
def proxy(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.host, s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3.forget()
        yield proxy


def patience_for(fault: str) -> Patience:
    return replace(QUICK, stall_s=1.5) if fault.startswith(("stall", "delay")) else QUICK


def ranges(proxy: FaultProxy) -> list[str]:
    return [wanted for _, _, wanted, _ in proxy.log]


@pytest.mark.parametrize("fault", ["reset", "fin", "stall"])
def test_a_broken_read_continues_at_the_same_byte(url: str, proxy: FaultProxy, fault: str) -> None:
    for _ in range(5):  # on a busy machine, the connection may break before the first byte has been read
        proxy.plan([f"{fault}:1500000"])
        assert store.read_bytes(url, patience_for(fault)) == DATA
        if ranges(proxy)[1]:
            break
    assert ranges(proxy)[0] == ""
    first = int(ranges(proxy)[1].removeprefix("bytes=").split("-")[0])
    assert 1_000_000 < first <= 1_500_000  # a reset may drop the contents of the socket's buffers
    assert len(proxy.log) == 2


def test_connections_that_all_die_early_still_deliver_everything(url: str, proxy: FaultProxy) -> None:
    proxy.plan([], default="fin:200000")
    assert store.read_bytes(url, QUICK) == DATA
    assert len(proxy.log) == -(-len(DATA) // 200_000)


@pytest.mark.parametrize("fault", ["status:503", "status:500", "status:429", "reset-head", "delay:3"])
def test_a_store_that_fails_for_a_while_is_retried(url: str, proxy: FaultProxy, fault: str) -> None:
    proxy.plan([fault] * 3)
    assert store.read_range(url, 10, 100, patience=patience_for(fault)) == DATA[10:100]
    assert len(proxy.log) == 4  # a single retry loop: s3fs and botocore retry nothing themselves


@pytest.mark.parametrize(
    "fault, cause",
    [("status:503", "SlowDown"), ("status:500", "InternalError"), ("stall:0", "Timeout"), ("fin:0", "Payload|ended")],
)
def test_a_store_that_keeps_failing_ends_the_run_with_its_name_and_the_cause(
    url: str, proxy: FaultProxy, fault: str, cause: str
) -> None:
    proxy.plan([], default=fault)
    sentence = rf"{url}: no progress for \d+ s in (\d+) attempts?.*last cause.*({cause})"
    with pytest.raises(StoreError, match=sentence) as raised:
        store.read_range(url, 0, 100, patience=replace(patience_for(fault), deadline_s=3, base_s=0.05))
    found = re.search(sentence, str(raised.value), re.DOTALL)
    # no layer below repeats a request by itself; an attempt on a connection that the server is just closing reaches
    # nobody
    assert found and len(proxy.log) <= int(found[1]) <= len(proxy.log) + 3


def test_requests_other_than_reads_are_repeated_too(url: str, proxy: FaultProxy) -> None:
    proxy.plan(["status:503", "reset-head", "ok"])
    assert store.size(url, QUICK) == len(DATA)
    proxy.plan(["status:500", "ok"])
    store.write_bytes(url + "2", b"new", QUICK)
    proxy.plan(["status:503"])
    assert store.list_dir(url.rpartition("/")[0], QUICK) == ["object", "object2"]


def test_an_object_that_changes_during_a_read_is_noticed(url: str, proxy: FaultProxy, s3_server: S3Server) -> None:
    proxy.plan(["fin:1500000"])
    with store.open_stream(url, patience=QUICK) as stream:
        assert stream.read(1_000_000) == DATA[:1_000_000]
        bucket, key = s3.split(url)
        s3_server.client().put_object(Bucket=bucket, Key=key, Body=DATA[::-1])
        with pytest.raises(DataError, match=rf"{url}: the object has changed"):
            stream.read()


def test_credentials_revoked_during_a_read_are_reported(url: str, proxy: FaultProxy) -> None:
    proxy.plan(["fin:1000000"], default="status:403")
    with pytest.raises(DataError, match=r"denies access.*AWS_ACCESS_KEY_ID"):
        store.read_bytes(url, QUICK)
    assert len(proxy.log) == 2  # a refusal is not tried again


def test_a_server_that_comes_back(url: str, proxy: FaultProxy) -> None:
    proxy.plan(["fin:1000000"])
    with store.open_stream(url, patience=Patience(stall_s=1, deadline_s=30, cap_s=0.3)) as stream:
        first = stream.read(100_000)
        proxy.down()
        back = threading.Timer(1.0, proxy.up)
        back.start()
        assert first + stream.read() == DATA
        back.join()


def test_a_wrong_endpoint_is_noticed_soon(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(s3, "FIRST_CONTACT_S", 0.5)
    s3.forget()
    with pytest.raises(StoreError, match=r"at http://127\.0\.0\.1:1: no progress.*Could not connect"):
        store.expand(f"s3://{bucket}/*.tar")


# ------------------------------------------------------------------------------------------------- a whole stream

OPTIONS: dict[str, Any] = {"seed": 1, "global_batch": 16, "lanes": 4, "window": 8, "stop": 96}


@pytest.fixture
def shards(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """The shards in the bucket, and the keys in the order in which an undisturbed local run reads them."""
    # shorter waits than in a run
    monkeypatch.setattr(dataset, "patience_of", lambda config: Patience(config.stall_s, config.deadline_s, 0.02, 0.2))
    for path in write_shards(tmp_path, [20, 13, 31], longest=60_000):
        for name in (path, path.replace(".tar", ".index.parquet")):
            store.write_bytes(f"s3://{bucket}/{store.basename(name)}", Path(name).read_bytes())
    return f"s3://{bucket}/*.tar", [sample["__key__"] for sample in ShardStream(str(tmp_path), **OPTIONS)]


@pytest.mark.parametrize("budget_mb", [64, 0])
@pytest.mark.parametrize(
    "faults",
    [
        ["reset:20000", "fin:5000", "status:503", "ok", "stall:30000", "status:500", "reset-head"] * 3,
        ["flip:1000", "ok", "flip:9000", "ok", "flip:40000"],
        ["status:503"] * 4,
    ],
    ids=["mixture", "flipped bytes", "503 storm"],
)
def test_the_stream_of_keys_is_complete_and_unchanged(
    shards: tuple[str, list[str]], proxy: FaultProxy, faults: list[str], budget_mb: int
) -> None:
    url, expected = shards
    stream = ShardStream(url, stall_s=0.5, prefetch_mb=budget_mb, **OPTIONS)
    proxy.only = lambda method, path: path.endswith(".tar")
    proxy.plan(faults)
    samples = list(stream)
    assert [sample["__key__"] for sample in samples] == expected
    assert not any(sample["__failures__"] for sample in samples)


def test_bytes_that_are_wrong_in_every_read_are_detected_by_the_etag(
    shards: tuple[str, list[str]], proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    url = store.expand(shards[0])[0]
    index_shard(url, QUICK)
    assert not caplog.text
    proxy.only = lambda method, path: path.endswith(".tar") and method == "GET"
    proxy.plan([], default="flip:700")
    index_shard(url, QUICK)
    assert "two reads agree, but their MD5 is not the ETag" in caplog.text


def test_a_forked_process_leaves_its_parents_connection_alone(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert store.size(url) == len(DATA)
    child = os.fork()
    if not child:
        code = 1
        with suppress(BaseException):
            code = int(store.size(url) != len(DATA))
            gc.collect()
            time.sleep(0.2)  # the event loop of a finalizer gets its turn
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_a_stream_outlives_its_server_for_a_while(
    shards: tuple[str, list[str]], proxy: FaultProxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is longer for a server that has answered before than for one that never has."""
    url, expected = shards
    gone_s = {"moto": 1.0, "ceph": 5.0}[request.node.callspec.params["s3_process"]]
    monkeypatch.setattr(s3, "FIRST_CONTACT_S", 2.5)
    read = []
    for sample in ShardStream(url, stall_s=1, prefetch_mb=0, **OPTIONS):
        read.append(sample["__key__"])
        if len(read) == 5:
            proxy.down()
            back = threading.Timer(gone_s, proxy.up)
            back.start()
    assert read == expected
    back.join()


@pytest.mark.parametrize(
    "default, error, message", [("status:403", DataError, "denies access"), ("status:503", StoreError, "SlowDown")]
)
def test_a_stream_that_cannot_go_on_says_why(
    shards: tuple[str, list[str]], proxy: FaultProxy, default: str, error: type[Exception], message: str
) -> None:
    stream = ShardStream(shards[0], deadline_s=3, prefetch_mb=0, **OPTIONS)
    began = time.monotonic()
    with pytest.raises(error, match=message):
        for number, _ in enumerate(stream):
            if number == 5:
                proxy.plan([], default=default)
    assert time.monotonic() - began < 60  # it ends; how fast does not matter


def test_a_sample_that_arrives_damaged_every_time_is_replaced(shards: tuple[str, list[str]], proxy: FaultProxy) -> None:
    url, expected = shards
    stream = ShardStream(url, prefetch_mb=0, **OPTIONS)
    index, _ = stream.dataset.index(1)
    victim, asked = index.key(3), f"bytes={index.parts(3)[0].offset}-"
    proxy.choose = lambda method, path, wanted: "flip:0" if "00001" in path and wanted.startswith(asked) else "ok"
    samples = list(stream)
    hit = [sample for sample in samples if sample["__failures__"]]
    assert len(hit) == expected.count(victim) > 0
    assert all(json.loads(sample["__failures__"])[0]["key"] == victim for sample in hit)
    for sample, key in zip(samples, expected, strict=True):
        assert (sample["__key__"] == key) == (key != victim)


def test_unsupported_operations_of_a_store_are_not_retried(url: str, proxy: FaultProxy) -> None:
    proxy.plan([], default="status:501")
    with pytest.raises(DataError, match="rejected the request"):
        store.write_bytes(url, b"x", QUICK)
    assert len(proxy.log) == 1


def test_a_store_without_multi_object_delete(url: str, proxy: FaultProxy) -> None:
    """Google Cloud Storage answers 501, others want a Content-MD5."""
    folder = url.rpartition("/")[0]
    for name in ("1", "2", "3"):
        store.write_bytes(f"{folder}/d/{name}", b"x")
    proxy.log.clear()
    proxy.plan(["status:501"])
    store.remove_files(f"{folder}/d", ["1", "2", "missing"], QUICK)
    assert store.sizes(f"{folder}/d") == {"3": 1} and store.sizes(folder) == {"d": -1, "object": len(DATA)}
    store.remove_files(f"{folder}/d", ["3", "2"], QUICK)
    assert [entry[0] for entry in proxy.log].count("POST") == 1, "it has learned"


@pytest.mark.parametrize("fault", ["ok", "status:501", "hide:NextContinuationToken", "hide:ETag"])
def test_older_ways_to_list_are_understood(
    url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Some stores refuse the second version of the call, some answer it as the first; some list no ETags."""
    monkeypatch.setattr(s3, "PAGE", 2)
    folder = url.rpartition("/")[0] + "/set"
    names = [*(f"deep/{number}.tar" for number in range(6)), "a.tar", "b.tar", "c d.tar", "e+f.tar"]
    for name in names:
        store.write_bytes(f"{folder}/{name}", b"x")
    proxy.choose = lambda method, path, _: fault if "list-type=2" in path else "ok"
    proxy.log.clear()
    assert store.expand(f"{folder}/*.tar") == [f"{folder}/{name}" for name in sorted(names) if "/" not in name]
    assert all("delimiter=%2F" in path for _, path, _, _ in proxy.log), "what is deeper is not listed"
    assert store.expand(f"{folder}/**/*.tar") == [f"{folder}/{name}" for name in sorted(names)]
    assert store.sizes(folder) == {"deep": -1, **{name: 1 for name in names if "/" not in name}}
    found = store.describe([f"{folder}/{name}" for name in names if "/" not in name] + [f"{folder}/deep/5.tar"])
    assert {one.etag for one in found} <= {hashlib.md5(b"x").hexdigest(), ""}


@pytest.mark.parametrize(
    "answer",
    [
        {"ResponseMetadata": {"HTTPStatusCode": 301, "HTTPHeaders": {"x-amz-bucket-region": "eu-west-1"}}},
        {"Error": {"Code": "AuthorizationHeaderMalformed", "Message": "m", "Region": "eu-west-1"}},
    ],
)
def test_the_region_that_a_store_names_is_passed_on(answer: dict[str, Any]) -> None:
    found = s3_errors.permanent(ClientError(answer, "HeadObject"), "s3://b/x", "b", answered=False)
    assert isinstance(found, DataError) and str(found).endswith("set AWS_DEFAULT_REGION=eu-west-1")


def test_an_etag_that_a_proxy_marked_as_weak_is_the_same() -> None:
    assert s3._etag({"ETag": 'W/"0a"'}) == s3._etag({"ETag": '"0a"'}) == "0a" and s3._etag({}) == ""


DRIP = Patience(stall_s=0.3, deadline_s=5, base_s=0.01, cap_s=0.02)


def test_a_few_bytes_before_each_silence_do_not_put_off_the_deadline(url: str, proxy: FaultProxy) -> None:
    proxy.plan([], default="stall:100")
    with pytest.raises(StoreError, match=r"no progress for .* Timeout"):
        store.read_range(url, 0, len(DATA), patience=DRIP)
    assert 5 < len(proxy.log) < 30


def test_a_pause_of_the_reader_does_not_count_as_silence_of_the_store(url: str, proxy: FaultProxy) -> None:
    with store.open_stream(url, patience=Patience(stall_s=5, deadline_s=0.3, base_s=0.01, cap_s=0.01)) as stream:
        first = stream.read(1000)
        proxy.plan(["reset-head", "ok"])
        stream.close()
        time.sleep(0.5)
        assert first + stream.read() == DATA


def test_credentials_renewed_by_a_helper_are_read_again(
    url: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    good = "[default]\n"
    for name in ("access_key_id", "secret_access_key"):
        good += f"aws_{name} = {os.environ[f'AWS_{name.upper()}']}\n"
        monkeypatch.delenv(f"AWS_{name.upper()}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    file.write_text(re.sub("secret_access_key = .*", "secret_access_key = outdated", good))
    s3.forget()
    with pytest.raises(DataError, match="HTTP 403"):
        store.read_range(url, 0, 10, patience=QUICK)
    assert len(proxy.log) == 1, "the same credentials are not tried twice"
    with store.open_stream(url, patience=QUICK) as stream:
        file.write_text(good)
        assert stream.read() == DATA
    monkeypatch.setattr(proxy, "words", {403: ("ExpiredToken", "The provided token has expired.")})
    proxy.plan(["status:403"] * 5)
    assert store.size(url, QUICK) == len(DATA), "a helper may be late; a response to HEAD has no body, one to GET has"
    proxy.plan([], default="status:403")
    with pytest.raises(StoreError, match=r"ExpiredToken\).*The provided token has expired\.; .* were not renewed"):
        store.size(url, replace(QUICK, deadline_s=0.1))


def test_credentials_of_the_environment_that_expire_are_not_waited_for(url: str, proxy: FaultProxy) -> None:
    assert store.size(url) == len(DATA)
    proxy.words = {403: ("ExpiredToken", "The provided token has expired.")}
    proxy.plan([], default="status:403")
    with pytest.raises(DataError, match=r"ExpiredToken: The provided token has expired\."):
        store.read_bytes(url, QUICK)
    assert len(proxy.log) == 1


@pytest.mark.parametrize("parts", [False, True])
def test_a_byte_that_flips_while_a_shard_is_indexed_is_noticed(
    bucket: str, s3_server: S3Server, proxy: FaultProxy, tmp_path: Path, parts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(write_shards(tmp_path, [6])[0]).read_bytes()
    whole = index_shard(str(tmp_path / "00000.tar"))
    client = s3_server.client()
    if parts:  # an ETag of parts of an unusual size, which cannot be computed: two reads must agree
        upload = client.create_multipart_upload(Bucket=bucket, Key="x.tar")["UploadId"]
        pieces = [data + bytes((5 << 20) + 512 * 7 - len(data)), b"\0" * 512]
        tags = [
            client.upload_part(Bucket=bucket, Key="x.tar", UploadId=upload, PartNumber=n, Body=piece)["ETag"]
            for n, piece in enumerate(pieces, 1)
        ]
        done = {"Parts": [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]}
        client.complete_multipart_upload(Bucket=bucket, Key="x.tar", UploadId=upload, MultipartUpload=done)
    else:
        client.put_object(Bucket=bucket, Key="x.tar", Body=data)
    flips = iter(["flip:3000", *["ok"] * 100])
    proxy.choose = lambda method, path, wanted: next(flips) if method == "GET" and path.endswith("x.tar") else "ok"
    index = index_shard(f"s3://{bucket}/x.tar", QUICK)
    assert index.digest == whole.digest
    assert "a second read returned different bytes" in caplog.text
    flips = iter(f"flip:{n}" for n in range(3000, 4000))
    with pytest.raises(DataError, match="the network or the store damages them"):
        index_shard(f"s3://{bucket}/x.tar", QUICK)
    flips = iter(["ok"] * 100)
    index_shard(f"s3://{bucket}/x.tar", QUICK)
    reads = [entry for entry in proxy.log if entry[0] == "GET" and entry[1].endswith("x.tar")]
    assert len(reads) == (4 + 6 + 2 if parts else 3 + 6 + 1), "an ETag that is the MD5 spares the second read"


def test_a_store_for_virtual_hosts_says_so(url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "words", {403: ("SecondLevelDomainForbidden", "use virtual hosted style")})
    proxy.plan([], default="status:403")
    with pytest.raises(DataError, match=r"use virtual hosted style.*addressing_style = virtual"):
        store.size(url, QUICK)


def test_a_store_without_conditions_and_one_with(url: str, proxy: FaultProxy) -> None:
    assert store.create(f"{url}-new", b"1") and not store.create(f"{url}-new", b"2")
    assert store.read_bytes(f"{url}-new") == b"1"
    proxy.plan(["status:501"])
    assert store.create(f"{url}-new", b"3") and store.read_bytes(f"{url}-new") == b"3"
    proxy.words = {400: ("NotImplemented", "A header you provided implies functionality that is not implemented")}
    proxy.plan(["status:400"])
    assert store.create(f"{url}-new", b"4") and store.read_bytes(f"{url}-new") == b"4"


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "InvalidObjectState", "archived: restore it first"),
        (403, "QuotaExceeded", "the store is full: make room"),
        (403, "RequestTimeTooSkewed", "set the clock"),
        (400, "KMS.NotFoundException", "check the key with which the bucket is encrypted"),
        (507, "XMinioStorageFull", "the store is full: make room"),
        (413, "413", "accepts no object of this size"),
        (511, "511", "rejected the request"),
    ],
)
def test_refusals_for_other_reasons_than_credentials_are_explained(
    url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, status: int, code: str, words: str
) -> None:
    store.size(url)  # the address is right: no error makes it look for another
    monkeypatch.setattr(proxy, "words", {status: (code, "its words")})
    proxy.plan([], default=f"status:{status}")
    with pytest.raises(DataError, match=f"its words.*{words}|{words}.*its words") as error:
        store.write_bytes(url, b"x", QUICK)
    assert "AWS_ACCESS_KEY_ID" not in str(error.value) and len(proxy.log) == 1


def test_a_body_that_arrives_damaged_is_sent_again(url: str, proxy: FaultProxy) -> None:
    store.size(url)
    proxy.words = {400: ("BadDigest", "The Content-MD5 you specified did not match what we received.")}
    proxy.plan(["status:400"])
    store.write_bytes(url, b"whole", QUICK)
    assert store.read_bytes(url) == b"whole"


def test_a_bucket_whose_objects_may_be_read_but_not_listed(
    shards: tuple[str, list[str]], proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a bucket refuses, with 403 instead of 404, what does not exist."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url, expected = shards
    store.remove_files(url.rpartition("/")[0], [f"0000{n}.index.parquet" for n in range(3)])
    refused = ("list-type=2", ".parquet")
    proxy.choose = lambda method, path, wanted: "status:403" if any(word in path for word in refused) else "ok"
    with pytest.raises(DataError, match=r"denies access .*ListObjectsV2.*must be named, for example with \{00000"):
        store.expand(url)
    named = ShardStream(url.replace("*", "{00000..00002}"), **OPTIONS)
    assert [sample["__key__"] for sample in named] == expected


def test_an_upload_whose_completion_response_was_lost_succeeds(
    url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART", 5 << 20)
    data = bytes(range(256)) * (6 << 12)
    proxy.only = lambda method, path: method == "POST" and "uploadId" in path
    proxy.words = {404: ("NoSuchUpload", "The specified upload does not exist.")}
    proxy.plan(["fin:0", "status:404"])
    store.write_bytes(url, data, QUICK)
    assert len(proxy.log) == 2 and store.read_bytes(url) == data
    proxy.plan(["status:404"])
    with pytest.raises(DataError, match="NoSuchUpload"):
        store.write_bytes(f"{url}-new", data, QUICK)


def test_a_store_that_redirects_in_a_circle_is_reported_at_once(url: str, proxy: FaultProxy) -> None:
    proxy.plan([], default="status:301")
    with pytest.raises(DataError, match="redirects every request; check whether its address begins with https://"):
        store.list_dir(url.rpartition("/")[0], QUICK)


def test_a_process_asked_to_stop_does_not_wait_for_the_deadline(
    url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a process gives up its request soon; others keep their deadline."""
    monkeypatch.setattr(retry, "HURRY_S", 0.2)
    proxy.plan([], default="status:503")
    retry.hurry_up()
    try:
        with pytest.raises(StoreError, match="giving up"):
            store.write_bytes(url, b"x", replace(QUICK, hurry=True, deadline_s=1e9))
        proxy.plan(["status:503"] * 20)
        store.write_bytes(url, DATA, QUICK)
    finally:
        retry.hurry_up(now=False)


def test_an_answer_that_comes_as_the_wait_for_it_ends_is_taken() -> None:
    class Late(Future[str]):
        def result(self, timeout: float | None = None) -> str:
            if not self.done():
                self.set_result("written")
                raise TimeoutError
            return super().result(timeout)

    assert retry.result_of(Late(), QUICK) == "written"
    failed: Future[str] = Future()
    failed.set_exception(TimeoutError("its own"))
    with pytest.raises(TimeoutError, match="its own"):
        retry.result_of(failed, QUICK)
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        retry.result_of(Future(), QUICK, 0.1)


@pytest.mark.parametrize("fault", ["status:503", "stall:0"])
def test_a_process_that_only_reads_stops_at_once(
    url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Also where the store accepts a request and never answers."""
    monkeypatch.setattr(retry, "READ_S", 0.2)
    proxy.plan([], default=fault)
    patience = Patience(stall_s=600, deadline_s=600, base_s=60, cap_s=60, hurry=True, reads=True)
    stop = threading.Timer(0.5, retry.hurry_up, kwargs={"number": signal.SIGTERM})
    stop.start()
    try:
        with pytest.raises(StoppedWaiting, match="stopped by SIGTERM while the store failed") as stopped:
            store.read_bytes(url, patience)
        assert (stopped.value.exit_code, pickle.loads(pickle.dumps(stopped.value)).number) == (75, signal.SIGTERM)
    finally:
        stop.join()
        retry.hurry_up(now=False)
