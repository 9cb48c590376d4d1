"""The parts of an evaluation: they are read back as written, a block at a time, and damage is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import DataError
from training.evaluation import measure
from training.evaluation.metrics import rows
from training.evaluation.parts import Parts, StoredRows, spilled
from training.evaluation.references import ReferenceFile

SIZES = (5, 0, 9, 3)


def features(count: int, seed: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Parts, dict[str, np.ndarray]]:
    parts, whole = Parts(tmp_path, {}, len(SIZES)), {"x/f": features(17, 0), "y/f": features(17, 1)}
    whole |= {"shown/sr": features(17 * 8, 2).reshape(17, 4, 4, 3), "place": np.arange(17)}
    ends = np.cumsum(SIZES)
    for number, (end, size) in enumerate(zip(ends, SIZES, strict=True)):
        # the transposed copy would be stored by columns without special care
        parts.write(number, {n: np.asfortranarray(a[end - size : end]) for n, a in whole.items()})
    return parts, whole


def test_parts_are_read_back_as_written(written: tuple[Parts, dict[str, np.ndarray]]) -> None:
    parts, whole = written
    found = parts.read()
    assert found.keys() == whole.keys() and isinstance(found["place"], np.ndarray)
    for name in ("x/f", "shown/sr"):
        stored, expected = found[name], whole[name]
        assert isinstance(stored, StoredRows) and stored.shape == expected.shape
        for which in (slice(None), slice(3, 15), slice(5, 5), slice(-4, None), slice(1, 16, 3), 0, -1, [16, 0, 7], []):
            assert np.array_equal(stored[which], expected[which]), which
        for count in (0, 4, 5, 16, 99):
            assert np.array_equal(stored.first(count)[:], expected[:count])
        with pytest.raises(IndexError):
            stored[17]


def test_figures_of_stored_features_are_those_of_arrays_and_read_a_block_at_a_time(
    written: tuple[Parts, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, whole = written
    monkeypatch.setattr(rows, "BLOCK", 4)
    found, prompts = parts.read(), np.arange(17) // 2
    expected = measure.against_reference({"f": whole["x/f"]}, {"f": whole["y/f"]}, "f", "f")
    expected |= measure.of_samples({"f": whole["x/f"]}, prompts, whole["y/f"], "f")
    most = []
    read = StoredRows._read

    def watched(self: StoredRows, start: int, stop: int) -> Any:
        most.append(stop - start)
        return read(self, start, stop)

    monkeypatch.setattr(StoredRows, "_read", watched)
    figures = measure.against_reference({"f": found["x/f"]}, {"f": found["y/f"]}, "f", "f")
    figures |= measure.of_samples({"f": found["x/f"]}, prompts, found["y/f"], "f")
    assert figures.keys() == expected.keys() and max(most) == 4
    for metric, group in figures.items():
        assert group["f"].as_dict() == expected[metric]["f"].as_dict(), metric


def test_a_damaged_part_is_named(written: tuple[Parts, dict[str, np.ndarray]]) -> None:
    parts, whole = written
    content = bytearray(parts.file(2).read_bytes())
    content[content.index(whole["x/f"][6].tobytes()) + 2] ^= 1
    parts.file(2).write_bytes(content)
    with pytest.raises(DataError, match=r"00002\.npz: damaged .*x/f\.npy.*delete it and repeat the command"):
        parts.read()


def test_features_that_went_to_a_file_become_a_reference_file(tmp_path: Path) -> None:
    with spilled(tmp_path, {"a": 6, "b": 2}) as place:
        for seed in range(3):
            place.add("a", features(4, seed))
            place.add("b", features(4, seed, 2))
        ReferenceFile(place.rows(), ["x"] * 12, {"rule": "r"}).write(tmp_path / "reference.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["reference.safetensors"]
    from safetensors.numpy import load_file

    found, theirs = (
        ReferenceFile.read(str(tmp_path / "reference.safetensors")),
        load_file(tmp_path / "reference.safetensors"),
    )
    for name, width in (("a", 6), ("b", 2)):
        expected = np.concatenate([features(4, seed, width) for seed in range(3)])
        assert np.array_equal(found.features[name][:], expected) and np.array_equal(theirs[name], expected)
    assert found.captions == ["x"] * 12 and found.facts == {"rule": "r"}
