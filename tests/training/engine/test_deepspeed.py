"""The engine under real DeepSpeed: one start per world size, many checks in it (starting costs seconds)."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.common.errors import ConfigError
from tests.training.ranks import run_ranks
from training.checkpoint.store import Checkpoint, CheckpointStore
from training.checkpoint.writer import CheckpointWriter
from training.config.experiment import Experiment
from training.engine.start import build_engine
from training.optim.averages import decay_at
from training.processes.collectives import all_sum
from training.processes.ranks import Ranks

BATCH, STEPS = 8, 4
DECAYS = [0.9, 0.05]
STATES = {kind: kind for kind in ("exp_avg", "exp_avg_sq", "ema/0", "ema/1")}
FACTORED = {kind: kind for kind in ("row_var", "col_var", "variance", "ema/0", "ema/1")}


class Net(torch.nn.Module):
    """Odd sizes (no world size divides them), a parameter without a gradient, and a buffer; called like a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = torch.nn.Linear(12, 37), torch.nn.LayerNorm(37), torch.nn.Linear(37, 12)
        self.words = torch.nn.Linear(5, 37)
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.tensor([0.25]))

    def forward(self, x: Any, log_snr: Any, text: Any, mask: Any = None, low_res: Any = None, aug: Any = None) -> Any:
        hidden = self.norm(self.first(x)) + self.words(text) + log_snr[:, None].to(x.dtype)
        return self.last(torch.nn.functional.silu(hidden)) + self.offset.to(x.dtype)


class Wide(Net):
    """Large enough for Muon: a matrix, and a kernel that is one when flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.between, self.kernel = torch.nn.Linear(37, 35), torch.nn.Conv1d(1, 33, 35)
        self.down = torch.nn.Linear(33, 37)

    def forward(self, x: Any, log_snr: Any, text: Any, mask: Any = None, low_res: Any = None, aug: Any = None) -> Any:
        hidden = self.norm(self.first(x)) + self.words(text) + log_snr[:, None].to(x.dtype)
        wide = torch.nn.functional.silu(self.kernel(self.between(hidden)[:, None])[..., 0])
        return self.last(torch.nn.functional.silu(hidden + self.down(wide))) + self.offset.to(x.dtype)


MATRICES = ("between.weight", "kernel.weight", "down.weight")
MOMENTA = {kind: kind for kind in ("exp_avg", "variance", "ema/0", "ema/1")}


def first_updates(tensors: dict[str, torch.Tensor], config: Experiment) -> dict[str, tuple[float, float]]:
    """The fourth and first singular values of the first update of each matrix among these weights, without its scale.
    (A batch of 8 has gradients of rank 8 at most.)"""
    rounded, found = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32, {}
    before = {name: p.detach().to(rounded).float() for name, p in Wide().named_parameters()}
    lr, kept = config.optimizer.lr / 2, 1 - config.optimizer.lr / 2 * config.optimizer.weight_decay
    for name in MATRICES:
        if f"param/{name}" in tensors:
            update = (before[name] * kept - tensors[f"param/{name}"]).flatten(1)
            values = torch.linalg.svdvals(update / (lr * 0.2 * max(update.shape) ** 0.5))
            found[name] = values[3].item(), values[0].item()
    return found


def experiment(stage: int, dtype: str = "fp32", optimizer: str = "adamw") -> Experiment:
    config = Experiment()
    config.zero.stage, config.precision.dtype, config.ema.decays = stage, dtype, DECAYS
    config.optimizer.name = optimizer
    config.data.global_batch, config.train.steps = BATCH, 10
    config.optimizer.lr, config.optimizer.warmup_steps = 3e-3, 2
    return config


def batch(step: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 12, generator=generator)
    return x, torch.randn(BATCH, generator=generator), torch.randn(BATCH, 5, generator=generator), x.flip(1)


def train(engine: Any, ranks: Ranks, steps: range, accumulate: int = 1, poisoned: int = -1) -> list[float]:
    """Losses of the global batch; the loss of the last rank is NaN at step `poisoned`."""
    losses = []
    for step in steps:
        total = 0.0
        mine = [part.chunk(ranks.world_size)[ranks.rank].chunk(accumulate) for part in batch(step)]
        for x, log_snr, text, wanted in zip(*mine, strict=True):
            loss = (engine(x, log_snr, text, None) - wanted).square().mean()
            if step == poisoned and ranks.rank == ranks.world_size - 1:
                loss = loss * float("nan")
            engine.backward(loss)
            total += loss.item() / accumulate
        engine.step(step)
        losses.append(all_sum([total], ranks)[0] / ranks.world_size)
    return losses


def reference(steps: int) -> dict[str, Any]:
    """The same in plain PyTorch, written out: losses, weights and averages."""
    config, net = experiment(0), Net()
    names = [name for name, _ in net.named_parameters()]
    options = config.optimizer
    adam = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), eps=options.eps, weight_decay=options.weight_decay)
    averages = [[p.detach().clone() for p in net.parameters()] for _ in DECAYS]
    losses = []
    for step in range(steps):
        x, log_snr, text, wanted = batch(step)
        loss = (net(x, log_snr, text) - wanted).square().mean()
        adam.zero_grad()
        loss.backward()
        net.unused.grad = torch.zeros(3)
        torch.nn.utils.clip_grad_norm_(net.parameters(), options.clip_norm)
        adam.param_groups[0]["lr"] = options.lr * min(1.0, (step + 1) / 2)
        adam.step()
        losses.append(loss.item())
        for decay, average in zip(DECAYS, averages, strict=True):
            for a, p in zip(average, net.parameters(), strict=True):
                a.lerp_(p.detach(), 1 - decay_at(decay, step))
    tensors = {f"param/{n}": p.detach() for n, p in net.named_parameters()}
    for index, average in enumerate(averages):
        tensors.update({f"ema/{index}/{n}": a for n, a in zip(names, average, strict=True)})
    return {"losses": losses, "tensors": tensors}


def save(engine: Any, ranks: Ranks, directory: str, step: int) -> CheckpointStore:
    store = CheckpointStore(directory)
    store.claim(ranks)
    writer = CheckpointWriter(store, experiment(1).checkpoint, ranks)
    writer.start(step, engine.snapshot(), {"updates": engine.updates})
    assert writer.wait() is None
    return store


def differences(checkpoint: Checkpoint, wanted: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference; the names must be there."""
    return max((checkpoint.read(name) - tensor).abs().max().item() for name, tensor in wanted.items())


# --------------------------------------------------------------------------------- what runs in two processes


def two_ranks(ranks: Ranks, directory: str) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": {}, "differences": {}, "resumed": {}, "balance": {}}
    expected = reference(STEPS)
    later = reference(STEPS + 2)["losses"][STEPS:]
    stores = {}
    for stage, accumulate in product((1, 2, 3), (1, 2)):
        key = f"{stage}/{accumulate}"
        engine = build_engine(Net(), experiment(stage), ranks, accumulate)
        found["losses"][key] = train(engine, ranks, range(STEPS), accumulate)
        stores[key] = save(engine, ranks, f"{directory}/{stage}-{accumulate}", STEPS)
        checkpoint = stores[key].newest(ranks)
        assert checkpoint is not None
        found["differences"][key] = differences(checkpoint, expected["tensors"])
        found["balance"][key] = sum(t.numel() for t in engine.export_tensors().values())
        if accumulate == 2:
            continue
        # the same engine continues, is reset, and repeats the steps bit for bit
        first = train(engine, ranks, range(STEPS, STEPS + 2))
        engine.import_tensors(checkpoint.read, STATES, STEPS)
        found[f"repeats/{stage}"] = train(engine, ranks, range(STEPS, STEPS + 2)) == first
        # averaged weights replace the raw ones, and the raw ones come back
        before = engine.export_tensors()
        before = {name: tensor.clone() for name, tensor in before.items()}
        x, log_snr, text, _ = batch(0)
        with engine.averaged(1) as module, torch.no_grad():
            found[f"averaged/{stage}"] = module(x, log_snr, text).double().sum().item()
        after = engine.export_tensors()
        found[f"comes back/{stage}"] = all(torch.equal(before[name], after[name]) for name in before)
        # a poisoned gradient on one rank: no rank applies the step, and the next one is as usual
        updates = engine.updates
        train(engine, ranks, range(6, 7), poisoned=6)
        poisoned = engine.export_tensors()
        found[f"skips/{stage}"] = engine.updates == updates and all(torch.equal(before[n], poisoned[n]) for n in before)
        # a snapshot shows the moment at which it was taken, even if it is assembled after another step
        moment = {name: tensor.clone() for name, tensor in engine.export_tensors().items()}
        snapshot = engine.snapshot()
        train(engine, ranks, range(STEPS + 2, STEPS + 3))
        late = snapshot.assemble()
        found[f"snapshot/{stage}"] = all(torch.equal(moment[name], late[name]) for name in moment)
    # any stage continues from the checkpoint of any other
    for source, target in (("3/1", 1), ("1/1", 3), ("2/2", 3)):
        engine = build_engine(Net(), experiment(target), ranks, 1)
        checkpoint = stores[source].newest(ranks)
        assert checkpoint is not None
        engine.import_tensors(checkpoint.read, STATES, STEPS)
        resumed = train(engine, ranks, range(STEPS, STEPS + 2))
        found["resumed"][f"{source} -> {target}"] = max(abs(a - b) for a, b in zip(resumed, later, strict=True))
    # bf16 keeps fp32 masters: the state survives a round trip bit for bit
    for stage in (1, 3):
        engine = build_engine(Net(), experiment(stage, "bf16"), ranks, 1)
        found[f"bf16/{stage}"] = train(engine, ranks, range(STEPS))
        store = save(engine, ranks, f"{directory}/bf16-{stage}", STEPS)
        go_on = train(engine, ranks, range(STEPS, STEPS + 2))
        fresh = build_engine(Net(), experiment(stage, "bf16"), ranks, 1)
        checkpoint = store.newest(ranks)
        assert checkpoint is not None
        fresh.import_tensors(checkpoint.read, STATES, STEPS)
        found[f"bf16 repeats/{stage}"] = train(fresh, ranks, range(STEPS, STEPS + 2)) == go_on
    # Adafactor's means are those of whole matrices, whoever holds which slice; its state goes from stage to stage
    found["adafactor"] = {}
    given: int | None
    for stage, given in ((3, None), (2, None), (1, 3)):
        engine = build_engine(Net(), experiment(stage, optimizer="adafactor"), ranks, 1)
        losses = train(engine, ranks, range(STEPS))
        if given is not None:
            engine = build_engine(Net(), experiment(stage, optimizer="adafactor"), ranks, 1)
            checkpoint = CheckpointStore(f"{directory}/adafactor-{given}").newest(ranks)
            assert checkpoint is not None
            engine.import_tensors(checkpoint.read, FACTORED, STEPS)
        save(engine, ranks, f"{directory}/adafactor-{stage}", STEPS)
        found["adafactor"][str(stage)] = losses + train(engine, ranks, range(STEPS, STEPS + 2))
    # Muon orthogonalises whole matrices, whoever holds which slice; its state goes from stage to stage
    found["muon"], found["muon updates"] = {}, {}
    for stage, given, dtype in ((3, None, "fp32"), (2, None, "fp32"), (1, 3, "fp32"), (3, 1, "fp32"), (1, None, "bf16"),
                                (2, None, "bf16"), (3, None, "bf16")):  # fmt: skip
        config = experiment(stage, dtype, optimizer="muon")
        engine = build_engine(Wide(), config, ranks, 1)
        losses = train(engine, ranks, range(1))
        found["muon updates"][f"{dtype}/{stage}"] = first_updates(engine.export_tensors(), config)
        losses += train(engine, ranks, range(1, STEPS))
        if given is not None:
            engine = build_engine(Wide(), experiment(stage, dtype, optimizer="muon"), ranks, 1)
            checkpoint = CheckpointStore(f"{directory}/muon-{given}").newest(ranks)
            assert checkpoint is not None
            engine.import_tensors(checkpoint.read, MOMENTA, STEPS)
        if dtype == "fp32":
            save(engine, ranks, f"{directory}/muon-{stage}", STEPS)
        found["muon"][f"{dtype}/{stage}"] = losses + train(engine, ranks, range(STEPS, STEPS + 2))
    # moments of 8 bits: the state goes out as fp32 and comes back bit for bit
    for stage in (1, 3):
        engine = build_engine(Net(), experiment(stage, optimizer="adamw8bit"), ranks, 1)
        found[f"8 bit/{stage}"] = train(engine, ranks, range(STEPS))
        store = save(engine, ranks, f"{directory}/8bit-{stage}", STEPS)
        go_on = train(engine, ranks, range(STEPS, STEPS + 2))
        fresh = build_engine(Net(), experiment(stage, optimizer="adamw8bit"), ranks, 1)
        checkpoint = store.newest(ranks)
        assert checkpoint is not None
        fresh.import_tensors(checkpoint.read, STATES, STEPS)
        found[f"8 bit repeats/{stage}"] = train(fresh, ranks, range(STEPS, STEPS + 2)) == go_on
    # offloaded: optimizer states in host memory, which on a CPU is where they were
    for stage in (2, 3):
        config = experiment(stage)
        config.zero.offload_optimizer, config.zero.offload_parameters = True, stage == 3
        found["losses"][f"offload/{stage}"] = train(build_engine(Net(), config, ranks, 1), ranks, range(STEPS))
    return found


def one_rank(ranks: Ranks, directory: str) -> dict[str, Any]:
    found = {}
    for source, target in (("3-1", 1), ("1-1", 3), ("2-1", 0)):
        engine = build_engine(Net(), experiment(target), ranks, 2)
        checkpoint = CheckpointStore(f"{directory}/{source}").newest(ranks)
        assert checkpoint is not None
        engine.import_tensors(checkpoint.read, STATES, STEPS)
        found[f"{source} -> {target}"] = train(engine, ranks, range(STEPS, STEPS + 2), 2)
    return found


# ------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def found(directory: Path) -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, directory / "two", str(directory))


@pytest.mark.parametrize("key", [f"{stage}/{accumulate}" for stage, accumulate in product((1, 2, 3), (1, 2))])
def test_two_processes_equal_plain_pytorch(found: list[dict[str, Any]], key: str) -> None:
    assert found[0]["losses"][key] == pytest.approx(reference(STEPS)["losses"], abs=1e-6)
    assert found[0]["differences"][key] < 1e-5, "weights and averages in the checkpoint"


def test_the_plain_engine_is_the_reference() -> None:
    engine = build_engine(Net(), experiment(0), Ranks(), 2)
    assert train(engine, Ranks(), range(STEPS), 2) == pytest.approx(reference(STEPS)["losses"], abs=1e-6)
    tensors = engine.export_tensors()
    for name, wanted in reference(STEPS)["tensors"].items():
        assert torch.allclose(tensors[name], wanted, atol=1e-6), name
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    snapshot = engine.snapshot()
    train(engine, Ranks(), range(5, 6), poisoned=5)
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot.assemble().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.export_tensors().items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_state_survives_export_and_import(found: list[dict[str, Any]], stage: int) -> None:
    for rank in found:
        assert rank[f"repeats/{stage}"], "going on from the imported state repeats bit for bit"
        assert rank[f"snapshot/{stage}"], "a snapshot does not move with the next step"
        assert rank[f"comes back/{stage}"], "the raw weights come back after the averaged ones"
        assert rank[f"skips/{stage}"], "a gradient that is not finite changes nothing"
    net = Net()
    averages = reference(STEPS + 2)["tensors"]
    net.load_state_dict({n: averages[f"ema/1/{n}"] for n, _ in net.named_parameters()}, strict=False)
    x, log_snr, text, _ = batch(0)
    assert found[0][f"averaged/{stage}"] == pytest.approx(net(x, log_snr, text).double().sum().item(), abs=1e-3)


def test_ranks_share_the_bytes(found: list[dict[str, Any]]) -> None:
    for key in found[0]["balance"]:
        first, second = (rank["balance"][key] for rank in found)
        assert max(first, second) < 0.7 * (first + second), key


def test_any_zero_stage_continues_from_any_other(found: list[dict[str, Any]]) -> None:
    assert all(difference < 1e-6 for difference in found[0]["resumed"].values()), found[0]["resumed"]


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_with_fp32_masters(found: list[dict[str, Any]], stage: int) -> None:
    assert found[0][f"bf16/{stage}"] == pytest.approx(reference(STEPS)["losses"], rel=0.02)
    assert found[0][f"bf16/{stage}"] != pytest.approx(reference(STEPS)["losses"], rel=1e-5), "it did run in bf16"
    assert found[0][f"bf16 repeats/{stage}"]


def test_two_ranks_to_one(found: list[dict[str, Any]], directory: Path) -> None:
    (resumed,) = run_ranks(one_rank, 1, directory / "one", str(directory))
    later = reference(STEPS + 2)["losses"][STEPS:]
    for key, losses in resumed.items():
        assert losses == pytest.approx(later, abs=1e-6), key


def test_adafactor_at_every_stage(found: list[dict[str, Any]], directory: Path) -> None:
    engine = build_engine(Net(), experiment(0, optimizer="adafactor"), Ranks(), 1)
    wanted = train(engine, Ranks(), range(STEPS + 2))
    assert wanted != pytest.approx(reference(STEPS + 2)["losses"], rel=1e-3), "it is another optimizer"
    for stage, losses in found[0]["adafactor"].items():
        assert losses == pytest.approx(wanted, abs=1e-6), stage
    engine = build_engine(Net(), experiment(0, optimizer="adafactor"), Ranks(), 1)
    checkpoint = CheckpointStore(str(directory / "adafactor-3")).newest()
    assert checkpoint is not None
    engine.import_tensors(checkpoint.read, FACTORED, STEPS)
    assert train(engine, Ranks(), range(STEPS, STEPS + 2)) == pytest.approx(wanted[STEPS:], abs=1e-6)


def test_muon_at_every_stage(found: list[dict[str, Any]], directory: Path) -> None:
    """The same losses as the dense version in one process, in bf16 up to rounding; and its updates are orthogonal."""
    engine = build_engine(Wide(), experiment(0, optimizer="muon"), Ranks(), 1)
    wanted = train(engine, Ranks(), range(STEPS + 2))
    other = train(build_engine(Wide(), experiment(0), Ranks(), 1), Ranks(), range(STEPS + 2))
    assert wanted != pytest.approx(other, rel=1e-3), "it is another optimizer"
    for key, losses in found[0]["muon"].items():
        assert losses == pytest.approx(wanted, **({"rel": 0.02} if "bf16" in key else {"abs": 1e-5})), key
    for key in found[0]["muon updates"]:
        updates = {name: values for rank in found for name, values in rank["muon updates"][key].items()}
        assert sorted(updates) == sorted(MATRICES), key
        for name, (fourth, first) in updates.items():
            assert fourth > 0.65 and first < 1.2, (key, name, fourth, first)
    engine = build_engine(Wide(), experiment(0, optimizer="muon"), Ranks(), 1)
    checkpoint = CheckpointStore(str(directory / "muon-3")).newest()
    assert checkpoint is not None
    engine.import_tensors(checkpoint.read, MOMENTA, STEPS)
    assert train(engine, Ranks(), range(STEPS, STEPS + 2)) == pytest.approx(wanted[STEPS:], abs=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_moments_of_8_bits(found: list[dict[str, Any]], stage: int) -> None:
    assert found[0][f"8 bit/{stage}"] == pytest.approx(reference(STEPS)["losses"], rel=0.02)
    assert found[0][f"8 bit/{stage}"] != pytest.approx(reference(STEPS)["losses"], rel=1e-6), "they were packed"
    assert found[0][f"8 bit repeats/{stage}"]
    engine = build_engine(Net(), experiment(0, optimizer="adamw8bit"), Ranks(), 1)
    assert train(engine, Ranks(), range(STEPS)) == pytest.approx(reference(STEPS)["losses"], rel=0.02)


@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_changes_no_number(found: list[dict[str, Any]], stage: int) -> None:
    assert found[0]["losses"][f"offload/{stage}"] == pytest.approx(reference(STEPS)["losses"], abs=1e-6)


def test_bf16_needs_zero() -> None:
    with pytest.raises(ConfigError, match=r"precision\.dtype=bf16: it needs zero\.stage"):
        build_engine(Net(), experiment(0, "bf16"), Ranks(), 1)
