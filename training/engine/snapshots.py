"""Copies of the training state in host memory, from which checkpoints are written while training continues."""

from __future__ import annotations

import threading

import torch

from training.optim.pieces import Assembler
from training.processes.ranks import Ranks


class HostSnapshot:
    """The training state at one step. `copy` copies it to host memory in the writing thread, during the next forward
    and backward passes; the engine makes sure that this is done before the next optimizer step changes the state.

    Args:
        live: the tensors of the state by name.
        host: host memory of earlier snapshots, to be reused.
    """

    def __init__(self, live: dict[str, torch.Tensor], host: dict[str, torch.Tensor] | None = None) -> None:
        self._live: dict[str, torch.Tensor] | None = live
        self._host = {} if host is None else host
        self._names = list(live)
        self._lock = threading.Lock()
        self._device = next((tensor.device for tensor in live.values() if tensor.is_cuda), None)
        if self._device is not None:
            self._ready = torch.cuda.current_stream(self._device).record_event()

    def copy(self) -> None:
        """See Snapshot."""
        with self._lock, torch.no_grad():
            if self._live is None:
                return
            for name, tensor in self._live.items():
                if name not in self._host:
                    self._host[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).detach()
            if self._device is None:
                self._move(self._live)
            else:
                stream = torch.cuda.Stream(self._device)
                stream.wait_event(self._ready)
                with torch.cuda.stream(stream):
                    self._move(self._live)
                stream.synchronize()
            self._live = None

    def _move(self, live: dict[str, torch.Tensor]) -> None:
        for name, tensor in live.items():
            self._host[name].copy_(tensor, non_blocking=tensor.is_cuda)

    def assemble(self) -> dict[str, torch.Tensor]:
        """See Snapshot; not collective."""
        self.copy()
        return {name: self._host[name] for name in self._names}


class ShardedSnapshot(HostSnapshot):
    """A snapshot of which each rank holds pieces of tensors."""

    def __init__(
        self,
        flats: dict[str, list[torch.Tensor]],
        whole: dict[str, torch.Tensor],
        host: dict[str, torch.Tensor],
        assembler: Assembler,
        ranks: Ranks,
    ) -> None:
        named = {f"flat {i} {kind}": flat.detach() for kind, tensors in flats.items() for i, flat in enumerate(tensors)}
        super().__init__({**named, **whole}, host)
        self._whole, self._assembler, self._ranks = list(whole), assembler, ranks
        self._flats = {kind: [f"flat {i} {kind}" for i in range(len(tensors))] for kind, tensors in flats.items()}

    def assemble(self) -> dict[str, torch.Tensor]:
        """See Snapshot."""
        self.copy()
        tensors = {name: self._host[name] for name in self._whole}
        for kind, names in self._flats.items():
            whole = self._assembler.assemble([self._host[name] for name in names], self._ranks.background)
            tensors.update((f"{kind}/{name}", tensor) for name, tensor in whole.items())
        return tensors
