"""Combinations of settings that cannot train are refused with the keys and the remedy."""

from __future__ import annotations

import pytest

from data_pipeline.common.errors import ConfigError
from training.cli.compose import load_config
from training.config.experiment import ClusterConfig
from training.plan.checks import planned_world_size


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["cluster.processes=3"], ["3 processes", "64 lanes", "data.global_batch=64", "multiple of 3"]),
        (
            ["cluster.processes=4", "data.lanes=2"],
            ["4 processes", "2 lanes", "use 1 or 2", "data.lanes to a multiple of 4"],
        ),
        (["data.micro_batch=5"], ["data.micro_batch=5", "data.global_batch=64", "1, 2, 4, 8, 16, 32 or 64"]),
        (["data.micro_batch=32", "cluster.processes=4"], ["data.micro_batch=32", "16 samples"]),
        (["zero.stage=0", "cluster.processes=2"], ["zero.stage=0", "zero.stage=1, 2 or 3"]),
        (["zero.stage=0", "precision.dtype=bf16"], ["zero.stage=0", "precision.dtype=bf16"]),
        (["train.deterministic_reduction=true"], ["set data.micro_batch"]),
        (
            ["train.deterministic_reduction=true", "data.micro_batch=8", "optimizer.name=adamw8bit"],
            ["optimizer.name=adamw8bit", "use adamw"],
        ),
        (["stage.model.preset=demo_sr"], ["stage.model.preset=demo_sr", "stage.low_res_size"]),
        (["stage.model.overrides.text_dim=8"], ["text_dim=8", "text.dim=384"]),
        (["ingredient=residual"], ["stage.diffusion.residual=true", "super-resolution"]),
        (["stage.image_size=18"], ["stage.image_size=18", "multiple of 4"]),
        (["stage=sr1024", "stage.crop_size=36"], ["stage.crop_size=36", "multiple of"]),
        (["stage=demo_sr", "stage.sampler.aug_level=0.2"], ["aug_level=0.2: demo_sr", "stage.diffusion.aug_max=0.15"]),
    ],
)
def test_refused(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("train", overrides)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.processes=4", "data.micro_batch=8"],
        ["cluster.processes=2", "data.global_batch=6", "data.lanes=2"],
        ["text.dim=8"],
        ["stage=demo_sr", "stage.model.preset=demo_base", "stage.image_size=32", "stage.low_res_size=16"],
    ],
)
def test_accepted(overrides: list[str]) -> None:
    load_config("train", overrides)


@pytest.mark.parametrize(
    ("verb", "key"),
    [
        ("train", "run.dir"),
        ("launch", "run.dir"),
        ("sample", "output"),
        ("evaluate", "evaluation.output"),
    ],
)
def test_directories_that_must_be_local_are_checked(verb: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=s3://b/x: it must be a local directory"):
        load_config(verb, ["experiment=demo", f"{key}=s3://b/x"])


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_that_are_not_finite_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.timeout_s=(inf|nan): it must be (a finite number|positive)"):
        load_config("train", ["experiment=demo", f"train.timeout_s={value}"])


def test_commands_that_do_not_train_are_not_checked() -> None:
    load_config("sample", ["cluster.processes=3"])
    load_config("launch", ["cluster.processes=3"])


def test_processes_are_counted_over_the_nodes_of_a_job() -> None:
    assert planned_world_size(ClusterConfig(kind="slurm", nodes=2, processes=8), {}) == 16
    assert planned_world_size(ClusterConfig(kind="local", nodes=2, processes=8), {}) == 8


def test_the_environment_of_a_launcher_overrides_the_settings() -> None:
    ranks = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert planned_world_size(ClusterConfig(processes=1), ranks) == 4
