"""What a start refuses or warns about on this machine."""

from __future__ import annotations

import pytest

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.machine import free_memory
from training.cli.compose import load_config
from training.plan.fits import check_memory, remarks
from training.processes.ranks import Ranks


def test_a_stage_that_cannot_fit_is_refused_before_it_is_made() -> None:
    check_memory(load_config("train", ["stage.model.preset=tiny_base"]), Ranks())
    own = load_config("train", ["stage.model.overrides={widths: [16384, 32768]}"])
    with pytest.raises(ConfigError, match=r"stage demo_base with [\d,]+ M parameters needs at least .* GiB per"):
        check_memory(own, Ranks())
    giant = "stage.model.overrides={widths: [8192, 8192, 8192, 16384]}"
    foreign = load_config("train", ["experiment=photos", "stage=base64", giant])
    with pytest.raises(ConfigError, match=r"; the stages of this experiment are photos_base, photos_sr$"):
        check_memory(foreign, Ranks())


def test_processes_of_a_machine_share_its_memory() -> None:
    assert 0 < free_memory() < 1 << 60
    small = ["stage.model.preset=tiny_base", "data.global_batch=1048576", "data.lanes=1048576"]
    with pytest.raises(ConfigError, match="each process here has"):
        check_memory(load_config("train", [*small, "cluster.processes=1048576", "zero.stage=1"]), Ranks())


def test_a_base_stages_preset_for_super_resolution_is_reported() -> None:
    assert remarks(load_config("train", ["stage=demo_sr"]), "cuda") == []
    found = remarks(load_config("train", ["stage=demo_sr", "stage.model.preset=demo_base"]), "cuda")
    assert len(found) == 1 and "stage.model.preset=demo_base is for a base stage" in found[0]
