"""Errors that name a setting: which one it was is data, not wording."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError, ShardsError, about
from data_pipeline.config import DataConfig
from data_pipeline.shards.mixture import entries_of, open_dataset
from data_pipeline.storage import store


def test_shards_of_another_setting_are_named_by_it(tmp_path: Path) -> None:
    missing = str(tmp_path / "data.shards" / "*.tar")
    with pytest.raises(ShardsError) as plain:
        store.expand(missing)
    with pytest.raises(ShardsError) as other, about("validation.shards"):
        store.expand(missing)
    assert str(plain.value).startswith(f"data.shards={missing}: no .tar shards found")
    assert str(other.value) == str(plain.value).replace("data.shards=", "validation.shards="), "the path stays"
    copy = pickle.loads(pickle.dumps(other.value))
    assert type(copy) is ShardsError and str(copy) == str(other.value), "as another process sends it"
    with pytest.raises(DataError, match=r"^validation\.shards: data\.shards is full$"), about("validation.shards"):
        raise DataError("data.shards is full")


def test_a_data_set_of_a_mixture_is_named(tmp_path: Path) -> None:
    config = DataConfig(shards=[{"name": "art", "shards": str(tmp_path / "none")}])
    for opened in (open_dataset, entries_of):
        with pytest.raises(ShardsError, match=r"^data\.shards, data set art=.*none: no .tar shards found"):
            opened(config)
