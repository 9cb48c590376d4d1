"""Samples held out for evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.config import PrepareConfig
from tests.data_pipeline.commands.importing import imported, members


def keys(folder: Path) -> set[str]:
    return {name.partition(".")[0] for shard in folder.glob("*.tar") for name in members(shard)}


def test_held_out_samples_are_in_no_training_shard(folder: Path, tmp_path: Path) -> None:
    result = imported(tmp_path / "out", "folder", folder, heldout=2, samples_per_shard=2)
    assert result["samples"] + result["heldout"] == 6 and result["heldout_shards"] == 1
    assert result["dropped"] == {"missing_caption": 1}
    train, heldout = keys(tmp_path / "out" / "train"), keys(tmp_path / "out" / "heldout")
    assert not train & heldout and len(train | heldout) == 6
    assert imported(tmp_path / "out", "folder", folder, heldout=2, samples_per_shard=2) == result
    with pytest.raises(DataError, match="heldout was 2, now 3"):
        imported(tmp_path / "out", "folder", folder, heldout=3, samples_per_shard=2)


def test_more_samples_than_there_are_cannot_be_held_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prepare\.heldout=7: the source has 7 samples; hold out fewer"):
        imported(tmp_path / "out", "folder", folder, heldout=7)
    assert not (tmp_path / "out").exists(), "the corrected command may use the same output"
    with pytest.raises(ConfigError, match=r"prepare\.draw\.heldout"):
        PrepareConfig(heldout=1)
