"""The rank of a process, from its environment."""

from __future__ import annotations

import pytest

from data_pipeline.common.errors import ConfigError
from training.config.experiment import ClusterConfig
from training.processes.ranks import Ranks, gpu_of, process_count, read_ranks, share, speaks, thread_count

LAUNCHER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_ranks_from_a_launcher() -> None:
    assert read_ranks({}) is None
    assert read_ranks({**LAUNCHER, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == Ranks(3, 1, 4)


def test_ranks_from_srun_only_when_asked() -> None:
    slurm = {**LAUNCHER, "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    assert read_ranks(slurm) is None
    assert read_ranks({**slurm, "CASCADE_SRUN": "1"}) == Ranks(2, 0, 4)


def test_several_tasks_that_are_not_ranks_are_refused() -> None:
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(ConfigError, match="srun has started 2 tasks of this command, which would be 2 competing runs"):
        read_ranks(step)
    assert read_ranks({**step, "SLURM_STEP_NUM_TASKS": "1"}) is None
    ranks = {**step, **LAUNCHER, "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "CASCADE_SRUN": "1"}
    assert read_ranks(ranks) == Ranks(1, 1, 2)


def test_the_gpu_of_a_process() -> None:
    assert [gpu_of(rank, 8) for rank in range(8)] == list(range(8)), "all of the node are visible"
    assert [gpu_of(rank, 1) for rank in range(8)] == [0] * 8, "each sees its own"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set although RANK is"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"RANK": "four"}, "RANK=four: it must be a number; if no launcher started this command: unset RANK"),
        ({"MASTER_PORT": "tcp://10.0.0.1:1"}, "MASTER_PORT=tcp://10.0.0.1:1: it must be a number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: it must lie between 1 and 65535"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: it must be a number"),
        ({"RANK": "4"}, "must lie between 0 and WORLD_SIZE - 1 = 3"),
    ],
)
def test_a_launcher_that_contradicts_itself(change: dict[str, str | None], sentence: str) -> None:
    environ: dict[str, str | None] = {**LAUNCHER, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **change}
    with pytest.raises(ConfigError, match=sentence):
        read_ranks({name: value for name, value in environ.items() if value is not None})


def test_variables_that_an_earlier_program_left_silence_no_rank() -> None:
    assert speaks({"RANK": "3"}) and speaks({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) and speaks({})
    assert not speaks({**LAUNCHER, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"})
    assert speaks({**LAUNCHER, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"})


def test_counts() -> None:
    assert process_count(ClusterConfig(processes=3)) == 3
    assert thread_count(ClusterConfig(threads=5), {"OMP_NUM_THREADS": "3"}) == 5
    assert thread_count(ClusterConfig(), {"OMP_NUM_THREADS": "3", "SLURM_CPUS_PER_TASK": "4"}) == 3
    assert thread_count(ClusterConfig(), {"OMP_NUM_THREADS": "4,2"}) == 4, "a number per level"
    assert thread_count(ClusterConfig(), {"SLURM_CPUS_PER_TASK": "4"}) == 4
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS=many: it must be a number of threads"):
        thread_count(ClusterConfig(), {"OMP_NUM_THREADS": "many"})
    assert thread_count(ClusterConfig(processes=10_000), {}) == 1


@pytest.mark.parametrize(
    ("part", "parts", "environment", "expected"),
    [
        (0, 1, {}, (0, 1)),
        (2, 5, {}, (2, 5)),
        (0, 1, {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        (0, 1, {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        (
            0,
            1,
            {
                "SLURM_ARRAY_TASK_ID": "4",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "2",
                "RANK": "1",
                "WORLD_SIZE": "2",
            },
            (5, 6),
        ),
        (0, 1, {"CASCADE_SRUN": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}, (3, 4)),
        (0, 1, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (0, 1)),
        (1, 2, {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "10"}, (1, 2)),
    ],
)
def test_processes_and_array_tasks_share_the_work(
    part: int, parts: int, environment: dict[str, str], expected: tuple[int, int]
) -> None:
    assert share(part, parts, environment) == expected
