"""`cascade caption` with a tiny random vision-language model, from shards to the captions that training chooses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.config import CaptionConfig, DataConfig
from data_pipeline.reading.loader import Loader
from data_pipeline.shards.caption_files import read_captions, write_captions
from data_pipeline.storage import store
from tests.data_pipeline.photos import copy_shards, samples
from tests.training.text.tiny_vlm import tiny_vlm
from training.commands import embed
from training.commands.caption import main
from training.config.commands import CaptionCommand, EmbedCommand, VlmConfig
from training.config.experiment import TextConfig
from training.text.captioner import Captioner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_vlm(tmp_path_factory.mktemp("a model"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(copy_shards(tmp_path_factory.mktemp("photos") / "with blank"))


def command(model: str | None, shards: str, output: str, **settings: Any) -> CaptionCommand:
    vlm = VlmConfig(path=model, prompt="describe the picture", max_tokens=6, side=24, dtype="fp32")
    return CaptionCommand(data=DataConfig(shards=shards), vlm=vlm, output=output, batch=3, **settings)


@pytest.fixture(scope="module")
def written(model: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("captions") / "vlm")
    done = main(command(model, shards, output))
    assert (done["shards"], done["kept"], done["bad"]) == (2, 0, 0)
    assert done["captions"] == sum(len(samples(number)) for number in (0, 1))
    return output


def test_each_picture_has_its_caption_and_the_file_says_what_wrote_it(written: str, model: str) -> None:
    captions, facts = read_captions(f"{written}/00000.captions.parquet")
    assert set(captions) == set(samples(0)) and all(len(texts) == 1 for texts in captions.values())
    assert len({texts[0] for texts in captions.values()}) > 1, "the answers depend on the pictures"
    assert not any(texts[0].split()[0] == "describe" and len(texts[0].split()) > 6 for texts in captions.values())
    assert facts["prompt"] == "describe the picture" and len(facts["sha"]) == 16 and facts["side"] == 24
    assert facts["shard"] == "00000.tar" and facts["transformers"] and facts["model"] == Path(model).name


def test_the_same_command_continues_and_another_is_refused(
    written: str, model: str, shards: str, tmp_path: Path
) -> None:
    kept = main(command(model, shards, written))
    assert (kept["kept"], kept["captions"]) == (2, 0)
    other = command(model, shards, written)
    other.vlm.prompt = "the picture"
    with pytest.raises(DataError, match=r"00000.captions.parquet: it was made with a different vlm.prompt; remove it"):
        main(other)
    parts = [main(command(model, shards, str(tmp_path), part=part, parts=2)) for part in (0, 1)]
    assert [part["shards"] for part in parts] == [1, 1]
    assert (
        read_captions(f"{tmp_path}/00001.captions.parquet")[0] == read_captions(f"{written}/00001.captions.parquet")[0]
    )


def test_captions_of_other_settings_or_another_part_are_not_mixed_in_silently(
    written: str, model: str, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = command(model, shards, written)
    other.data.filter.min_side, other.data.background = 8, 0
    with pytest.raises(DataError, match=r"with a different data\.filter and data\.background; remove it"):
        main(other)
    (tmp_path / "00000.captions.parquet").write_bytes(Path(f"{written}/00000.captions.parquet").read_bytes())
    other = command(model, shards, str(tmp_path), part=1, parts=2)  # whose own file is missing
    other.vlm.prompt = "the picture"
    with pytest.raises(DataError, match=r"00000.captions.parquet: it was made with a different vlm\.prompt"):
        main(other)
    captions, facts = read_captions(f"{written}/00001.captions.parquet")
    rows = [(key, text) for key, texts in captions.items() for text in texts]
    write_captions(f"{tmp_path}/00001.captions.parquet", rows, {**facts, "prompt": "what?"})
    settings = CaptionConfig(sources={"file:vlm": 1}, files={"vlm": str(tmp_path)})
    loader = Loader(DataConfig(shards=shards, global_batch=8, captions=settings), image_size=16)
    for _ in range(4):
        next(loader)
    loader.close()
    assert caplog.text.count("were made by different models, prompts or settings") == 1


def test_without_a_chat_template_the_prompt_is_used_unchanged(model: str, tmp_path: Path) -> None:
    plain = Captioner(tiny_vlm(tmp_path, template=False), "<image> describe the picture", max_tokens=6, dtype="fp32")
    pictures = [Image.new("RGB", (24, 30), (40 * n, 255 - 40 * n, 90)) for n in range(5)]
    together = plain.describe(pictures)
    assert together == [plain.describe([picture])[0] for picture in pictures], "others in the batch change nothing"
    assert Captioner(model, "describe", max_tokens=6, dtype="fp32").sha == Captioner(model, "the", dtype="fp32").sha


def test_over_s3(written: str, model: str, shards: str, bucket: str) -> None:
    for path in Path(shards).iterdir():
        store.write_bytes(f"s3://{bucket}/in/{path.name}", path.read_bytes())
    main(command(model, f"s3://{bucket}/in", f"s3://{bucket}/out"))
    assert read_captions(f"s3://{bucket}/out/00000.captions.parquet") == read_captions(
        f"{written}/00000.captions.parquet"
    )


def test_training_mixes_the_captions_with_the_others_and_embeds_both(written: str, shards: str, tmp_path: Path) -> None:
    captions = CaptionConfig(sources={"txt": 1, "file:vlm": 3}, files={"vlm": written})
    data = DataConfig(shards=shards, global_batch=8, captions=captions)
    text = TextConfig(dim=32, max_tokens=16)
    embedded = embed.main(EmbedCommand(data=data, text=text, output=str(tmp_path / "text")))
    assert embedded["captions"] > sum(len(samples(number)) for number in (0, 1))
    data.embeddings = str(tmp_path / "text")
    loader = Loader(data, image_size=16)
    files = [read_captions(f"{written}/0000{number}.captions.parquet")[0] for number in (0, 1)]
    known = {text for one in files for texts in one.values() for text in texts}
    batches = [next(loader)[0] for _ in range(8)]
    loader.close()
    assert 32 < loader.sources["file:vlm"] < 60 and loader.sources.total() == 64
    assert Counter(c in known for batch in batches for c in batch.captions)[True] == loader.sources["file:vlm"]
    assert all(batch.embeddings is not None for batch in batches)


def test_captions_that_do_not_fit_are_refused(written: str, shards: str, tmp_path: Path) -> None:
    def opened(folder: str) -> Loader:
        captions = CaptionConfig(sources={"file:vlm": 1}, files={"vlm": folder})
        return Loader(DataConfig(shards=shards, global_batch=8, captions=captions), image_size=16)

    with pytest.raises(DataError, match=r"data.captions.files: vlm=.*no 00000.captions.*for .*`cascade caption`"):
        opened(str(tmp_path))
    for number in (0, 1):
        content = Path(f"{written}/0000{1 - number}.captions.parquet").read_bytes()
        (tmp_path / f"0000{number}.captions.parquet").write_bytes(content)
    loader = opened(str(tmp_path))
    with pytest.raises(DataError, match=r"it was made from different contents of .*00000.tar|.*00001.tar"):
        next(loader)
    (tmp_path / "00000.captions.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "00001.captions.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a complete file of captions"):
        next(opened(str(tmp_path)))


def test_mistakes_are_reported_before_anything_is_loaded(model: str, shards: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vlm.path: it is not set"):
        main(command(None, shards, "out"))
    with pytest.raises(DataError, match=r"vlm.path=/none: there is no model; .*hf download"):
        main(command("/none", shards, str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be loaded as a vision-language model with its processor"):
        Captioner(str(tmp_path), "what?")
    for sources, message in (
        ({"file:vlm": 1.0}, "data.captions.files has no 'vlm'"),
        ({"lines": 1.0}, "is not a source; use txt, txt:lines, json:FIELD, member:NAME"),
    ):
        with pytest.raises(ConfigError, match=message):
            CaptionConfig(sources=sources)
    with pytest.raises(ConfigError, match="vlm is not used; add file:vlm"):
        CaptionConfig(files={"vlm": "x"})
