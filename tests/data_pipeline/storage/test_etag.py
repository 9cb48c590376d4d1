"""ETags as stores and uploaders compute them: an MD5, or an MD5 of the MD5s of the parts."""

from __future__ import annotations

import hashlib
import random

import pytest

from data_pipeline.storage.etag import EtagCheck

MIB = 1 << 20


def etag_of(data: bytes, part: int) -> str:
    parts = [hashlib.md5(data[at : at + part]).digest() for at in range(0, len(data), part)]
    return f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def confirmed(data: bytes, etag: str) -> bool:
    check = EtagCheck(etag, len(data))
    for at in range(0, len(data), 700_001):
        check.update(data[at : at + 700_001])
    return check.confirmed()


@pytest.mark.parametrize("size", [1, MIB, 5 * MIB, 5 * MIB + 1, 16 * MIB, 17 * MIB - 1])
def test_an_etag_confirms_these_bytes_and_no_others(size: int) -> None:
    data = random.Random(size).randbytes(size)
    other = bytes([data[0] ^ 1]) + data[1:]
    for etag in (hashlib.md5(data).hexdigest(), *(etag_of(data, part * MIB) for part in (5, 8, 16))):
        assert confirmed(data, etag) and not confirmed(other, etag)


def test_an_empty_object_has_the_md5_of_nothing() -> None:
    assert confirmed(b"", hashlib.md5(b"").hexdigest())


@pytest.mark.parametrize("etag", ["", "0x8D", etag_of(b"x", 1) + "0", '"' + hashlib.md5(b"x").hexdigest() + '"'])
def test_an_etag_of_another_form_confirms_nothing(etag: str) -> None:
    assert not confirmed(b"x", etag)
