"""`cascade prepare`: drawings, folders, tables, repacked shards; repeated commands, dropped samples."""

from __future__ import annotations

import csv
import gzip
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.commands.prepare import _finish, main
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.config import DataConfig, DrawConfig, PrepareConfig
from data_pipeline.content.images import decode
from data_pipeline.content.synthetic import caption, combinations, parse, render
from data_pipeline.storage import store
from tests.data_pipeline.commands.importing import Config, dropped, imported, members
from tests.data_pipeline.photos import SHARDS, copy_shards, jpegs, samples
from tests.s3 import S3Server


def drawn(output: Path, seed: int = 0, **values: Any) -> dict[str, Any]:
    shapes = DrawConfig(**{"count": 25, "heldout": 7, "size": 32, "samples_per_shard": 10, **values})
    return main(Config(PrepareConfig(output=str(output), draw=shapes), seed))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


# ------------------------------------------------------------------------------------------------------ drawings


def test_drawings_are_captioned_shapes_with_an_index(tmp_path: Path) -> None:
    result = drawn(tmp_path)
    assert (result["samples"], result["shards"], result["heldout"], result["heldout_shards"]) == (25, 3, 7, 1)
    assert sorted(path.name for path in (tmp_path / "train").glob("*.tar")) == [f"train-0000{i}.tar" for i in range(3)]
    assert len(list((tmp_path / "train").glob("*.index.parquet"))) == 3
    found = members(tmp_path / "train" / "train-00002.tar")
    assert list(found)[:3] == ["000000020.png", "000000020.txt", "000000020.json"]
    assert len(found) == 15
    spec = parse(found["000000020.txt"].decode())
    assert spec in combinations(False)
    picture = np.asarray(Image.open(io.BytesIO(found["000000020.png"])))
    assert picture.shape == (32, 32, 3)
    assert min(np.abs(picture.astype(int) - render(spec, 32, seed)).mean() for seed in range(30)) < 20
    facts = json.loads(found["000000020.json"])
    assert facts["caption"] == caption(spec) and facts["objects"][0]["colour"] == spec.objects[0].colour


def test_heldout_drawings_show_only_what_training_never_sees(tmp_path: Path) -> None:
    drawn(tmp_path, heldout=20, objects=2)
    for name, data in members(tmp_path / "heldout" / "heldout-00000.tar").items():
        if name.endswith(".txt"):
            assert parse(data.decode()) in combinations(True, 2)


def test_the_same_settings_give_the_same_bytes_and_finish_what_was_interrupted(tmp_path: Path) -> None:
    drawn(tmp_path / "a")
    drawn(tmp_path / "b")
    expected = contents(tmp_path / "a")
    assert contents(tmp_path / "b") == expected
    kept = tmp_path / "b" / "train" / "train-00000.tar"
    before = kept.stat().st_mtime_ns
    (tmp_path / "b" / "train" / "train-00001.tar").unlink()
    (tmp_path / "b" / "train" / ".prepare" / "train-00002.json").unlink()
    assert drawn(tmp_path / "b")["samples"] == 25
    assert contents(tmp_path / "b") == expected
    assert kept.stat().st_mtime_ns == before
    drawn(tmp_path / "c", seed=1)
    assert contents(tmp_path / "c") != expected


def test_other_settings_are_refused_and_the_difference_is_named(tmp_path: Path) -> None:
    drawn(tmp_path)
    with pytest.raises(DataError, match=r"prepared with other settings \(size was 32, now 16\)"):
        drawn(tmp_path, size=16)


def test_foreign_shards_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "train-00000.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match="did not write"):
        drawn(tmp_path)
    assert (tmp_path / "train" / "train-00000.tar").read_bytes() == b"precious"


def test_an_output_that_cannot_be_written_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        drawn(tmp_path / "file")


# ------------------------------------------------------------------------------------------------------- imports


def test_a_folder_is_imported_with_its_captions(folder: Path, tmp_path: Path) -> None:
    result = imported(tmp_path / "out", "folder", folder, samples_per_shard=4)
    assert result == {"output": str(tmp_path / "out"), "shards": 2, "samples": 6, "dropped": {"missing_caption": 1}}
    assert dropped(tmp_path / "out")[0]["sample"].endswith(".jpg")
    found = members(tmp_path / "out" / "00000.tar") | members(tmp_path / "out" / "00001.tar")
    facts = {name: json.loads(data) for name, data in found.items() if name.endswith(".json")}
    assert any(fact["source"].startswith("deep/") for fact in facts.values())
    key = next(name for name, fact in facts.items() if fact.get("AESTHETIC_SCORE") == 6.5).removesuffix(".json")
    assert found[f"{key}.txt"] == b"from the json"
    original = samples()[facts[f"{key}.json"]["source"].removesuffix(".jpg")]["jpg"]
    assert found[f"{key}.jpg"] == original, "without prepare.max_side the bytes stay as they are"


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_table_of_paths_is_imported(folder: Path, tmp_path: Path, kind: str) -> None:
    paths = sorted(folder.glob("*.jpg"))[:4]
    rows = [
        {"Path": path.name, "TEXT": f'say "{i}",\nplease', "score": i + 0.5, "note": None if i else "first"}
        for i, path in enumerate(paths)
    ]
    rows += [{**rows[0], "Path": "gone.jpg"}, {**rows[0], "Path": "https://example.org/a.jpg"}]
    table = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    else:
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    result = imported(tmp_path / "out", "table", table)
    assert result["samples"] == 4 and result["dropped"] == {"missing_image": 2}
    found = members(tmp_path / "out" / "00000.tar")
    assert found["000000001.txt"].decode() == 'say "1",\nplease'
    facts = json.loads(found["000000001.json"])
    assert facts["score"] == 1.5 and facts["source"] == paths[1].name
    assert "img2dataset" in dropped(tmp_path / "out")[1]["detail"]


def test_repacking_shrinks_regroups_and_keeps_keys_and_facts(tmp_path: Path) -> None:
    result = imported(
        tmp_path / "out", "shards", copy_shards(tmp_path / "in"), max_side=100, quality=80, samples_per_shard=5
    )
    assert (result["shards"], result["samples"]) == (3, 12)
    found = {k: v for path in sorted((tmp_path / "out").glob("*.tar")) for k, v in members(path).items()}
    for shard in (0, 1):
        for key, sample in samples(shard).items():
            before = Image.open(io.BytesIO(sample["jpg"]))
            after = Image.open(io.BytesIO(found[f"{key}.jpg"]))
            assert max(after.size) == 100
            assert abs(after.width / after.height - before.width / before.height) < 0.02
            assert found[f"{key}.txt"] == sample["txt"]
            facts, known = json.loads(found[f"{key}.json"]), json.loads(sample["json"])
            assert facts["captions"] == known["captions"] and facts["flickr_url"] == known["flickr_url"]
            assert (facts["width"], facts["height"]) == after.size


def test_shrinking_turns_pictures_upright_once(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(io.BytesIO(jpegs()[0]))
    picture.save(source / "a.jpg", exif=exif, quality=95)
    picture.save(source / "b.jpg", quality=95)
    (source / "b.json").write_text(json.dumps({"exif": json.dumps({"Image Orientation": "Rotated 90 CW"})}))
    for name in "ab":
        (source / f"{name}.txt").write_text("a")
    imported(tmp_path / "out", "folder", source, max_side=64)
    found = members(tmp_path / "out" / "00000.tar")
    upright = Image.open(io.BytesIO(jpegs()[0])).rotate(-90, expand=True)
    for number in (0, 1):
        small = decode(found[f"00000000{number}.jpg"])
        assert np.abs(np.asarray(upright.resize(small.shape[1::-1])).astype(int) - small).mean() < 12
        assert "exif" not in json.loads(found[f"00000000{number}.json"])


def test_equal_keys_of_different_shards_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.tar", "b.tar"):
        (tmp_path / "in" / name).write_bytes(SHARDS[1].read_bytes())
    imported(tmp_path / "out", "shards", tmp_path / "in")
    keys = {name.split(".")[0] for name in members(tmp_path / "out" / "00000.tar")}
    assert len(keys) == 2 * len(samples(1))


def objects(prefix: str, suffix: str = ".tar") -> dict[str, bytes]:
    names = [name for name in store.list_dir(prefix) if name.endswith(suffix)]
    return {name: store.read_bytes(f"{prefix}/{name}") for name in names}


def modified(server: S3Server, bucket: str, key: str) -> Any:
    return server.client().head_object(Bucket=bucket, Key=key)["LastModified"]


def test_a_bucket_gets_the_same_objects_and_interrupted_work_continues(
    folder: Path, tmp_path: Path, bucket: str, s3_server: S3Server
) -> None:
    there = f"s3://{bucket}/deep/out"
    result = imported(there, "folder", folder, samples_per_shard=3)
    assert (result["shards"], result["samples"]) == (3, 6)
    imported(tmp_path / "local", "folder", folder, samples_per_shard=3)
    assert objects(there) == contents(tmp_path / "local")
    assert len(objects(there, ".index.parquet")) == 3 and b"missing_caption" in store.read_bytes(
        f"{there}/dropped.jsonl"
    )
    store.remove(f"{there}/00001.tar")
    before = modified(s3_server, bucket, "deep/out/00000.tar")
    assert imported(there, "folder", folder, samples_per_shard=3) == result
    assert objects(there) == contents(tmp_path / "local")
    assert modified(s3_server, bucket, "deep/out/00000.tar") == before, "what was done is not done again"
    with pytest.raises(DataError, match=rf"{there}: it was prepared with other settings"):
        imported(there, "folder", folder, quality=50)


def test_repacking_from_bucket_to_bucket(tmp_path: Path, bucket: str) -> None:
    for path in sorted(copy_shards(tmp_path / "in").glob("*.tar")):
        store.write_bytes(f"s3://{bucket}/in/{path.name}", path.read_bytes())
    options: dict[str, Any] = {"max_side": 100, "samples_per_shard": 5, "deduplicate": "perceptual"}
    imported(f"s3://{bucket}/out", "shards", f"s3://{bucket}/in/{{00000..00001}}.tar", **options)
    imported(tmp_path / "out", "shards", tmp_path / "in", **options)
    assert objects(f"s3://{bucket}/out") == contents(tmp_path / "out")


def test_compressed_shards_are_repacked_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar.gz").write_bytes(gzip.compress(SHARDS[0].read_bytes()))
    imported(tmp_path / "out", "shards", tmp_path / "in")
    assert members(tmp_path / "out" / "00000.tar").keys() == {
        f"{key}.{name}" for key in samples() for name in ("jpg", "txt", "json")
    }


# ---------------------------------------------------------------------------------------------------- duplicates


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Five photographs, one of them twice, and a smaller recompressed version of two."""
    root = tmp_path / "copies"
    root.mkdir()
    for number in range(5):
        (root / f"{number}.jpg").write_bytes(jpegs()[number])
    (root / "1-again.jpg").write_bytes(jpegs()[1])
    for number, (scale, quality) in {2: (0.5, 40), 3: (0.7, 60)}.items():
        image = Image.open(io.BytesIO(jpegs()[number]))
        image.resize((round(image.width * scale), round(image.height * scale))).save(
            root / f"{number}-small.jpg", quality=quality
        )
    for path in root.glob("*.jpg"):
        path.with_suffix(".txt").write_text("x")
    return root


def test_exact_duplicates_are_dropped_and_named(copies: Path, tmp_path: Path) -> None:
    result = imported(tmp_path / "out", "folder", copies, deduplicate="exact")
    assert result["samples"] == 7 and result["dropped"] == {"duplicate": 1}
    line = dropped(tmp_path / "out")[0]
    assert line["sample"] == "1.jpg" and "1-again.jpg" in line["detail"]


def test_perceptual_duplicates_lose_to_the_largest_version(copies: Path, tmp_path: Path) -> None:
    result = imported(tmp_path / "out", "folder", copies, deduplicate="perceptual", samples_per_shard=3)
    assert result["samples"] == 5
    lines = {line["sample"]: line["detail"] for line in dropped(tmp_path / "out")}
    assert set(lines) == {"1.jpg", "2-small.jpg", "3-small.jpg"}
    assert "of 2.jpg" in lines["2-small.jpg"] and "bits" in lines["2-small.jpg"]
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "00001.tar").unlink()
    imported(tmp_path / "out", "folder", copies, deduplicate="perceptual", samples_per_shard=3)
    assert contents(tmp_path / "out") == before


def test_pictures_as_large_as_data_max_pixels_are_compared(tmp_path: Path) -> None:
    large = io.BytesIO()
    Image.new("L", (8008, 8000)).save(large, "JPEG", quality=10)
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.jpg").write_bytes(large.getvalue())
        (tmp_path / "in" / f"{name}.txt").write_text("black")
    settings = PrepareConfig(
        kind="folder", source=str(tmp_path / "in"), output=str(tmp_path / "out"), deduplicate="perceptual"
    )
    result = main(Config(settings, data=DataConfig(max_pixels=80_000_000)))
    assert result["samples"] == 1 and result["dropped"] == {"duplicate": 1}


def test_all_threads_of_data_threads_work_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(20)

    def finish(*arguments: Any) -> Any:
        together.wait(20)
        return _finish(*arguments)

    monkeypatch.setattr("data_pipeline.commands.prepare._finish", finish)
    root = tmp_path / "in"
    root.mkdir()
    for number in range(40):
        (root / f"{number}.jpg").write_bytes(jpegs()[0])
        (root / f"{number}.txt").write_text("x")
    settings = PrepareConfig(kind="folder", source=str(root), output=str(tmp_path / "out"))
    assert main(Config(settings, data=DataConfig(threads=20)))["samples"] == 40


def test_nothing_is_dropped_as_a_duplicate_of_a_dropped_sample(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jpg").write_bytes(jpegs()[0])  # the first of two equal ones, but it has no caption
    (root / "b.jpg").write_bytes(jpegs()[0])
    (root / "b.txt").write_text("kept")
    for kind in ("exact", "perceptual"):
        result = imported(tmp_path / kind, "folder", root, deduplicate=kind)
        assert result["samples"] == 1 and result["dropped"] == {"missing_caption": 1}


def test_equal_bytes_and_equal_looks_are_counted_separately(copies: Path, tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(jpegs()[4]))
    image.save(copies / "4-png.png")
    (copies / "4-png.txt").write_text("x")
    imported(tmp_path / "out", "folder", copies, deduplicate="perceptual")
    lines = {line["sample"]: line["detail"] for line in dropped(tmp_path / "out")}
    assert "the same bytes" in lines["1.jpg"]
    assert "of 4-png.png (it shows the same: " in lines["4.jpg"]


def test_the_result_is_the_last_line_and_an_empty_result_is_an_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(PrepareConfig(kind="folder", source=str(folder), output=str(tmp_path / "out")))
    config.json = False
    assert main(config) == json.loads(capsys.readouterr().out.splitlines()[-1])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="every sample was dropped"):
        imported(tmp_path / "none", "folder", tmp_path / "bad")
    assert dropped(tmp_path / "none")[0]["reason"] == "decode_error"


def test_what_a_killed_run_left_is_removed(folder: Path, tmp_path: Path) -> None:
    imported(tmp_path / "out", "folder", folder)
    (tmp_path / "out" / ".00000.tar.abcd.tmp").write_bytes(b"half")
    imported(tmp_path / "out", "folder", folder)
    assert not list((tmp_path / "out").glob(".*.tmp"))


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (PrepareConfig, {"samples_per_shard": 0}),
        (PrepareConfig, {"max_side": -4}),
        (PrepareConfig, {"quality": 500}),
        (DrawConfig, {"samples_per_shard": 0}),
        (DrawConfig, {"objects": 3}),
        (DrawConfig, {"size": 0}),
        (DataConfig, {"max_pixels": 0}),
        (DataConfig, {"decode_margin": 0.0}),
        (DataConfig, {"prefetch_mb": -1}),
        (DataConfig, {"cache_gb": -1.0}),
        (DataConfig, {"deadline_s": -1.0}),
        (DataConfig, {"max_bad_share": 1.5}),
        (DataConfig, {"lanes": -2}),
    ],
)
def test_settings_that_cannot_work_are_named(section: type, values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=rf"{name}={values[name]}: it must"):
        section(**values)


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("folder", "nowhere", "no such directory"),
        ("folder", ".", "no pictures"),
        ("table", "nowhere.csv", "no such file"),
        ("table", "notes.csv", "a column of paths .* it has one, two"),
        ("table", "junk.parquet", "not a readable table"),
        ("shards", "nothing-*.tar", "nothing-"),
        ("folder", "x" * 300, "File name too long"),
        ("table", "x" * 300, "File name too long"),
    ],
)
def test_sources_that_cannot_be_read_are_reported_in_one_sentence(
    tmp_path: Path, kind: str, source: str, words: str
) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (root / "notes.csv").write_text("one,two\n1,2\n")
    (root / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=rf"^prepare\.source.*{words}"):
        imported(tmp_path / "out", kind, root / source)
