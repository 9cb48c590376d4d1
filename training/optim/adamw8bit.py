"""AdamW with 8-bit moments (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization").

Blocks of 256 values share a scale, their largest magnitude; a value is rounded to the nearest of 256 levels that are
denser towards zero (the paper's dynamic tree). This implementation differs in two points: it stores the square root of
the second moment (a second moment that rounds to zero would blow up a step; for the root this happens below 1e-13 of
the block's largest, not 1e-7), and both ends of the table are exact, so that moments written to a checkpoint as fp32
and read back are bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from training.config.experiment import OptimizerConfig
from training.optim.base import TrainOptimizer

BLOCK = 256
CHUNK = 1 << 22
"""Number of values to unpack at a time."""


@lru_cache
def places(signed: bool) -> tuple[float, ...]:
    """Return the 256 values that codes stand for, ascending, from -1 (signed) or 0 to 1."""
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (exponent + (not signed)) + 1, dtype=torch.float64)
        middle = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        found += middle + [-value for value in middle] * signed
    if signed:
        found.remove(max(value for value in found if value < 0))  # make room for -1
        found.append(-1.0)
    return tuple(sorted(found))


class Packed:
    """A flat fp32 tensor of n values, stored in n bytes and a scale per block; initially zero."""

    def __init__(self, size: int, signed: bool, device: torch.device) -> None:
        self.codes = torch.zeros(-(-size // BLOCK) * BLOCK, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(len(self.codes) // BLOCK, device=device)
        self.size = size
        self._places = torch.tensor(places(signed), device=device)
        self._edges = (self._places[:-1] + self._places[1:]) / 2
        self.codes.fill_(places(signed).index(0.0))

    def get(self, start: int, stop: int) -> Tensor:
        """Return the values [start, stop) in fp32; `start` must be a multiple of BLOCK."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        values = self._places[self.codes[first * BLOCK : last * BLOCK].int()].view(-1, BLOCK)
        return values.mul_(self.scale[first:last, None]).view(-1)[: stop - start]

    def put(self, start: int, values: Tensor) -> None:
        """Set the values from `start` on, which must be a multiple of BLOCK."""
        first, last = start // BLOCK, -(-(start + len(values)) // BLOCK)
        whole = torch.zeros((last - first) * BLOCK, device=values.device)
        whole[: len(values)] = values
        blocks = whole.view(-1, BLOCK)
        scale = blocks.abs().amax(1)
        shares = blocks / torch.where(scale > 0, scale, 1.0)[:, None]
        self.codes[first * BLOCK : last * BLOCK] = torch.bucketize(shares.view(-1), self._edges, out_int32=True).byte()
        self.scale[first:last] = scale

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Return the (start, stop) of chunks whose fp32 values fit in a small buffer."""
        return ((start, min(start + CHUNK, self.size)) for start in range(0, self.size, CHUNK))


class AdamW8bit(TrainOptimizer):
    """AdamW with packed moments; `sliced` and `set_sliced` convert them from and to fp32."""

    SLICED = ("exp_avg", "exp_avg_sq")

    @classmethod
    def build(cls, parameters: Iterable[Tensor], config: OptimizerConfig, fused: bool) -> AdamW8bit:
        """See TrainOptimizer.build."""
        beta1, beta2 = config.betas
        return cls(parameters, lr=config.lr, betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay)

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._packed: dict[Tensor, dict[str, Packed]] = {}

    def _of(self, p: Tensor) -> dict[str, Packed]:
        if p not in self._packed:
            self._packed[p] = {kind: Packed(p.numel(), kind == "exp_avg", p.device) for kind in self.SLICED}
        return self._packed[p]

    def begin(self, p: Tensor) -> None:
        """See TrainOptimizer.begin; nothing is unpacked."""
        self.count(p, 0)
        self._of(p)

    def sliced(self, p: Tensor, kind: str) -> Tensor:
        """See TrainOptimizer.sliced; moments are unpacked."""
        if kind not in self.SLICED:
            return super().sliced(p, kind)
        packed = self._of(p)[kind]
        values = packed.get(0, packed.size)
        return (values if kind == "exp_avg" else values.square()).view(p.shape)

    def set_sliced(self, p: Tensor, kind: str, values: Tensor) -> None:
        """See TrainOptimizer.set_sliced; moments are packed."""
        if kind not in self.SLICED:
            return super().set_sliced(p, kind, values)
        flat = values.reshape(-1)
        self._of(p)[kind].put(0, flat if kind == "exp_avg" else flat.sqrt())

    def states(self, p: Tensor) -> dict[str, Tensor]:
        """See TrainOptimizer.states."""
        found = super().states(p)
        return {**found, **{kind: self.sliced(p, kind) for kind in self.SLICED}} if self.state[p] else found

    @classmethod
    def state_bytes(cls, shapes: Sequence[tuple[int, ...]], share: int) -> int:
        """See TrainOptimizer.state_bytes; one byte per value, and a scale per block."""
        return len(cls.SLICED) * share * (BLOCK + 4) // BLOCK

    def update(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", torch.zeros(())) + 1
                step = float(state["step"])
                rate, correction = group["lr"] / (1 - beta1**step), math.sqrt(1 - beta2**step)
                mean, root = (self._of(p)[kind] for kind in self.SLICED)
                weights, gradients = p.view(-1), p.grad.view(-1)
                for start, stop in mean.chunks():
                    weight, gradient = weights[start:stop], gradients[start:stop]
                    average = mean.get(start, stop).lerp_(gradient, 1 - beta1)
                    square = root.get(start, stop).square_().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                    square.sqrt_()
                    mean.put(start, average)
                    root.put(start, square)
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.addcdiv_(average, square.div_(correction).add_(group["eps"]), value=-rate)
