"""The cost of the frozen picture encoder of `repa` and `perceptual`, counted on its structure without weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from training.config.experiment import Experiment
from training.config.unet import UNetConfig
from training.plan.memory import Align, Pass, Passes, live_bytes


@dataclass(frozen=True)
class FeatureCost:
    """Cost of losses on features; all zeros if there are none."""

    parameters: int = 0
    bytes: int = 0
    """Weights in memory, bytes."""
    flops_per_image: float = 0.0
    """FLOPs in addition to the U-Net's training, averaged over the run."""
    passes: Passes | None = None
    """Live bytes of the encoder's own passes."""

    def added_to(self, passes: Passes) -> Passes:
        """Return the U-Net's passes with the encoder's peak added to each moment."""
        if self.passes is None:
            return passes
        most = [one.peak(False) for one in (self.passes.two, self.passes.three)]
        two, three = (
            replace(one, activations=one.activations + more)
            for one, more in zip((passes.two, passes.three), most, strict=True)
        )
        return Passes(two, three)


def align_of(config: Experiment) -> Align | None:
    """Return the hidden width and the number of features of the projection head of `repa`; None if it is off.

    Raises:
        DataError: there is no DINOv2 encoder at dino.path.
    """
    if not config.repa.weight:
        return None
    from training.model.dinov2 import dino_settings

    return config.repa.width, dino_settings(str(config.dino.path)).hidden_size


def feature_cost(config: Experiment, unet: UNetConfig, dtype: torch.dtype) -> FeatureCost:
    """Count the cost of losses on features.

    `repa` takes a forward pass of the encoder over each clean picture until repa.until, and the projection head in
    every step. `perceptual` takes, in every step, a forward pass over each picture, and a forward and a backward pass
    over each estimate.

    Raises:
        DataError: there is no DINOv2 encoder at dino.path.
    """
    align, perceptual = align_of(config), bool(config.perceptual.weight)
    if align is None and not perceptual:
        return FeatureCost()
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Dinov2Model

    from training.model.alignment import Alignment
    from training.model.dinov2 import dino_settings, patch_grid

    settings, size = dino_settings(str(config.dino.path)), config.stage.train_size
    rows, columns = patch_grid(size, size, config.dino.side, settings.patch_size)
    shape = (3, rows * settings.patch_size, columns * settings.patch_size)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = Dinov2Model(settings).eval()
        model(pixel_values=torch.empty(1, *shape))
    once, parameters = counter.get_total_flops(), sum(p.numel() for p in model.parameters())
    passes = 3.0 if perceptual else min(config.repa.until, config.train.steps) / config.train.steps
    places, layers = (size // unet.divisor) ** 2, 0
    if align is not None:
        with torch.device("meta"):
            layers = sum(p.numel() for p in Alignment(unet.widths[-1], *align).parameters() if p.ndim > 1)
    return FeatureCost(
        parameters,
        parameters * dtype.itemsize,
        passes * once + 3 * 2 * layers * places,
        Passes(*(_follow(settings, shape, dtype, batch, learn=perceptual) for batch in (2, 3))),
    )


def _follow(settings: Any, shape: tuple[int, ...], dtype: torch.dtype, batch: int, *, learn: bool) -> Pass:
    """Follow a forward pass over `batch` pictures, with `learn` also the backward pass."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import Dinov2Model

    with torch.device("meta"):
        model = Dinov2Model(settings).eval().requires_grad_(False).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        live = live_bytes()
        pictures = torch.empty(batch, *shape, dtype=dtype, requires_grad=learn)
        with live, torch.set_grad_enabled(learn):
            features = model(pixel_values=pictures).last_hidden_state
            if learn:
                features.mean().backward()
    return Pass(np.array(live.activations), np.array(live.gradients), live.largest)
