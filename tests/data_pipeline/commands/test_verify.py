"""`cascade verify`: every kind of damage, the quarantine file, the page."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.commands import index
from data_pipeline.commands.verify import main
from data_pipeline.common.errors import CascadeError, DataError
from data_pipeline.config import CaptionConfig, DataConfig, FilterConfig
from data_pipeline.reading.loader import Loader
from data_pipeline.shards.index import cached_index_url, index_shard, index_url, save_index
from data_pipeline.storage import store
from tests.data_pipeline.damage import BAD, CASES, bad, good, tar
from tests.data_pipeline.photos import jpegs
from tests.data_pipeline.verifying import Config

JPG = jpegs()[0]


def verify(folder: Path, **options: Any) -> dict[str, Any]:
    return main(Config(folder / "*.tar", folder.parent / "out", **options))


def quarantine(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.parent / "out" / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "shards"
    place.mkdir()
    return place


@pytest.mark.parametrize("command", [main, index.main])
def test_shards_are_not_blamed_for_the_limit_of_open_files(
    command: Callable[[Any], dict[str, Any]], folder: Path
) -> None:
    for name in "ab":
        (folder / f"{name}.tar").write_bytes(tar(good(3)))
    config = Config(folder / "*.tar", folder.parent / "out")
    config.rebuild = True
    command(config)
    outcomes = set()
    for free in range(10):
        with few_open_files(free):
            try:
                result = command(config)
                outcomes.add(str([result.get("dropped"), result.get("problems", {})]))
            except CascadeError as error:
                assert "too many open files" in str(error).lower()
                outcomes.add("refused")
    assert outcomes == {"[{}, {}]", "refused"}


@contextmanager
def few_open_files(free: int) -> Iterator[None]:
    """Let this process open only `free` more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    held = []
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(free):
            os.close(held.pop())
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", CASES)
def test_every_damage_is_counted_and_costs_only_what_it_must(name: str, folder: Path) -> None:
    build, delivered, dropped, warnings = CASES[name]
    (folder / f"{name}.tar").write_bytes(build())
    result = verify(folder)
    assert (result["delivered"], result["dropped"], result["warnings"]) == (delivered, dropped, warnings)
    reasons = [line["reason"] for line in quarantine(folder)]
    assert sorted(reasons) == sorted([*dropped, *warnings])
    assert all(line["shard"].endswith(f"{name}.tar") for line in quarantine(folder))
    outside = {path.name for path in folder.parent.rglob("*") if path.is_file()}
    assert outside == {f"{name}.tar", "quarantine.jsonl"}, "nothing is written elsewhere"


def test_a_line_of_the_quarantine_file_leads_to_the_sample(folder: Path) -> None:
    data = CASES["image_truncated"][0]()
    (folder / "a.tar").write_bytes(data)
    verify(folder)
    (line,) = quarantine(folder)
    assert (line["key"], line["reason"]) == (BAD, "decode_error")
    assert data[line["offset"] : line["offset"] + 3] == b"\xff\xd8\xff"


def test_the_last_line_of_the_output_is_the_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.tar").write_bytes(tar([*good(), bad(jpg=None)]))
    config = Config(folder / "*.tar", folder.parent / "out")
    config.json = False
    result = main(config)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["delivered"] == 4 and result["dropped"] == {"missing_image": 1}


def test_filters_count_but_do_not_fill_the_quarantine_file(folder: Path) -> None:
    (folder / "a.tar").write_bytes(tar([*good(), bad()]))
    result = verify(folder, filter=FilterConfig(min_side=10_000))
    assert result["delivered"] == 0 and result["dropped"] == {"too_small": 5}
    assert quarantine(folder) == []


def test_samples_that_were_written_but_are_gone_are_reported(folder: Path) -> None:
    """A tar that ends at a member's header looks complete except for its missing end marks."""
    data = tar([*good(), bad()])
    (folder / "a.tar").write_bytes(data)
    last = index_shard(str(folder / "a.tar")).parts(4)[0].offset - 512
    (folder / "a.tar").write_bytes(data[:last])
    (folder / "a_stats.json").write_text(json.dumps({"successes": 7}))
    result = verify(folder)
    assert (result["delivered"], result["dropped"]) == (4, {"count_mismatch": 3})
    assert {line["reason"]: line["detail"] for line in quarantine(folder)}["count_mismatch"] == (
        "4 samples where 7 were written"
    )
    (folder / "a_stats.json").write_text(json.dumps({"successes": 3}))
    result = verify(folder)
    assert result["dropped"] == {} and result["warnings"]["count_mismatch"] == 1


@pytest.mark.parametrize("beside", [True, False])
def test_a_flipped_byte_is_caught_by_the_stored_index(folder: Path, tmp_path: Path, beside: bool) -> None:
    shard, index_dir = folder / "a.tar", tmp_path / "indexes"
    shard.write_bytes(tar([*good(), bad()]))
    index = index_shard(str(shard))
    save_index(index, index_url(str(shard)) if beside else cached_index_url(str(shard), str(index_dir)))
    picture = index.parts(2)[0]
    data = bytearray(shard.read_bytes())
    data[picture.offset + picture.size - 30] ^= 1
    shard.write_bytes(data)
    result = verify(folder, index_dir=str(index_dir))
    assert result["dropped"] == {"checksum": 1}
    assert quarantine(folder)[0]["key"] == good()[2][0]


def test_a_compressed_shard_is_read_in_one_pass(folder: Path) -> None:
    (folder / "a.tar").write_bytes(CASES["tar_gzip"][0]())
    (folder / "b.tar").write_bytes(CASES["image_truncated"][0]())
    result = verify(folder, threads=1)
    assert result["delivered"] == 9 and result["shards"] == 2


def test_random_damage_never_stops_it(folder: Path) -> None:
    whole = tar([*good(), bad()])
    source = random.Random(7)
    for number in range(40):
        data = bytearray(whole)
        for _ in range(source.choice((1, 5, 50))):
            start, size = source.randrange(len(data)), source.choice((1, 40, 3000))
            data[start : start + size] = source.randbytes(size if number % 8 else source.choice((0, 1, 40)))
        (folder / f"{number:03d}.tar").write_bytes(
            bytes(data[: source.randrange(len(data))] if number % 4 == 0 else data)
        )
    result = verify(folder)
    assert 60 < result["delivered"] < 200
    assert sum(result["dropped"].values()) > 20


def test_the_page_is_self_contained_and_escapes_everything(folder: Path) -> None:
    (folder / "a.tar").write_bytes(tar([*good(), bad(txt=b"a <script>alert(1)</script> & more", json=b"{}")]))
    (folder / "b.tar").write_bytes(tar([("<b>key</b>", {**bad()[1], "jpg": b"x"})]))
    result = verify(folder, report=True, captions=DataConfig().captions)
    page = Path(result["report"]).read_text()
    assert page.count("data:image/jpeg;base64,") == 5
    assert "alert(1)" in page and "<script" not in page and "&lt;b&gt;key" in page
    assert not re.search(r"(?:src|href)=['\"]?(?:http|//)", page), "nothing is fetched"
    for words in ("decode_error", "Shorter side", "Caption length", "samples that training can use"):
        assert words in page


def test_the_contact_sheet_and_the_memory_of_the_tally_stay_bounded(folder: Path) -> None:
    for number in range(20):
        (folder / f"{number}.tar").write_bytes(tar([(f"{number}-{key}", members) for key, members in good()]))
    result = verify(folder, report=True)
    assert result["delivered"] == 80
    assert Path(result["report"]).read_text().count("data:image/jpeg") == 48


def test_from_and_into_a_bucket(folder: Path, bucket: str) -> None:
    (folder / "a.tar").write_bytes(CASES["image_truncated"][0]())
    local = verify(folder, report=True)
    store.write_bytes(f"s3://{bucket}/in/a.tar", (folder / "a.tar").read_bytes())
    config = Config(f"s3://{bucket}/in/*.tar", folder, report=True)
    config.output = f"s3://{bucket}/out"
    result = main(config)
    assert {name: result[name] for name in ("delivered", "dropped")} == {
        name: local[name] for name in ("delivered", "dropped")
    }
    (line,) = store.read_bytes(result["quarantine"]).splitlines()
    assert json.loads(line)["shard"] == f"s3://{bucket}/in/a.tar"
    assert store.read_bytes(f"s3://{bucket}/out/report.html").count(b"data:image/jpeg") == local["delivered"]
    assert store.list_dir(f"s3://{bucket}") == ["in", "out"] and store.list_dir(f"s3://{bucket}/in") == ["a.tar"]


def test_shards_that_do_not_exist_are_reported_in_one_sentence(folder: Path) -> None:
    with pytest.raises(DataError, match="shards"):
        verify(folder)


def test_an_enormous_json_does_not_cost_a_sample_with_a_caption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("commands.verify", "reading.rows", "shards.samples"):
        monkeypatch.setattr(f"data_pipeline.{module}.MAX_TEXT", 200_000)
    (folder / "a.tar").write_bytes(tar([*good(), bad(json=b'{"a": "' + b"x" * 300_000 + b'"}')]))
    assert verify(folder)["delivered"] == 5
    loader = Loader(DataConfig(shards=str(folder / "a.tar"), global_batch=5), image_size=16)
    next(loader)
    assert loader.counters["bad"] == 0
    loader.close()


@pytest.mark.parametrize("indexed_before", [False, True])
def test_a_picture_file_larger_than_the_limit_is_dropped_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, indexed_before: bool
) -> None:
    (folder / "a.tar.gz").write_bytes(
        gzip.compress(tar([*good(), ("big", {"jpg": JPG + bytes(300_000), "txt": b"x"})]))
    )
    config = DataConfig(shards=str(folder / "a.tar.gz"), global_batch=6, lanes=1, max_bad_share=1)
    if indexed_before:  # by a version without the limit
        Loader(config, image_size=16).close()
    for module in ("reading.sequential", "reading.rows", "shards.samples"):
        monkeypatch.setattr(f"data_pipeline.{module}.MAX_MEMBER", 200_000)
    assert main(Config(folder / "*.tar.gz", folder.parent / "out"))["dropped"] == {"too_large": 1}
    loader = Loader(config, image_size=16)
    next(loader)
    assert loader.counters.get("bad_too_large", 0) == int(indexed_before)
    assert loader.dataset.dropped == ({} if indexed_before else {"too_large": 1})
    loader.close()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": {"jpg": JPG, "cls": b"7"}, "b": {"jpg": JPG, "cls": b"8"}}, r"data\.members=\{caption: \[cls\]\}"),
        ({"images/a": {"jpg": JPG}, "captions/a": {"txt": b"one"}}, "prepare.kind=folder also pairs"),
    ],
)
def test_the_setting_that_would_use_the_members_is_named(
    folder: Path, files: dict[str, dict[str, bytes]], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "a.tar").write_bytes(tar(list(files.items())))
    verify(folder)
    assert re.search(words, caplog.text)


@pytest.mark.parametrize(
    ("captions", "source", "used"),
    [
        (["0.txt", "1.txt"], "member:1.txt", "1.txt"),
        (["txt", "en.txt", "de.txt"], "member:DE.txt", "de.txt"),
        (["short.txt", "long.txt"], "member:*.txt", "long.txt"),
        (["txt", "caption"], "member:.caption", "caption"),
        (["json", "blip.json"], "member:blip.json", "blip.json"),
    ],
)
def test_further_captions_are_named_and_can_be_used(
    folder: Path, captions: list[str], source: str, used: str, caplog: pytest.LogCaptureFixture
) -> None:
    texts = {name: json.dumps({"caption": name}).encode() if "json" in name else name.encode() for name in captions}
    (folder / "a.tar").write_bytes(tar([(str(number), {"jpg": JPG, **texts}) for number in range(2)]))
    assert verify(folder)["warnings"] == {"unused_caption": 2 * (len(captions) - 1)}
    data = DataConfig(shards=str(folder / "a.tar"), global_batch=2, own_process=False)
    for sources, text in (({}, captions[0]), ({source: 1.0}, used)):
        caplog.clear()
        data.captions = CaptionConfig(sources=sources)
        loader = Loader(data, image_size=16)
        assert next(loader)[0].captions == [text] * 2
        loader.close()
        assert (f'"member:{used}": 1' in caplog.text) == (not sources)
    assert verify(folder, captions=data.captions)["captions.sources"] == {source: 2}
