"""Communication between the ranks of a run, besides gradients.

Everything that happens repeatedly (saving, rolling back, drawing, measuring) sends plain tensors: numbers, rows of
equal shape, or JSON as bytes. Objects are only pickled while a run starts (`gather_objects`, `RankTeam`), and to send
errors, once it is known that some rank has one.

Importing this file does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.common.team import Team
from training.processes.endings import DeviceLost, blame, device_lost
from training.processes.ranks import Ranks

if TYPE_CHECKING:
    import torch


def gather_objects(value: Any, ranks: Ranks, group: Any = None) -> list[Any]:
    """Return `value` of every rank, in rank order. It is pickled and padded to the largest: use it only at the start of
    a run, and for errors."""
    if ranks.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=group or ranks.control)
    return values


def barrier(ranks: Ranks) -> None:
    """Wait until every rank has called this."""
    if ranks.world_size > 1:
        import torch.distributed as dist

        dist.barrier(group=ranks.control)


def all_sum(values: list[float], ranks: Ranks) -> list[float]:
    """Return the elementwise sum over the ranks, in float64; on GPUs over their group. Main thread only."""
    if ranks.world_size == 1:
        return values
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor, group=None if tensor.is_cuda else ranks.control)
    return tensor.tolist()


def gather_rows(rows: torch.Tensor, ranks: Ranks, group: Any = None) -> torch.Tensor:
    """Concatenate the rows of all ranks, in rank order: CPU tensors (n, ...) of the same shape become (ranks n,
    ...)."""
    if ranks.world_size == 1:
        return rows
    import torch
    import torch.distributed as dist

    found = [torch.empty_like(rows) for _ in range(ranks.world_size)]
    dist.all_gather(found, rows.contiguous(), group=group or ranks.control)
    return torch.cat(found)


def from_main(rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Return rank 0's `rows` on every rank; other ranks pass a CPU tensor of the same shape, which is overwritten."""
    if ranks.world_size > 1:
        import torch.distributed as dist

        dist.broadcast(rows, src=0, group=ranks.control)
    return rows


def gather_bytes(data: bytes, ranks: Ranks, group: Any = None) -> list[bytes]:
    """Return `data` of every rank, in rank order; it must be equally long on all ranks."""
    if ranks.world_size == 1:
        return [data]
    rows = gather_rows(_tensor_of(data)[None], ranks, group)
    return [row.numpy().tobytes() for row in rows]


def gather_json(value: Any, ranks: Ranks, group: Any = None) -> list[Any]:
    """Return on rank 0 the JSON `value` of every rank, in rank order; on other ranks an empty list."""
    if ranks.world_size == 1:
        return [value]
    import torch
    import torch.distributed as dist

    data = json.dumps(value).encode()
    sizes = [int.from_bytes(size, "big") for size in gather_bytes(len(data).to_bytes(8, "big"), ranks, group)]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = _tensor_of(data)
    rows = [torch.empty_like(padded) for _ in sizes] if ranks.is_main else None
    dist.gather(padded, rows, dst=0, group=group or ranks.control)
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows or (), sizes, strict=False)]


def together(call: Callable[[], Any], ranks: Ranks) -> Any:
    """Call `call` on rank 0 and return its result, a JSON value, on every rank (with several ranks, tuples become
    lists). An error on rank 0 is raised on all ranks, so that none waits for the others."""
    if ranks.world_size == 1:
        return call()
    import torch

    data, problem = b"", None
    if ranks.is_main:
        try:
            data = json.dumps(call()).encode()
        except Exception as error:
            problem = error
    errors, size = _errors_and_size(problem, len(data), ranks)
    _raise_first(errors)
    sent = from_main(_tensor_of(data) if ranks.is_main else torch.empty(size, dtype=torch.uint8), ranks)
    return json.loads(sent.numpy().tobytes())


class RankTeam(Team):
    """The ranks of a run as a `Team` that opens a data set. Its methods are collective and pickle what they send: use
    it only at the start of a run."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.rank, self.count = ranks, ranks.rank, ranks.world_size

    def once(self, call: Callable[[], Any]) -> Any:
        """Call `call` on rank 0; return its result, or raise its error, on every rank."""
        box = [each(lambda: call() if self._ranks.is_main else None, self._ranks)]
        if self.count > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(box, src=0, group=self._ranks.control)
        return box[0]

    def everyone(self, call: Callable[[], Any]) -> list[Any]:
        """Call `call` on every rank; return all results, or raise the first error, on every rank."""
        return gather_objects(each(call, self._ranks), self._ranks)


def each(call: Callable[[], Any], ranks: Ranks) -> Any:
    """Call `call` on every rank and return its own result; if it fails on some, raise the first one's error on all, so
    that rank 0 can report it.

    `call` may use `each`, `together` and a `RankTeam` itself: a rank that fails between two of these says so where the
    others next meet.
    """
    value, error = None, None
    try:
        value = call()
    except Exception as caught:
        if ranks.world_size > 1 and _is_known(caught):
            raise
        error = caught
    _raise_first(errors_of_all(error, ranks))
    return value


def errors_of_all(error: Exception | None, ranks: Ranks, group: Any = None) -> list[Exception | None]:
    """Return the error of each rank, in rank order; an empty list if no rank has one, which costs a sum of two
    numbers."""
    if ranks.world_size == 1:
        return [] if error is None else [error]
    return _errors_and_size(error, 0, ranks, group)[0]


def _errors_and_size(
    error: Exception | None, size: int, ranks: Ranks, group: Any = None
) -> tuple[list[Exception | None], int]:
    """Return the errors as `errors_of_all` does, and the sum of the sizes. `each` and `together` both begin with this,
    so that a rank in the one can meet others in the other."""
    import torch
    import torch.distributed as dist

    sums = torch.tensor([int(error is not None), size])
    dist.all_reduce(sums, group=group or ranks.control)
    failed, total = sums.tolist()
    found = gather_objects(_named(error, ranks), ranks, group) if failed else []
    return [_noted(one, ranks) for one in found], total


_KNOWN = "known to all ranks"
"""Attribute of an error that has been raised on all ranks."""


def _raise_first(errors: list[Exception | None]) -> None:
    for problem in errors:
        if problem is not None:
            setattr(problem, _KNOWN, True)
            raise problem


def _is_known(error: BaseException | None) -> bool:
    """Return whether all ranks raise this error, or one of which it is a consequence."""
    return error is not None and (hasattr(error, _KNOWN) or _is_known(error.__cause__))


Problem = TypeVar("Problem", bound=Exception | None)


def _named(error: Exception | None, ranks: Ranks) -> Exception | None:
    """Return the error to send to the other ranks. That of a GPU is replaced by one that names this rank and its node:
    raised elsewhere, it would blame the wrong GPU."""
    return error and (device_lost(error, ranks, shared=True) or error)


def _noted(error: Problem, ranks: Ranks) -> Problem:
    """Return an error received from a rank. All ranks leave a note about a lost GPU, as any of them may end first."""
    if isinstance(error, DeviceLost):
        blame(ranks.rank, error)
    return error


def _tensor_of(data: bytes) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
