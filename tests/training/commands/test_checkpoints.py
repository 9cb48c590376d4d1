"""`cascade checkpoints` on small checkpoints written by hand."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.common.errors import ConfigError, DataError
from training.checkpoint.store import CheckpointStore
from training.commands.checkpoints import main
from training.config.commands import CheckpointsCommand
from training.config.experiment import Experiment
from training.optim.averages import power_decay_at
from training.processes.ranks import Ranks

WIDTHS = [0.05, 0.1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 400 updates of one scalar weight with two power profiles, kept every 40."""
    run = tmp_path_factory.mktemp("made")
    store = CheckpointStore(str(run / "checkpoints"))
    store.claim(Ranks())
    averages = [0.0, 0.0]
    for update in range(1, 401):
        weight = float(np.sqrt(update))
        for i, width in enumerate(WIDTHS):
            decay = power_decay_at(width, update - 1)
            averages[i] = decay * averages[i] + (1 - decay) * weight
        if update % 40 == 0:
            config = Experiment()
            config.ema.decays, config.ema.profile, config.train.steps = WIDTHS, "power", update
            values = {"param/w": weight, "ema/0/w": averages[0], "ema/1/w": averages[1]}
            meta = {"config": asdict(config), "updates": update, "validation": 1 / update, "healthy": update != 200}
            tensors = {name: torch.full((2, 3), value) for name, value in values.items()}
            store.save(update, tensors, meta, Ranks())
    return run


def command(run: Path, action: str, **settings: Any) -> CheckpointsCommand:
    config = CheckpointsCommand(action=action, **settings)
    config.run.dir = str(run)
    return config


def test_list(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = main(command(made, "list"))["checkpoints"]
    assert [row["step"] for row in rows] == list(range(400, 0, -40))
    assert all(row["tensors"] == 3 and row["problems"] == [] for row in rows)
    assert capsys.readouterr().out.count("its last step was not applied") == 1


def test_verify_names_the_damage(made: Path, tmp_path: Path) -> None:
    assert len(main(command(made, "verify", steps=[40, 80]))["checkpoints"]) == 2
    broken = tmp_path / "broken"
    shutil.copytree(made, broken)
    file = next((broken / "checkpoints" / "step-00000080").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(command(broken, "list"))["checkpoints"][-2]["problems"] == [], "sizes alone do not show it"
    with pytest.raises(DataError, match="damaged or unfinished: step 80;"):
        main(command(broken, "verify"))


def test_diff(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = main(command(made, "diff", steps=[360, 40]))
    assert found["steps"] == [40, 360]
    assert found["moved"] == {"w": pytest.approx(2.0)}
    assert {"key": "train.steps", "before": 40, "after": 360} in found["settings"]
    assert main(command(made, "diff"))["steps"] == [360, 400]
    with pytest.raises(ConfigError, match="compares exactly two"):
        main(command(made, "diff", steps=[1]))


@pytest.mark.parametrize(("average", "name"), [(-1, "param/w"), (0, "ema/0/w"), (1, "ema/1/w")])
def test_export(made: Path, tmp_path: Path, average: int, name: str) -> None:
    output = tmp_path / "weights.safetensors"
    done = main(command(made, "export", steps=[200], output=str(output), average=average))
    assert done["step"] == 200 and done["bytes"] == output.stat().st_size
    wanted = CheckpointStore(str(made / "checkpoints")).open(200).read(name)
    assert torch.equal(load_file(output)["w"], wanted)


def test_export_of_a_width_that_was_not_kept(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "weights.safetensors"
    main(command(made, "export", output=str(output), sigma_rel=0.07))
    wanted = 0.0
    for update in range(1, 401):
        decay = power_decay_at(0.07, update - 1)
        wanted = decay * wanted + (1 - decay) * float(np.sqrt(update))
    assert load_file(output)["w"].mean().item() == pytest.approx(wanted, rel=1e-3)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)


def test_a_width_that_the_stored_averages_cannot_give_is_refused(made: Path, tmp_path: Path) -> None:
    few = tmp_path / "run"
    for step in (360, 400):
        shutil.copytree(made / f"checkpoints/step-{step:08d}", few / f"checkpoints/step-{step:08d}")
    for width in (0.01, 0.25):
        with pytest.raises(ConfigError, match=rf"sigma_rel={width}: the 4 averages .* .possible: 0\.0\d+ to 0\.1\d+"):
            main(command(few, "export", output=str(tmp_path / "x"), sigma_rel=width))
    main(command(few, "export", output=str(tmp_path / "x"), sigma_rel=0.07))


def test_averages_that_are_damaged_or_began_later_are_not_used(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "run", tmp_path / "x"
    shutil.copytree(made, run)
    main(command(run, "export", output=str(output), sigma_rel=0.07))
    wanted = load_file(output)["w"].mean().item()
    damage(next((run / "checkpoints/step-00000200").glob("*.safetensors")))
    main(command(run, "export", output=str(output), sigma_rel=0.07))
    assert "skipped:" in capsys.readouterr().out
    assert load_file(output)["w"].mean().item() == pytest.approx(wanted, rel=1e-3)

    store = CheckpointStore(str(tmp_path / "later/checkpoints"))
    store.claim(Ranks())
    config = Experiment()
    config.ema.decays, config.ema.profile = WIDTHS, "power"
    meta = {"config": asdict(config), "updates": 40, "ema_since": [20, 20]}
    store.save(40, {"param/w": torch.ones(2), "ema/0/w": torch.ones(2), "ema/1/w": torch.ones(2)}, meta, Ranks())
    with pytest.raises(ConfigError, match="from the start"):
        main(command(tmp_path / "later", "export", output=str(output), sigma_rel=0.07))


def test_without_an_intact_checkpoint_nothing_is_exported_or_compared(made: Path, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    with pytest.raises(DataError, match="it has no finished checkpoint"):
        main(command(tmp_path / "run", "export", output=str(tmp_path / "x")))
    shutil.copytree(made, tmp_path / "other")
    damage(next((tmp_path / "other/checkpoints/step-00000200").glob("*.safetensors")))
    with pytest.raises(DataError, match="does not match its checksum"):
        main(command(tmp_path / "other", "diff", steps=[200, 400]))


def test_missing_runs_and_checkpoints_are_reported(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no checkpoints"):
        main(command(tmp_path / "nothing", "list"))
    with pytest.raises(DataError, match="never finished"):
        main(command(made, "export", steps=[41], output=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match="averages 0 to 1"):
        main(command(made, "export", average=5, output=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match="writes one checkpoint; give one step"):
        main(command(made, "export", steps=[40, 80], output=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match="action=show"):
        CheckpointsCommand(action="show")
    with pytest.raises(ConfigError, match="output"):
        CheckpointsCommand(action="export")
