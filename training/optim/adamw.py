"""AdamW (Loshchilov & Hutter 2019, "Decoupled weight decay regularization"), torch's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from training.config.experiment import OptimizerConfig
from training.optim.base import TrainOptimizer

# torch's wrapper around it (gradients off, as they are here) imports the compiler: 5 s at the first step
_update = getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step)


class AdamW(TrainOptimizer, torch.optim.AdamW):
    """Two moments in fp32; treats each value by itself, so any slice of the weights moves as the whole would."""

    SLICED = ("exp_avg", "exp_avg_sq")

    @classmethod
    def build(cls, parameters: Iterable[Tensor], config: OptimizerConfig, fused: bool) -> AdamW:
        """See TrainOptimizer.build."""
        beta1, beta2 = config.betas
        return cls(
            parameters,
            lr=config.lr,
            betas=(beta1, beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=fused,
        )

    def update(self) -> None:
        """torch's step."""
        _update(self)
