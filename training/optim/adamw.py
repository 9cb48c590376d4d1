"""torch's AdamW (Loshchilov & Hutter 2019, "Decoupled weight decay regularization")."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from training.config.experiment import OptimizerConfig
from training.optim.base import TrainOptimizer

# torch's wrapper around it disables gradients, which they are here anyway, and imports the compiler: 5 s
_update = getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step)


class AdamW(TrainOptimizer, torch.optim.AdamW):
    """AdamW with two moments in fp32; elementwise, so any slice of the weights is updated exactly as within the
    whole."""

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
        """Run torch's step."""
        _update(self)
