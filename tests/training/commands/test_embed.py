"""`cascade embed` writes exactly what encoding during training would give."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.config import CaptionConfig, DataConfig
from data_pipeline.content.captions import candidates, choose_caption
from data_pipeline.reading.loader import Loader
from data_pipeline.shards.caption_files import caption_file_url, write_captions
from data_pipeline.shards.embeddings import Embeddings, pad
from data_pipeline.shards.index import index_shard, load_index
from data_pipeline.storage import store
from tests.data_pipeline.photos import copy_shards, samples
from tests.training import forks
from tests.training.text.tiny_models import tiny_model
from tests.training.text.tiny_t5 import tiny_t5
from training.commands.embed import main
from training.config.commands import EmbedCommand
from training.config.experiment import TextConfig
from training.text.encoder import build_text_encoder
from training.text.identity import identity

SOURCES = {"txt": 1.0, "json:captions": 1.0}
WORDS = TextConfig(dim=32, max_tokens=16)


def config(shards: Path, text: TextConfig = WORDS, **values: Any) -> EmbedCommand:
    data = DataConfig(shards=str(shards), captions=CaptionConfig(sources=SOURCES))
    return EmbedCommand(data=data, text=text, **values)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    path = tiny_t5(tmp_path_factory.mktemp("t5"))
    width = json.loads((Path(path) / "config.json").read_text())["d_model"]
    return TextConfig(kind="t5", path=path, dim=width, max_tokens=16)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return copy_shards(tmp_path / "shards")


def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def joined(folder: Path, shards: Path) -> Embeddings:
    digests = {}
    for path in sorted(shards.glob("*.tar")):
        index = load_index(str(path))
        assert index is not None
        digests[str(path)] = index.digest
    return Embeddings([str(folder)], digests)


@pytest.mark.parametrize("kind", ["words", "t5", "hidden"])
@pytest.mark.parametrize(("dtype", "error"), [("bf16", 0.01), ("int8", 0.02)])
def test_embeddings_are_those_of_encoding_while_training(
    kind: str, dtype: str, error: float, shards: Path, t5: TextConfig, tmp_path: Path
) -> None:
    text = WORDS if kind == "words" else t5
    if kind == "hidden":
        place = tiny_model("gemma2", tmp_path / "gemma")
        text = TextConfig(kind="hidden", path=place, dim=16, max_tokens=16, layer=-2, prefix="describe the picture : ")
    settings = config(shards, text, dtype=dtype, batch=3)
    done = main(settings)
    assert done["shards"] == 2 and done["captions"] == sum(
        len(candidates(s, settings.data.captions)) for n in (0, 1) for s in samples(n).values()
    )
    embeddings = joined(shards, shards)
    embeddings.check(identity(text))
    encoder = build_text_encoder(text)
    for number, path in enumerate(sorted(shards.glob("*.tar"))):
        for position, (key, sample) in enumerate(samples(number).items()):
            caption = choose_caption(sample, settings.data.captions, 0, position).text
            stored, mask = pad([embeddings.lookup(str(path), key, caption)], text.max_tokens)
            expected, expected_mask = encoder.encode([caption])
            assert np.array_equal(mask, expected_mask.numpy())
            assert np.abs(stored - expected.numpy()).max() <= error * expected.abs().max().item()


def test_finished_sidecars_stay_and_missing_ones_are_made(shards: Path, tmp_path: Path) -> None:
    settings = config(shards, output=str(tmp_path / "out"))
    first = main(settings)
    assert first["kept"] == 0
    kept, lost = sorted((tmp_path / "out").glob("*"))
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    dead, alive, other = (
        tmp_path / "out" / f".{name}.{process}-1.tmp"
        for name, process in ((lost.name, gone()), (lost.name, os.getpid()), ("x", gone()))
    )
    for left in (dead, alive, other):
        left.touch()
    again = main(settings)
    assert (dead.exists(), alive.exists(), other.exists()) == (False, True, True), "left by a killed process"
    assert again["kept"] == 1 and again["captions"] < first["captions"]
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content


def test_on_s3_the_same_sidecars_are_written_and_joined(shards: Path, tmp_path: Path, bucket: str) -> None:
    for path in sorted(shards.glob("*.tar")):
        store.write_bytes(f"s3://{bucket}/in/{path.name}", path.read_bytes())
    there, text = f"s3://{bucket}/in/{{00000..00001}}.tar", f"s3://{bucket}/text"
    settings = config(shards, output=text)
    settings.data.shards = there
    done = main(settings)
    assert main(settings) == {"shards": 2, "captions": 0, "kept": 2, "bytes": 0}
    main(config(shards, output=str(tmp_path / "out")))
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name: store.read_bytes(f"{text}/{name}") for name in store.list_dir(text)} == local
    assert done["bytes"] == sum(map(len, local.values()))
    data = DataConfig(shards=there, global_batch=4, embeddings=text, captions=settings.data.captions)
    loader = Loader(data, image_size=16)
    assert loader.embeddings is not None
    loader.embeddings.check(identity(WORDS))
    (batch,) = next(loader)
    loader.close()
    assert batch.embeddings is not None
    expected, mask = build_text_encoder(WORDS).encode(batch.captions)
    for row, tokens in enumerate(batch.embeddings):
        assert np.abs(tokens - expected[row][mask[row]].numpy()).max() < 0.01


def test_processes_of_one_machine_share_the_shards(shards: Path, tmp_path: Path) -> None:
    alone = main(config(shards, output=str(tmp_path / "alone")))
    words = ["embed", f"data.shards={shards}", f"output={tmp_path}/two", "cluster.processes=2", "json=true"]
    words += ["text.dim=32", "text.max_tokens=16", 'data.captions.sources={"txt":1.0,"json:captions":1.0}']
    done = forks.command(*words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == alone
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_parts_share_the_shards(shards: Path) -> None:
    done = [main(config(shards, part=part, parts=3)) for part in range(3)]
    assert [one["shards"] for one in done] == [1, 1, 0]
    joined(shards, shards)


def test_embeddings_of_other_captions_are_not_kept_silently(shards: Path) -> None:
    main(config(shards))
    settings = config(shards)
    settings.data.captions = CaptionConfig(sources={"txt": 1.0})
    with pytest.raises(DataError, match=r"made with a different data\.captions\.sources; remove it"):
        main(settings)


def test_rewritten_captions_are_embedded_again(shards: Path, tmp_path: Path) -> None:
    def recaption(words: str) -> None:
        for path in sorted(shards.glob("*.tar")):
            index = load_index(str(path)) or index_shard(str(path))
            rows = [(index.key(row), f"{words} {row}") for row in range(len(index))]
            write_captions(caption_file_url(str(path), str(tmp_path / "vlm")), rows, {"digest": index.digest})

    settings = config(shards, output=str(tmp_path / "out"))
    settings.data.captions = CaptionConfig(sources={"file:vlm": 1.0}, files={"vlm": str(tmp_path / "vlm")})
    recaption("a picture")
    assert main(settings)["kept"] == 0 and main(settings)["kept"] == 2
    recaption("something else")
    with pytest.raises(DataError, match=r"with a different data\.captions\.files; remove it"):
        main(settings)


def test_a_process_without_sidecars_of_its_own_adds_no_second_kind(shards: Path, tmp_path: Path) -> None:
    main(config(shards, output=str(tmp_path), part=0, parts=2))
    with pytest.raises(DataError, match=r"00000.*with a different dtype; remove it or choose another output"):
        main(config(shards, output=str(tmp_path), part=1, parts=2, dtype="int8"))
    assert main(config(shards, output=str(tmp_path), part=1, parts=2))["captions"]


def test_sidecars_of_other_settings_are_never_overwritten(shards: Path) -> None:
    main(config(shards))
    with pytest.raises(DataError, match="a different text encoder and dtype"):
        main(config(shards, TextConfig(dim=16, max_tokens=16), dtype="int8"))


def test_two_shards_of_one_name_cannot_share_an_output(shards: Path, tmp_path: Path) -> None:
    copy_shards(tmp_path / "more")
    settings = config(shards, output=str(tmp_path / "out"))
    settings.data.shards = [str(shards), str(tmp_path / "more")]
    with pytest.raises(DataError, match="would write the same sidecar"):
        main(settings)


def test_a_part_beyond_the_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match="part=3"):
        EmbedCommand(part=3, parts=3)


def test_an_encoder_is_identified_by_its_files_not_by_its_path(t5: TextConfig, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(str(t5.path), tmp_path / "elsewhere"))
    there = TextConfig(kind="t5", path=str(copy), dim=t5.dim, max_tokens=16)
    assert identity(there) == identity(t5)
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = identity(there)
    assert changed["weights"] != identity(t5)["weights"] and changed["tokenizer"] == identity(t5)["tokenizer"]
    assert identity(TextConfig(kind="t5", path=t5.path, dim=t5.dim, max_tokens=8)) != identity(t5)
