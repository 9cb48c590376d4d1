"""Sums, and whole runs, that are bit-identical on any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import forks
from tests.training.runs import chaos, curve, experiment, newest, same_tensors
from training.engine.fixed_order import Tree, exact_squares, norm_of, partial_sums, peak_of


@pytest.mark.parametrize("leaves", [1, 2, 3, 6, 8, 12, 13, 64])
def test_a_tree_pairs_the_same_leaves_in_any_order_on_any_number_of_ranks(leaves: int) -> None:
    """The sum records its pairs as words, so that sums over different pairs are different words."""

    def add(a: str, b: str) -> str:
        return f"({a}+{b})"

    whole: Tree[str] = Tree(leaves, add)
    for leaf in range(leaves):
        whole.put((0, leaf), str(leaf))
    for world_size in (w for w in range(1, leaves + 1) if leaves % w == 0):
        last: Tree[str] = Tree(leaves, add)
        for rank in reversed(range(world_size)):
            share, own = leaves // world_size, Tree(leaves, add)
            for leaf in reversed(range(rank * share, (rank + 1) * share)):
                own.put((0, leaf), str(leaf))
            assert sorted(own.nodes) == partial_sums(rank, world_size, leaves)
            for node, value in own.nodes.items():
                last.put(node, value)
        assert last.root() == whole.root()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_norm_is_the_same_however_the_values_are_cut(scale: float) -> None:
    values = torch.randn(10_001) * 10.0 ** torch.randint(-6, 4, (10_001,)) * scale
    peak, count = float(peak_of([values], "cpu")), len(values)

    def norm(*parts: torch.Tensor) -> float:
        sums = sum(exact_squares([part], peak, count, "cpu") for part in parts)
        return norm_of(sums.tolist(), peak, count)  # type: ignore[union-attr]

    assert norm(values) == norm(values[:777], values[777:]) == norm(*values.flip(0).split(13))
    assert norm(values) == pytest.approx(math.sqrt(math.fsum(float(v) ** 2 for v in values)), rel=1e-12)
    assert math.isinf(float(peak_of([values, torch.tensor([float("nan")])], "cpu")))


def deterministic(tmp_path: Path, shards: str, **changes: Any) -> Any:
    tmp_path.mkdir(exist_ok=True)
    settings = {"data__micro_batch": 1, "train__steps": 6, "optimizer__lr": 2e-3, "ema__decays": [0.9], **changes}
    return experiment(tmp_path, shards, train__deterministic_reduction=True, **settings)


@pytest.mark.parametrize(
    ("dtype", "engines"),
    [("fp32", [(0, 1), (3, 1), (1, 2), (3, 4)]), ("bf16", [(1, 1), (2, 2), (3, 4)])],
)
def test_any_number_of_ranks_trains_the_same_bits(
    tmp_path: Path, shards: str, dtype: str, engines: list[tuple[int, int]]
) -> None:
    """Losses, norms, weights, moments and averages after steps at a high learning rate, of (ZeRO stage, ranks)."""
    configs = [
        deterministic(tmp_path / f"{stage}-{ranks}", shards, zero__stage=stage, precision__dtype=dtype)
        for stage, ranks in engines
    ]
    for config, (_, ranks) in zip(configs, engines, strict=True):
        running = forks.start(config, ranks)
        assert running.codes() == [0] * ranks, running.text
    for config in configs[1:]:
        assert curve(config) == curve(configs[0])
        assert same_tensors(newest(config), newest(configs[0]))


def test_a_run_continued_with_other_ranks_equals_the_uninterrupted_run(tmp_path: Path, shards: str) -> None:
    whole = deterministic(tmp_path / "whole", shards, zero__stage=1)
    nan = {"what": "nan", "rank": 0, "step": 2}
    assert chaos(whole, 1, nan).codes() == [0]
    cut = deterministic(tmp_path / "cut", shards, zero__stage=1)
    running = chaos(cut, 2, nan, {**nan, "rank": 1}, {"what": "sigterm", "rank": 1, "step": 4})
    assert running.codes() == [75, 75] and "step 2 was skipped" in running.text, running.text
    cut.zero.stage = 2
    assert forks.start(cut, 4).codes() == [0] * 4
    assert curve(cut) == curve(whole) and same_tensors(newest(cut), newest(whole))
    assert newest(cut).meta["updates"] == 5
