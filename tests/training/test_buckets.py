"""A training on pictures of several shapes: two processes, then one, equal one process without a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError
from tests.data_pipeline.shapes import write_shapes
from tests.training import forks
from tests.training.runs import curve, experiment, metrics
from training.plan.checks import check_buckets


@pytest.mark.parametrize("stage", ["base", "sr"])
def test_shapes_train_on_any_number_of_processes(stage: str, tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    shards = write_shapes(tmp_path / "a b")
    changes = {"data__buckets": ["1x1", "4x3", "3x4"], "train__sample_every": 8, "optimizer__decay": "constant"}
    if stage == "sr":
        changes |= {"stage__image_size": 32, "stage__low_res_size": 16, "stage__model__preset": "tiny_sr"}
    config = experiment(tmp_path, shards, **changes, train__steps=4)
    running = forks.start(config, 2)
    assert running.codes() == [0, 0], running.text
    config.train.steps = 8
    running = forks.start(config, 1)
    assert running.codes() == [0], running.text
    assert "resuming from step 4" in running.text
    alone = experiment(tmp_path, shards, **changes, train__steps=8, run__dir=str(tmp_path / "alone"))
    running = forks.start(alone, 1)
    assert running.codes() == [0], running.text
    for mine, wanted in zip(curve(config), curve(alone), strict=True):
        assert mine[:2] == wanted[:2]
        assert mine[2] == pytest.approx(wanted[2], rel=1e-4)
    assert not [name for name in metrics(config)[-1] if "_dataset/" in name or name == "bad_other"]
    assert (tmp_path / "run" / "samples" / "step-00000008.png").exists()


def test_crops_must_fit_all_shapes(tmp_path: Path) -> None:
    config = experiment(tmp_path, "x", data__buckets=["1x1"], stage__crop_size=16)
    with pytest.raises(ConfigError, match=r"stage.crop_size=16 trains on square crops"):
        check_buckets(config, 1)
