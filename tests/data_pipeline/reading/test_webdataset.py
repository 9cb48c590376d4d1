from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from data_pipeline import register_s3
from data_pipeline.common.errors import DataError
from data_pipeline.reading.webdataset import open_s3
from data_pipeline.storage import s3, store
from tests.data_pipeline.small_shards import members, write_shards
from tests.faultproxy import FaultProxy
from tests.s3 import S3Server


@pytest.fixture(autouse=True)
def registered() -> None:
    register_s3()


def test_plain_webdataset_reads_through_breaks(
    tmp_path: Path, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in write_shards(tmp_path, [4, 3], longest=30_000):
        store.write_bytes(f"s3://{bucket}/{store.basename(path)}", Path(path).read_bytes())
    with FaultProxy(s3_server.host, s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3.forget()
        proxy.plan(["reset:10000", "status:503", "fin:4000"])
        samples = list(wds.WebDataset(f"s3://{bucket}/{{00000..00001}}.tar", shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [
        f"0000{n}{i:04d}" for n, k in ((0, 4), (1, 3)) for i in range(k)
    ]
    assert samples[5]["jpg"] == members("0/1/1", 30_000)["jpg"]


def test_a_missing_object_is_named(bucket: str) -> None:
    with pytest.raises(DataError, match=r"x\.tar: no such object"):
        list(wds.WebDataset(f"s3://{bucket}/x.tar", shardshuffle=False, empty_check=False))


def test_the_writer_works_with_plain_webdataset(bucket: str) -> None:
    with wds.TarWriter(f"s3://{bucket}/out.tar") as writer:
        writer.write({"__key__": "a", "txt": "hello"})
    (sample,) = wds.WebDataset(f"s3://{bucket}/out.tar", shardshuffle=False)
    assert (sample["__key__"], sample["txt"]) == ("a", b"hello")


def test_a_failed_upload_is_not_repeated_when_the_file_is_dropped(bucket: str, s3_server: S3Server) -> None:
    writer = open_s3(f"s3://{bucket}-later/out.tar", "wb")
    writer.write(b"content")
    with pytest.raises(DataError):
        writer.close()
    client: Any = s3_server.client()
    client.create_bucket(Bucket=f"{bucket}-later")
    del writer
    gc.collect()
    assert not store.exists(f"s3://{bucket}-later/out.tar")


def test_importing_the_package_is_light() -> None:
    script = (
        "import data_pipeline, data_pipeline.config, sys; assert not {'torch', 'webdataset', 's3fs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
