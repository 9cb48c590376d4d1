"""A cascade of two tiny random stages (16 -> 32 px), for the tests of everything built on one."""

from __future__ import annotations

import torch

from training.cascade.cascade import Cascade, Stage
from training.config.diffusion import DiffusionConfig, SamplerConfig
from training.config.experiment import ModelConfig, StageConfig, TextConfig
from training.config.unet import for_stage
from training.model.unet import UNet
from training.text.encoder import build_text_encoder

TEXT = TextConfig(dim=32, max_tokens=10)


def stage_config(name: str, image_size: int, low_res_size: int = 0, **diffusion) -> StageConfig:
    """A stage of the tiny presets with 3 sampler steps and guidance 2."""
    return StageConfig(
        name=name,
        image_size=image_size,
        low_res_size=low_res_size,
        model=ModelConfig(preset="tiny_sr" if low_res_size else "tiny_base"),
        diffusion=DiffusionConfig(parametrization="x0", max_weight=4.0, **diffusion),
        sampler=SamplerConfig(steps=3, guidance=2.0),
    )


def random_unet(config: StageConfig, text: TextConfig = TEXT, seed: int = 0) -> UNet:
    """Random weights everywhere, also where a fresh U-Net has zeros: its output depends on all of its inputs."""
    torch.manual_seed(seed)
    unet = UNet(for_stage(config, text.dim))
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.3 * parameter[0].numel() ** -0.5)
    return unet.eval().requires_grad_(False)


def tiny_cascade(base: int = 16, factor: int = 2, text: TextConfig = TEXT, **diffusion) -> Cascade:
    """Stages `base` (16 px) and `sr` (32 px) by default."""
    configs = [stage_config("base", base, **diffusion), stage_config("sr", base * factor, base, **diffusion)]
    stages = [Stage(c, random_unet(c, text, i), {"run": f"runs/{c.name}", "step": 7}) for i, c in enumerate(configs)]
    return Cascade(stages, build_text_encoder(text), text)
