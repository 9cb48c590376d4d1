"""From the network's output to x0: shared by the objective and the samplers.

Every parametrisation is x0 = c_skip z + c_out F(c_in z) with its own three coefficients (Karras et al. 2022, eq. 7,
written for variance-preserving z). Low-res augmentation and guidance are here too.

    B pictures   z, x0, low_res (B, 3, H, W) fp32 in about [-1, 1]   log_snr (B,) fp32
    text (B, T, D)   text_mask (B, T) bool
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config.diffusion import DiffusionConfig
from training.diffusion.schedule import Schedule, add_noise, alpha_sigma, per_sample

Denoise = Callable[[Tensor, Any], Tensor]
"""Function from z (B, 3, H, W) and a log-SNR (one number, or fp32 (B,)) to the estimate of x0."""
EDGE = 1e-5
"""By how much a log-SNR may lie outside the guidance interval: several times the rounding of fp32."""


@dataclass(frozen=True)
class Scaling:
    """Coefficients of x0 = c_skip z + c_out F(c_in z), one value per sample each. All are None for the x0
    parametrisation; c_in is None where it is 1."""

    c_in: Tensor | None
    c_skip: Tensor | None
    c_out: Tensor | None


def scaling(parametrization: str, log_snr: Tensor, sigma_data: float = 0.5) -> Scaling:
    """Return the coefficients of a parametrisation at log_snr (any shape)."""
    alpha, sigma = alpha_sigma(log_snr)
    if parametrization == "x0":
        return Scaling(None, None, None)
    if parametrization == "eps":
        return Scaling(None, 1 / alpha, -sigma / alpha)
    if parametrization == "v":
        return Scaling(None, alpha, -sigma)
    spread = (sigma.square() + (sigma_data * alpha).square()).sqrt()
    return Scaling(1 / spread, alpha * (sigma_data / spread).square(), sigma * sigma_data / spread)


def target(parametrization: str, x0: Tensor, eps: Tensor, log_snr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Return the regression target of F, in closed forms that avoid cancellation; log_snr broadcasts against x0."""
    alpha, sigma = alpha_sigma(log_snr)
    if parametrization == "x0":
        return x0
    if parametrization == "eps":
        return eps
    if parametrization == "v":
        return alpha * eps - sigma * x0
    spread = (sigma.square() + (sigma_data * alpha).square()).sqrt()
    return (sigma * x0 - sigma_data**2 * alpha * eps) / (sigma_data * spread)


def to_unit(pictures: Tensor) -> Tensor:
    """Convert uint8 pictures to fp32 in [-1, 1]; floating-point pictures must already be in that range."""
    return pictures.to(torch.float32) / 127.5 - 1 if pictures.dtype == torch.uint8 else pictures.to(torch.float32)


def upsample(low_res: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Up-sample pictures to `size` (a side, or (H, W)), bicubic with `align_corners=False`, for training and sampling
    alike."""
    shape = (size, size) if isinstance(size, int) else size
    if tuple(low_res.shape[-2:]) == shape:
        return low_res
    return F.interpolate(low_res, size=shape, mode="bicubic", align_corners=False)


def augment(low_res: Tensor, level: Tensor, noise: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Apply noise conditioning augmentation to the low-res picture (Ho et al. 2021; Imagen, section 2.4).

    This happens before up-sampling: noise at the low resolution hides the errors of the previous stage, noise added
    after up-sampling would average out.

    Args:
        low_res: (B, 3, h, w) in [-1, 1].
        level: (B,) times in [0, 1]; 0 returns the picture bit for bit.
        noise: standard normal, shaped like low_res and independent of the diffusion noise.

    Returns:
        The noised picture and its log-SNR (B,), on which the network is conditioned.
    """
    aug_log_snr = schedule.unshifted().log_snr(level)
    noised = add_noise(low_res, noise, aug_log_snr)
    return torch.where(per_sample(level) > 0, noised, low_res), aug_log_snr


def network_output(
    model: Callable[..., Tensor],
    z: Tensor,
    log_snr: Tensor,
    text: Tensor,
    text_mask: Tensor,
    *,
    config: DiffusionConfig,
    low_res: Tensor | None = None,
    aug_log_snr: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Return the raw network output F(c_in z), fp32 (B, 3, H, W). Arguments as for `UNet.forward`."""
    c_in = scaling(config.parametrization, per_sample(log_snr), config.sigma_data).c_in
    told = () if sizes is None else (sizes,)
    scaled = z if c_in is None else c_in * z
    return model(scaled, log_snr, text, text_mask, low_res, aug_log_snr, *told).to(torch.float32)


def predict_x0(
    model: Callable[..., Tensor],
    z: Tensor,
    log_snr: Tensor,
    text: Tensor,
    text_mask: Tensor,
    *,
    config: DiffusionConfig,
    low_res: Tensor | None = None,
    aug_log_snr: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Return the network's estimate of x0, fp32 (B, 3, H, W). Arguments as for `UNet.forward`."""
    given = {"low_res": low_res, "aug_log_snr": aug_log_snr, "sizes": sizes}
    out = network_output(model, z, log_snr, text, text_mask, config=config, **given)
    return x0_of(out, z, log_snr, config, low_res)


def x0_of(out: Tensor, z: Tensor, log_snr: Tensor, config: DiffusionConfig, low_res: Tensor | None = None) -> Tensor:
    """Convert a network's raw output to the estimate of x0, (B, 3, H, W)."""
    scale = scaling(config.parametrization, per_sample(log_snr), config.sigma_data)
    x0 = out if scale.c_out is None or scale.c_skip is None else scale.c_skip * z + scale.c_out * out
    return x0 + low_res if config.residual and low_res is not None else x0


def guided(
    model: Callable[..., Tensor],
    text: Tensor,
    text_mask: Tensor,
    *,
    config: DiffusionConfig,
    schedule: Schedule,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    negative: tuple[Tensor, Tensor] | None = None,
    low_res: Tensor | None = None,
    aug_log_snr: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Denoise:
    """Return a denoiser with classifier-free guidance, x0 = x0_u + w (x0_c - x0_u) (Ho & Salimans 2022), that runs both
    branches in one forward pass.

    Args:
        guidance: w; 1 gives exactly the conditional model, 0 exactly the unconditional one.
        interval: first and last time t at which guidance applies (Kynkaanniemi et al. 2024); outside, w = 1. A step
            of a grid that falls on one of them is inside, whatever the rounding of its log-SNR (EDGE).
        negative: text and mask to steer away from; None: the unconditional model.
        low_res, aug_log_snr: the noised low-res picture and its log-SNR, shared by both branches and all steps.
        sizes: (B, 6), the sizes that both branches are conditioned on, see `SizeEmbedding`.
    """
    null_text, null_mask = negative or (torch.zeros_like(text), torch.zeros_like(text_mask))
    noisiest, cleanest = schedule.log_snr_at(interval[1]) - EDGE, schedule.log_snr_at(interval[0]) + EDGE

    given = {"low_res": low_res, "aug_log_snr": aug_log_snr, "sizes": sizes}

    def twice(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else torch.cat([rows, rows])

    def denoise(z: Tensor, log_snr: float | Tensor) -> Tensor:
        w: float | Tensor
        if isinstance(log_snr, Tensor):
            level, w = log_snr, guidance
            if guidance != 1.0 and interval != (0.0, 1.0):
                inside = (level >= noisiest) & (level <= cleanest)
                w = per_sample(torch.where(inside, guidance, 1.0))
        else:
            level = torch.full((len(z),), log_snr, dtype=torch.float32, device=z.device)
            w = guidance if noisiest <= log_snr <= cleanest else 1.0
        if not isinstance(w, Tensor) and w in (0.0, 1.0):
            words, mask = (text, text_mask) if w == 1.0 else (null_text, null_mask)
            return predict_x0(model, z, level, words, mask, config=config, **given)
        both = predict_x0(
            model,
            torch.cat([z, z]),
            torch.cat([level, level]),
            torch.cat([text, null_text]),
            torch.cat([text_mask, null_mask]),
            config=config,
            **{name: twice(value) for name, value in given.items()},
        )
        conditional, unconditional = both.chunk(2)
        return unconditional + w * (conditional - unconditional)

    return denoise
