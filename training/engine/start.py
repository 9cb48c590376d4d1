"""How a rank gets its process groups and its engine. DeepSpeed is imported only where ZeRO is asked for."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta

import torch

from training.config.experiment import Experiment
from training.engine.base import Engine
from training.engine.plain import PlainEngine
from training.processes.meeting import check_cards, meet, own_card
from training.processes.ranks import Ranks


def init_distributed(ranks: Ranks, config: Experiment) -> Ranks:
    """Joins the process group and returns the ranks with their device, groups and store; nothing to join at
    `zero.stage=0`.

    Every group gets `train.timeout_first_s`; after the first step `set_timeout` lowers it.

    Raises:
        ConfigError: some rank has not the device that was asked for, or may not open enough files.
        RankLost: the ranks did not meet.
    """
    card, seconds = own_card(ranks), config.train.timeout_first_s
    store, cards = (None, [card]) if ranks.world_size == 1 else meet(ranks, card, seconds)
    check_cards(cards, config.cluster)
    if card.device != "cpu":
        torch.cuda.set_device(card.device)
        same_bits = config.train.deterministic_reduction
        torch.backends.cudnn.benchmark = not same_bits  # all steps have the same shapes: the search pays once
        torch.backends.cudnn.deterministic = same_bits
    ranks = replace(ranks, device=card.device, store=store)
    if config.zero.stage == 0:
        return ranks
    from training.engine.deepspeed import join_groups

    timeout, dist = timedelta(seconds=seconds), torch.distributed
    # DeepSpeed takes this for the number of the GPU: that is another one where a process sees its own GPU alone.
    os.environ["LOCAL_RANK"] = card.device.partition(":")[2] or str(ranks.local_rank)
    dist.init_process_group(
        "gloo" if card.device == "cpu" else "nccl",
        store=dist.HashStore() if store is None else dist.PrefixStore("groups", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
    )
    join_groups()
    control, background = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return replace(ranks, control=control, background=background)


def shut_down() -> None:
    """Leaves the process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def build_engine(model: torch.nn.Module, config: Experiment, ranks: Ranks, accumulate: int = 1) -> Engine:
    """The engine that `zero.stage` asks for. `accumulate`: micro-batches per optimizer step."""
    if config.zero.stage == 0:
        return PlainEngine(model, config, ranks, accumulate)
    from training.engine.deepspeed import ZeroEngine

    return ZeroEngine(model, config, ranks, accumulate)
