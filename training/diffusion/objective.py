"""The training objective: add noise to a picture, predict the picture, weight the error.

    B pictures   images, low_res (B, 3, H, W)   text (B, T, D)   text_mask (B, T) bool   positions (B,) int64

All randomness is a function of (seed, position): a sample's loss does not depend on its batch or rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from training.config.diffusion import DiffusionConfig
from training.diffusion import random
from training.diffusion.denoiser import augment, network_output, scaling, target, to_unit, upsample, x0_of
from training.diffusion.distillation import Lesson
from training.diffusion.random import Stream
from training.diffusion.schedule import Schedule, add_noise, alpha_sigma, per_sample

RARE = 1e-3
"""Lower bound on the density that `sigmoid` weighting divides by (per unit of log-SNR), so that rarely drawn noise
levels do not get unbounded weights."""


def times(seed: int, positions: Tensor, *, global_batch: int = 0) -> Tensor:
    """Return the times in [0, 1) of the samples at these positions, fp64 (B,).

    With `global_batch` G, positions k G ... (k + 1) G - 1 get the times frac(u_k + i / G), with one uniform u_k per
    step: evenly spread over the global batch, each marginally uniform (Kingma et al. 2021, appendix I.1). With 0, times
    are independent and uniform.
    """
    if not global_batch:
        return random.uniform(seed, positions, Stream.TIME).to(torch.float64)
    step = torch.div(positions, global_batch, rounding_mode="floor")
    offset = random.uniform(seed, step, Stream.TIME).to(torch.float64)
    return (offset + (positions - step * global_batch).to(torch.float64) / global_batch) % 1.0


def flow_v_weight(log_snr: Tensor) -> Tensor:
    """Return the weight of the x0 error that equals the unweighted error in the velocity x0 - eps of the straight path
    s x0 + (1 - s) eps: 1 / (1 - s)^2 (JiT, Li & He 2025), which is (1 + sqrt(SNR))^2, as sqrt(SNR) = s / (1 - s)."""
    return (1 + (log_snr / 2).exp()).square()


def sigmoid_weight(log_snr: Tensor, density: Tensor, bias: float) -> Tensor:
    """Return the weight of the x0 error for a weight w = sigmoid(bias - lambda) on the error in eps, per unit of lambda
    (Kingma & Gao 2023; Hoogeboom et al. 2024, "simpler diffusion"): w e^lambda / p(lambda).

    Dividing by the schedule's density p (at least RARE) makes the expected loss independent of the schedule. The code
    uses e^lambda sigmoid(bias - lambda) = e^bias sigmoid(lambda - bias).
    """
    return math.exp(bias) * torch.sigmoid(log_snr - bias) / density.clamp(min=RARE)


def x0_weight(log_snr: Tensor, config: DiffusionConfig, schedule: Schedule | None = None) -> Tensor:
    """Return the weight of the squared x0 error at log_snr (any shape), capped at `max_weight`.

    - paper: SNR, the unweighted error in eps (Imagen, appendix A);
    - v: SNR + 1, the unweighted error in v (Salimans & Ho 2022);
    - min_snr: min(SNR, gamma) (Hang et al. 2023);
    - edm: (s^2 + s_d^2) / (s s_d)^2 with s^2 = 1 / SNR (Karras et al. 2022, table 1);
    - flow_v, sigmoid: see `flow_v_weight` and `sigmoid_weight`.

    Args:
        schedule: the schedule for the picture's size (`sigmoid` only); None: the one without a shift.
    """
    snr = log_snr.exp()
    if config.weighting == "paper":
        weight = snr
    elif config.weighting == "v":
        weight = snr + 1
    elif config.weighting == "min_snr":
        weight = snr.clamp(max=config.min_snr_gamma)
    elif config.weighting == "flow_v":
        weight = flow_v_weight(log_snr)
    elif config.weighting == "sigmoid":
        found = schedule or Schedule.of(config, config.shift_from)
        weight = sigmoid_weight(log_snr, found.density(log_snr), config.sigmoid_bias)
    else:
        weight = snr + config.sigma_data**-2
    return weight.clamp(max=config.max_weight) if config.max_weight else weight


def drop_text(text: Tensor, text_mask: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    """Remove the text where drop (B,) is True, by zeroing and masking its embeddings, so that no caption length
    leaks."""
    keep = ~drop
    return text * keep[:, None, None].to(text.dtype), text_mask & keep[:, None]


def loss(
    model: Callable[..., Tensor],
    images: Tensor,
    text: Tensor,
    text_mask: Tensor,
    *,
    config: DiffusionConfig,
    seed: int,
    positions: Tensor,
    low_res: Tensor | None = None,
    image_size: int = 0,
    global_batch: int = 0,
    t: Tensor | None = None,
    log_snr: Tensor | None = None,
    sizes: Tensor | None = None,
    extra: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    normal: Callable[..., Tensor] = random.normal,
    lesson: Lesson | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted squared error of one micro-batch.

    Args:
        model: called as (z, log_snr, text, text_mask, low_res, aug_log_snr), see `UNet.forward`.
        images: uint8, or floating-point in [-1, 1].
        positions: int64, the global positions of the samples.
        low_res: super-resolution only; at its own size or already up-sampled, uint8 or in [-1, 1].
        image_size: side of the whole picture if `images` are crops (for the schedule's shift); 0: not cropped.
        global_batch: samples per optimizer step, for stratified times; 0: independent times.
        t: fixed times (B,) instead of random ones (validation).
        log_snr: fixed noise levels (B,), regardless of the schedule; `t` in the result is then NaN unless given.
        sizes: (B, 6), the sizes of the originals for `size_condition`, see `SizeEmbedding`; ignored without it.
        extra: auxiliary loss: (x0, the network's estimate of it, log_snr) -> term to add to each sample's loss, (B,).
        normal: generates the noise; a compiled `random.normal` is one kernel instead of hundreds.
        lesson: distillation: each time is replaced by the start of the student's step that it falls in, and the target
            is the result of the teacher's steps instead of the picture.

    Returns:
        The mean loss (fp32 scalar) and per-sample tensors (B,): `loss`, `t`, `log_snr` and `x0_error` (mean squared,
        unweighted).
    """
    x0 = to_unit(images)
    positions = positions.to(x0.device)
    schedule = Schedule.of(config, image_size or x0.shape[-1])
    if log_snr is None:
        if t is None:
            t = times(seed, positions, global_batch=global_batch if config.stratified else 0)
        log_snr = schedule.log_snr(t) if lesson is None else lesson.start(t)
    elif t is None:
        t = torch.full_like(log_snr, math.nan)
    eps = normal(seed, positions, Stream.NOISE, tuple(x0.shape[1:]))
    z = add_noise(x0, eps, log_snr)

    dropped = random.uniform(seed, positions, Stream.TEXT_DROP) < config.text_drop
    text, text_mask = drop_text(text, text_mask, dropped)
    aug_log_snr = None
    if low_res is not None:
        low_res = to_unit(low_res)
        level = random.uniform(seed, positions, Stream.AUG_LEVEL) * config.aug_max
        noise = normal(seed, positions, Stream.AUG_NOISE, tuple(low_res.shape[1:]))
        low_res, aug_log_snr = augment(low_res, level, noise, schedule)
        low_res = upsample(low_res, (x0.shape[-2], x0.shape[-1]))

    if lesson is not None:
        x0 = lesson.target(z, t, text, text_mask, low_res, aug_log_snr, sizes)
        alpha, sigma = alpha_sigma(per_sample(log_snr))
        eps = (z - alpha * x0) / sigma
    given = {"low_res": low_res, "aug_log_snr": aug_log_snr, "sizes": sizes if config.size_condition else None}
    out = network_output(model, z, log_snr, text, text_mask, config=config, **given)
    clean = x0 - low_res if config.residual and low_res is not None else x0
    wanted = target(config.parametrization, clean, eps, per_sample(log_snr), config.sigma_data)
    error = (out - wanted).square().flatten(1).mean(1)
    c_out = scaling(config.parametrization, log_snr, config.sigma_data).c_out
    x0_error = error if c_out is None else c_out.square() * error
    per = x0_weight(log_snr, config, schedule) * x0_error
    if extra is not None:
        per = per + extra(x0, x0_of(out, z, log_snr, config, low_res), log_snr)
    return per.mean(), {"loss": per.detach(), "t": t, "log_snr": log_snr, "x0_error": x0_error.detach()}
