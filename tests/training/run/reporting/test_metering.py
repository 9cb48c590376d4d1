from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.processes.ranks import Ranks
from training.run.reporting import metering
from training.run.reporting.metering import Hours, Meter, TimeLeft, process_age, slowest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(metering.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_leaves_samples_and_checkpoints_out(clock: list[float]) -> None:
    meter = Meter(Ranks(), global_batch=10, flops_per_image=4e9, peak_flops=1e12)
    meter.start(5)
    for phase, seconds in (("data", 1.0), ("forward", 2.0), ("step", 1.0), ("checkpoint", 50.0), ("samples", 30.0)):
        with meter.phase(phase):
            clock[0] += seconds
    record = meter.record(7)
    assert record["images_per_second"] == pytest.approx(5.0)
    assert record["step_seconds"] == pytest.approx(2.0)
    assert record["data_wait"] == pytest.approx(0.25)
    assert record["mfu"] == pytest.approx(5 * 4e9 / 1e12)
    assert record["memory_gb"] > 0.01
    clock[0] += 1.0
    assert meter.record(8)["images_per_second"] == pytest.approx(10.0), "a new interval"


def test_no_peak_no_mfu(clock: list[float]) -> None:
    meter = Meter(Ranks(), 4)
    meter.start(0)
    clock[0] += 1
    assert "mfu" not in meter.record(1)


def test_loss_by_noise_level(clock: list[float]) -> None:
    meter = Meter(Ranks(), 4)
    meter.start(0)
    meter.losses(torch.tensor([0.05, 0.19, 0.9, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    meter.losses(torch.tensor([0.5]), torch.tensor([float("nan")]))
    record = meter.record(1)
    assert {key: value for key, value in record.items() if key.startswith("loss_t/")} == {
        "loss_t/0.0-0.2": 2.0,
        "loss_t/0.8-1.0": 6.0,
    }
    clock[0] += 1
    assert not any(key.startswith("loss_t/") for key in meter.record(2))


def test_the_slowest_rank() -> None:
    assert slowest([1.0, 1.1, 0.9, 1.2], 4.0) is None
    assert slowest([1.0, 1.0, 3.0, 1.0], 4.0) == (2, 3.0)
    assert slowest([2.0, 1.0], 4.0) == (0, 2.0)
    assert slowest([0.02, 0.01], 4.0) is None, "it costs nobody anything"
    assert slowest([0.0], 4.0) is None


def test_device_hours_add_up_over_starts_that_died(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "hours.json"
    metering_age = process_age()
    first = Hours(path, attempt=1, world_size=4)
    clock[0] += 1800
    first.total()  # then it is killed
    second = Hours(path, attempt=2, world_size=2)
    clock[0] += 3600
    assert second.total() == pytest.approx(4 * 0.5 + 2 * 1.0, abs=0.01 + 6 * (metering_age + 60) / 3600)
    assert second.total() > 4.0


def test_the_time_left_knows_pauses() -> None:
    """Ten steps a second, and a validation of 9 s after every 10 steps: 100 steps take 100 s, not 10."""
    left = TimeLeft(200)
    assert left.seconds(10, 10.0, 0.0) == 19.0, "one record says nothing about pauses"
    for record in range(1, 10):
        seconds = left.seconds(10 + 10 * record, 10.0, 10.0 * record)
    assert seconds == pytest.approx(100.0)
