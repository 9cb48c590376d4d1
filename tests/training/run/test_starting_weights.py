"""Fine-tuning from a bundle, whole or by adapters: four new captions are learnt, and drawn without `peft`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.images import training_pair
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.photos import samples
from tests.training import forks
from tests.training.ranks import run_ranks
from tests.training.runs import experiment, metrics, newest
from tests.training.tiny import tiny_cascade
from training.cascade import Cascade, bundle
from training.cli.compose import load_config
from training.commands import checkpoints
from training.config.experiment import Experiment, LoraConfig
from training.engine.start import build_engine
from training.model.lora import add_adapters, merged
from training.model.unet import UNet
from training.processes.ranks import Ranks

CAPTIONS = ["my dog", "a house by the sea", "the old tower", "my blue boat"]
STEPS = 200


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four photographs with new captions."""
    folder = tmp_path_factory.mktemp("mine")
    with ShardWriter(str(folder / "00000.tar")) as shard:
        for index, (caption, sample) in enumerate(zip(CAPTIONS, samples().values(), strict=False)):
            shard.write(f"{index:09d}", {"jpg": sample["jpg"], "txt": caption.encode()})
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle of two stages."""
    path = str(tmp_path_factory.mktemp("source") / "bundle")
    tiny_cascade().save(path)
    return path


def fine_tuning(directory: Path, shards: str, source: str, **changes: Any) -> Experiment:
    """A run of the bundle's base stage on the four pictures."""
    config = experiment(
        directory, shards, zero__stage=0, train__init_from=source, train__steps=STEPS, stage__name="base",
        text__max_tokens=10, data__crop="center", data__flip=0.0, checkpoint__every=STEPS // 2, train__log_every=20,
        **changes,
    )  # fmt: skip
    stage = bundle.read(source).stages[0].config
    stage.diffusion.text_drop = 0.0
    config.stage = stage
    config.optimizer.warmup_steps, config.optimizer.weight_decay = 10, 0.0
    return config


def pictures(shards: str) -> np.ndarray:
    truth = [training_pair(sample["jpg"], size=16)[0] for sample in list(samples().values())[:4]]
    return np.stack(truth).astype(float)


def distances(path: str, truth: np.ndarray) -> np.ndarray:
    """Root mean square difference, in 256ths, of each caption's sample (rows) from each picture (columns)."""
    drawn = Cascade.from_pretrained(path).generate(CAPTIONS, guidance=1.0, steps=10, stages=1, seed=0)
    values = np.stack([np.asarray(image).astype(float) for image in drawn])
    return np.sqrt(((values[:, None] - truth[None]) ** 2).mean(axis=(2, 3, 4)))


@pytest.mark.parametrize(("rank", "lr"), [(0, 3e-3), (16, 1e-2)])
def test_four_captions_are_learnt(tmp_path: Path, shards: str, source: str, rank: int, lr: float) -> None:
    config = fine_tuning(tmp_path, shards, source, lora__rank=rank, optimizer__lr=lr)
    running = forks.start(config)
    assert running.codes() == [0], running.text
    losses = [line["loss"] for line in metrics(config)]
    assert np.mean(losses[-2:]) < 0.5 * losses[0]
    names = newest(config).names("param/")
    assert all((".lora_A." in name or ".lora_B." in name) == bool(rank) for name in names)

    out = str(tmp_path / "tuned")
    bundle.write(out, bundle.collect([config.run.dir]))
    assert bundle.read(out).stages[0].unet == bundle.read(source).stages[0].unet
    truth = pictures(shards)
    before, after = distances(source, truth), distances(out, truth)
    assert after.argmin(axis=1).tolist() == [0, 1, 2, 3], after
    assert after.diagonal().mean() < 0.5 * before.diagonal().mean(), after


def test_adapters_resume_and_only_with_their_own_base_weights(tmp_path: Path, shards: str, source: str) -> None:
    copied = str(tmp_path / "source")
    shutil.copytree(source, copied)
    config = fine_tuning(tmp_path, shards, copied, lora__rank=2)
    config.train.steps, config.checkpoint.every = 6, 3
    assert forks.start(config).codes() == [0]
    whole = {name: newest(config).read(name).clone() for name in newest(config).names()}
    shutil.rmtree(Path(config.run.dir) / "checkpoints" / "step-00000006")
    assert forks.start(config).codes() == [0]
    assert all(torch.equal(newest(config).read(name), tensor) for name, tensor in whole.items())
    exported = load_config(
        "checkpoints", [f"run={config.run.dir}", "action=export", f"output={tmp_path}/a.safetensors"]
    )
    assert checkpoints.main(exported)["what"].startswith("adapters (lora), which `cascade bundle` merges")  # type: ignore[arg-type]

    moved = str(tmp_path / "moved")
    shutil.move(copied, moved)
    shutil.rmtree(Path(config.run.dir) / "checkpoints" / "step-00000006")
    with pytest.raises(
        DataError, match=r"\(lora\) were trained with are no longer in .*resume the run with train\.init_from=PLACE"
    ):
        bundle.collect([config.run.dir]).stages[0].tensors()
    config.train.init_from = moved
    assert forks.start(config).codes() == [0]
    assert bundle.collect([config.run.dir]).stages[0].tensors(), "it knows the new place"
    shutil.move(moved, copied)
    config.train.init_from = copied

    other = Cascade.from_pretrained(copied)
    other.stages[0].unet.conv_out.bias.add_(0.1)
    other.save(copied)
    shutil.rmtree(Path(config.run.dir) / "checkpoints" / "step-00000006")
    running = forks.start(config)
    assert running.codes() == [2] and "not the weights that the LoRA adapters were trained with" in running.text
    with pytest.raises(DataError, match=r"not the weights that the LoRA adapters were trained with"):
        bundle.collect([config.run.dir]).stages[0].tensors()


# ------------------------------------------------------------------------------------------------- the adapters


def adapted(rank: int = 3, seed: int = 0) -> UNet:
    """A tiny base stage whose adapters have an effect."""
    unet = tiny_cascade().stages[0].unet.train().requires_grad_(True)
    torch.manual_seed(seed)
    add_adapters(unet, LoraConfig(rank=rank, alpha=6.0))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.05)
    return unet


def question(count: int = 8) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(count, 3, 16, 16, generator=random),
        "log_snr": torch.linspace(-4, 4, count),
        "text": torch.randn(count, 5, 32, generator=random),
        "text_mask": torch.ones(count, 5, dtype=torch.bool),
    }


def test_merged_weights_answer_as_the_adapters_do() -> None:
    unet = adapted()
    plain = tiny_cascade().stages[0].unet
    before = plain(**question())
    adapters = {name: p.detach() for name, p in unet.named_parameters() if p.requires_grad}
    assert adapters and all(".lora_" in name for name in adapters)
    plain.load_state_dict(merged(plain.state_dict(), adapters, 6.0 / 3))
    with torch.no_grad():
        torch.testing.assert_close(plain(**question()), unet(**question()), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain(**question()), before, atol=1e-2)


def settings(stage: int) -> Experiment:
    config = Experiment()
    config.zero.stage, config.ema.decays = stage, [0.9]
    config.data.global_batch, config.train.steps = 8, 10
    config.optimizer.lr, config.optimizer.warmup_steps = 3e-3, 0
    return config


def learn(ranks: Ranks, stage: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = build_engine(adapted(), settings(stage), ranks)
    mine = {name: value.chunk(ranks.world_size)[ranks.rank] for name, value in question().items()}
    losses = []
    for step in range(3):
        out = engine(mine["x"], mine["log_snr"], mine["text"], mine["text_mask"])
        loss = (out - mine["x"].roll(1, dims=2)).square().mean()
        engine.backward(loss)
        engine.step(step)
        losses.append(loss.item())
    return losses, engine.export_tensors()


def two_ranks(ranks: Ranks) -> dict[str, Any]:
    found = {}
    for stage in (1, 2, 3):
        losses, tensors = learn(ranks, stage)
        found[str(stage)] = {"losses": losses, "sums": {n: t.double().sum().item() for n, t in tensors.items()}}
    return found


def test_zero_trains_and_stores_the_adapters_alone(tmp_path: Path) -> None:
    losses, tensors = learn(Ranks(), 0)
    assert losses[2] < losses[0] and all(".lora_" in name for name in tensors)
    found = run_ranks(two_ranks, 2, tmp_path)
    for stage in ("1", "2", "3"):
        means = np.mean([rank[stage]["losses"] for rank in found], axis=0)
        assert means == pytest.approx(losses, rel=1e-4)
        sums = found[0][stage]["sums"] | found[1][stage]["sums"]
        assert sums.keys() == tensors.keys()
        for name, value in sums.items():
            assert value == pytest.approx(tensors[name].double().sum().item(), abs=2e-3), name


def test_adapters_that_cannot_work_are_refused(monkeypatch) -> None:
    unet = tiny_cascade().stages[0].unet
    with pytest.raises(ConfigError, match=r"lora.targets=\['attn'\]: this U-Net has no such layers, only .*conv_in"):
        add_adapters(unet, LoraConfig(rank=2, targets=["attn"]))
    with pytest.raises(ConfigError, match=r"lora.rank=2: .* set train.init_from to a bundle or run"):
        Experiment(lora=LoraConfig(rank=2))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the peft package: pip install 'cascade-t2i\[lora\]'"):
        add_adapters(unet, LoraConfig(rank=2))
