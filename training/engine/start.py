"""Sets up a rank's process groups and its engine. Imports DeepSpeed only if ZeRO is used."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from training.config.experiment import Experiment
from training.engine.base import Engine
from training.engine.plain import PlainEngine
from training.processes.endings import DeviceLost, blame
from training.processes.meeting import check_cards, meet, own_card
from training.processes.ranks import Ranks


def init_distributed(ranks: Ranks, config: Experiment) -> Ranks:
    """Join the process group, and return the ranks with their device, groups and store (no groups with `zero.stage=0`).

    Every group starts with the time-out `train.timeout_first_s`; after the first step `set_timeout` lowers it.

    Raises:
        DeviceLost: a node has lost a GPU.
        ConfigError: the ranks lack the requested devices, or may not open enough files.
        RankLost: some ranks did not arrive.
    """
    card, seconds = own_card(ranks), config.train.timeout_first_s
    store, cards = (None, [card]) if ranks.world_size == 1 else meet(ranks, card, seconds)
    try:
        check_cards(cards, config.cluster)
    except DeviceLost as error:  # every rank raises it, so each blames the same node
        blame(ranks.rank, error)
        raise
    if card.device != "cpu":
        torch.cuda.set_device(card.device)
        same_bits = config.train.deterministic_reduction
        torch.backends.cudnn.benchmark = not same_bits  # all steps have the same shapes, so one search is enough
        torch.backends.cudnn.deterministic = same_bits
    place = f"{card.device} ({card.gpu}) of {card.node}" if card.gpu else card.node
    ranks = replace(ranks, device=card.device, place=place, store=store)
    if config.zero.stage == 0:
        return ranks
    from training.engine.deepspeed import join_groups

    timeout, dist = timedelta(seconds=seconds), torch.distributed
    # DeepSpeed uses this as the index of the GPU, which differs if a process only sees its own GPU.
    os.environ["LOCAL_RANK"] = card.device.partition(":")[2] or str(ranks.local_rank)
    if card.device != "cpu":  # read when the group forms; torch's own tools read what NCCL writes there at a time-out
        logs = Path(config.run.dir).absolute() / "logs"
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{logs}/nccl-rank-")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
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
    """Leave the process group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def build_engine(model: torch.nn.Module, config: Experiment, ranks: Ranks, accumulate: int = 1) -> Engine:
    """Return the engine for `zero.stage`. `accumulate`: micro-batches per rank and optimizer step."""
    if config.zero.stage == 0:
        return PlainEngine(model, config, ranks, accumulate)
    from training.engine.deepspeed import ZeroEngine

    return ZeroEngine(model, config, ranks, accumulate)
