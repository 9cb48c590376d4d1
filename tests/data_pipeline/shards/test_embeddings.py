"""Sidecar files with text embeddings: format, precision, joins and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.common.errors import BadSample, ConfigError, DataError
from data_pipeline.config import DataConfig
from data_pipeline.content.captions import candidates
from data_pipeline.reading.loader import Loader
from data_pipeline.shards.embeddings import (
    Embeddings,
    Sidecar,
    SidecarWriter,
    from_bf16,
    pad,
    sidecar_url,
    to_bf16,
    to_int8,
)
from data_pipeline.shards.index import index_shard
from tests.data_pipeline.photos import copy_shards, samples

ENCODER = {"kind": "words", "weights": "abc", "dim": 8}


def rows(count: int, dim: int = 8) -> list[np.ndarray]:
    source = np.random.default_rng(0)
    return [source.normal(size=(source.integers(1, 6), dim)).astype(np.float32) for _ in range(count)]


def write(url: Path | str, values: list[np.ndarray], dtype: str = "bf16", digest: str = "d", dim: int = 8) -> None:
    writer = SidecarWriter(str(url), {"encoder": ENCODER, "digest": digest}, dim, dtype)
    for number, value in enumerate(values):
        writer.add(f"key{number}", f"caption {number}", value)
    writer.close()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**120, min_value=-(2.0**120)))
def test_bf16_is_the_nearest_value(value: float) -> None:
    import torch

    bits = to_bf16(np.array([value], np.float32))
    assert from_bf16(bits)[0] == torch.tensor([value]).to(torch.bfloat16).float()[0].item()


def test_int8_is_exact_to_half_a_step_of_the_token() -> None:
    values = rows(1, 64)[0]
    integers, scales = to_int8(values)
    assert integers.dtype == np.int8
    assert np.all(np.abs(integers * scales[:, None] - values) <= scales[:, None] * 0.501)
    assert np.all(to_int8(np.zeros((2, 4), np.float32))[0] == 0)


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 2**-8), ("int8", 0.02)])
def test_embeddings_of_different_lengths_survive_a_round_trip(tmp_path: Path, dtype: str, error: float) -> None:
    values = rows(20)
    write(tmp_path / "a.embeddings.safetensors", values, dtype)
    sidecar = Sidecar(str(tmp_path / "a.embeddings.safetensors"))
    assert len(sidecar) == 20 and sidecar.facts["encoder"] == ENCODER
    for number in reversed(range(20)):
        tokens = sidecar.tokens(f"key{number}", f"caption {number}")
        assert tokens.shape == values[number].shape and tokens.dtype == np.float32
        assert np.abs(tokens - values[number]).max() <= error * max(1, np.abs(values[number]).max())


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_flipped_byte_makes_its_sample_bad_and_a_cut_file_is_refused(tmp_path: Path, dtype: str) -> None:
    place = tmp_path / "a.embeddings.safetensors"
    write(place, rows(5), dtype)
    whole = place.read_bytes()
    place.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    sidecar = Sidecar(str(place))
    assert len(sidecar.tokens("key3", "caption 3"))
    with pytest.raises(BadSample, match="is damaged"):
        sidecar.tokens("key4", "caption 4")
    place.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"its header says .*; remove it and run `cascade embed` again"):
        Sidecar(str(place))


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    values = rows(3)
    write(tmp_path / "a.safetensors", values)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {"tokens", "starts", "keys", "captions", "checksums"}
        tokens = file.get_tensor("tokens").float().numpy()
        assert np.abs(tokens - np.concatenate(values)).max() < 0.02
        assert file.get_tensor("starts").tolist() == [0, *np.cumsum([len(v) for v in values]).tolist()]


def test_an_empty_shard_gives_an_empty_sidecar(tmp_path: Path) -> None:
    for dtype in ("bf16", "int8"):
        write(tmp_path / dtype, [], dtype)
        assert len(Sidecar(str(tmp_path / dtype))) == 0


def test_the_same_input_gives_the_same_bytes_and_leaves_no_other_file(tmp_path: Path) -> None:
    write(tmp_path / "a", rows(4), "int8")
    write(tmp_path / "b", rows(4), "int8")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", b"x" * 500, b"\xff" * 8 + b"{"])
def test_other_files_are_refused_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=r"not a complete file of embeddings .* run `cascade embed` again"):
        Sidecar(str(tmp_path / "a"))


def test_a_sidecar_of_another_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", rows(2))
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data.replace(b'\\"version\\": 2', b'\\"version\\": 9'))
    with pytest.raises(DataError, match="version 9"):
        Sidecar(str(tmp_path / "a"))


# --------------------------------------------------------------------------------------------------------- joins


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00000", "00001"):
        write(sidecar_url(f"/data/{name}.tar", str(tmp_path)), rows(5), digest=f"digest {name}")
    return tmp_path


SHARDS = {"/data/00000.tar": "digest 00000", "/data/00001.tar": "digest 00001"}


def test_samples_are_joined_by_shard_key_and_caption(folder: Path) -> None:
    embeddings = Embeddings([str(folder)], SHARDS)
    embeddings.check(ENCODER)
    found = embeddings.lookup("/data/00001.tar", "key3", "caption 3")
    assert np.abs(found - rows(5)[3]).max() < 0.02


def test_a_shard_without_sidecar_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no 00002.embeddings.safetensors for /data/00002.tar; run `cascade embed`"):
        Embeddings([str(folder)], {**SHARDS, "/data/00002.tar": "x"})


@pytest.mark.parametrize(
    ("key", "caption", "words"),
    [("key9", "caption 9", "sample 'key9'"), ("key3", "caption 4", "caption 'caption 4' of sample 'key3'")],
)
def test_a_sample_or_caption_that_was_not_embedded_is_refused(folder: Path, key: str, caption: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Embeddings([str(folder)], SHARDS).lookup("/data/00000.tar", key, caption)


def test_a_shard_that_changed_is_refused(folder: Path) -> None:
    embeddings = Embeddings([str(folder)], {**SHARDS, "/data/00001.tar": "new"})
    embeddings.lookup("/data/00000.tar", "key0", "caption 0")
    with pytest.raises(DataError, match="made from different contents"):
        embeddings.lookup("/data/00001.tar", "key0", "caption 0")


def test_another_encoder_is_refused_with_what_differs(folder: Path) -> None:
    with pytest.raises(ConfigError, match="weights abc, the run's is xyz"):
        Embeddings([str(folder)], SHARDS).check({**ENCODER, "weights": "xyz"})


def test_shards_of_the_same_name_find_their_own_sidecar_among_several_folders(tmp_path: Path) -> None:
    shards = {"/a/00000.tar": "digest a", "/b/00000.tar": "digest b"}
    for number, shard in enumerate(shards):
        write(sidecar_url(shard, str(tmp_path / shard[1])), rows(5)[number:], digest=shards[shard])
    embeddings = Embeddings([str(tmp_path / "a"), str(tmp_path / "b")], shards)
    found = embeddings.lookup("/b/00000.tar", "key0", "caption 0")
    assert np.abs(found - rows(5)[1]).max() < 0.02


def test_padding_marks_the_true_tokens() -> None:
    text, mask = pad([np.ones((2, 4), np.float32), np.ones((9, 4), np.float32)], 5)
    assert text.shape == (2, 5, 4) and mask.sum(axis=1).tolist() == [2, 5]
    assert text[0, 2:].sum() == 0


def test_sidecars_are_next_to_the_shard_or_in_a_folder() -> None:
    assert sidecar_url("s3://b/d/0.tar") == "s3://b/d/0.embeddings.safetensors"
    assert sidecar_url("d/0.tar", "s3://b/e") == "s3://b/e/0.embeddings.safetensors"


# -------------------------------------------------------------------------------------------------- in the loader


def test_the_loader_joins_embeddings_to_its_batches(tmp_path: Path) -> None:
    shards = copy_shards(tmp_path / "shards")
    config = DataConfig(shards=str(shards), global_batch=4, embeddings=str(tmp_path / "text"), threads=1)
    config.captions.sources = {"txt": 1.0, "json:captions": 3.0}
    vectors: dict[str, np.ndarray] = {}
    for number, path in enumerate(sorted(shards.glob("*.tar"))):
        writer = SidecarWriter(
            sidecar_url(str(path), str(tmp_path / "text")), {"digest": index_shard(str(path)).digest}, 8
        )
        for key, sample in samples(number).items():
            for caption in candidates(sample, config.captions):
                vectors[caption] = np.random.default_rng(len(vectors)).normal(size=(len(caption.split()), 8))
                writer.add(key, caption, vectors[caption])
        writer.close()
    loader = Loader(config, image_size=16)
    seen = set()
    for _ in range(6):
        (batch,) = next(loader)
        assert batch.embeddings is not None
        for caption, found in zip(batch.captions, batch.embeddings, strict=True):
            assert found.shape == vectors[caption].shape
            assert np.abs(found - vectors[caption]).max() < 0.03
            seen.add(caption)
    loader.close()
    assert len(seen) > 12, "several captions per picture were met"


def test_the_loader_refuses_to_start_without_embeddings(tmp_path: Path) -> None:
    shards = copy_shards(tmp_path / "shards")
    (tmp_path / "text").mkdir()
    with pytest.raises(DataError, match="run `cascade embed`"):
        Loader(DataConfig(shards=str(shards), global_batch=4, embeddings=str(tmp_path / "text")), image_size=16)


def test_the_loader_stops_at_a_caption_that_was_not_embedded(tmp_path: Path) -> None:
    shards = copy_shards(tmp_path / "shards")
    for path in sorted(shards.glob("*.tar")):
        SidecarWriter(sidecar_url(str(path)), {"digest": index_shard(str(path)).digest}, 8).close()
    loader = Loader(DataConfig(shards=str(shards), global_batch=4, embeddings=str(shards)), image_size=16)
    with pytest.raises(DataError, match="it does not hold sample"):
        next(loader)
    loader.close()
