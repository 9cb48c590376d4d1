"""Samplers: ancestral DDPM, DDIM, Heun and DPM-Solver++(2M).

They work on x0 estimates at log-SNRs lambda_0 < lambda_1 < ...; thresholding and inpainting modify x0, from which the
noise is then recomputed. Noise depends on the picture's seed alone, so a picture does not depend on its batch or on the
number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from training.config.diffusion import DiffusionConfig, SamplerConfig
from training.diffusion import random
from training.diffusion.denoiser import Denoise, augment, guided, to_unit, upsample
from training.diffusion.random import Stream
from training.diffusion.schedule import EDM_SIGMA_MAX, EDM_SIGMA_MIN, Schedule, alpha_sigma, per_sample

RHO = 7.0
MOST_RANKED = 2**24
"""Number of values that `torch.quantile` accepts per picture."""


def alpha_sigma_at(log_snr: float | Tensor) -> tuple[Any, Any]:
    """Return alpha and sigma: Python floats for one log-SNR, tensors (B, 1, 1, 1) for a tensor (B,)."""
    if isinstance(log_snr, Tensor):
        return alpha_sigma(per_sample(log_snr))
    return math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))


def grid(schedule: Schedule, steps: int, spacing: str, start: float = 1.0, end: float = 0.0) -> list[float]:
    """Return steps + 1 increasing log-SNRs from time `start` to time `end`; for `spacing` see `SamplerConfig`."""
    if spacing == "auto":
        spacing = "karras" if schedule.kind == "edm" else "time"
    shares = [i / steps for i in range(steps + 1)]
    if spacing == "time":
        return [schedule.log_snr_at(start + (end - start) * share) for share in shares]
    low, high = schedule.log_snr_at(start), schedule.log_snr_at(end)
    if spacing == "log_snr":
        return [low + (high - low) * share for share in shares]
    most = min(math.exp(-low / 2), EDM_SIGMA_MAX) ** (1 / RHO)
    least = max(math.exp(-high / 2), EDM_SIGMA_MIN) ** (1 / RHO)
    return [-2 * RHO * math.log(most + (least - most) * share) for share in shares]


def threshold(x0: Tensor, kind: str, percentile: float) -> Tensor:
    """Threshold x0 (B, C, H, W).

    - none: unchanged;
    - static: clip to [-1, 1];
    - dynamic (Imagen, section 2.3): clip to [-s, s] and divide by s = max(1, percentile of |x0| in this picture).

    Args:
        percentile: a fraction, 0 to 1.
    """
    if kind == "none":
        return x0
    if kind == "static":
        return x0.clamp(-1, 1)
    values = x0.flatten(1).abs()
    values = values[:, :: -(-values.shape[1] // MOST_RANKED)]  # above 2364 px, every second value stands for all
    size = torch.quantile(values, percentile, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    return x0.clamp(-size, size) / size


def ddim_step(z: Tensor, x0: Tensor, now: float | Tensor, then: float | Tensor) -> Tensor:
    """Take a deterministic step to alpha_s x0 + sigma_s eps with eps = (z - alpha_t x0) / sigma_t (Song et al. 2020,
    eta = 0). `now`, `then`: log-SNRs, one for all samples or (B,)."""
    alpha, sigma = alpha_sigma_at(now)
    alpha_s, sigma_s = alpha_sigma_at(then)
    return sigma_s / sigma * z + (alpha_s - alpha * sigma_s / sigma) * x0


def posterior(now: float, then: float) -> tuple[float, float, float, float]:
    """Return q(z_s | z_t, x0) with lambda_t = now < lambda_s = then (Imagen, appendix A; Kingma et al. 2021, equations
    2-5).

    Returns:
        The coefficients of z_t and x0 in the mean, and the lower and upper bound of the variance.
    """
    alpha, sigma = alpha_sigma_at(now)
    alpha_s, sigma_s = alpha_sigma_at(then)
    fresh = -math.expm1(now - then)
    keep = math.exp(now - then) * alpha_s / alpha
    return keep, fresh * alpha_s, fresh * sigma_s**2, fresh * sigma**2


def ddpm_step(z: Tensor, x0: Tensor, noise: Tensor, now: float, then: float, gamma: float) -> Tensor:
    """Take an ancestral step with standard deviation lower^((1 - gamma) / 2) upper^(gamma / 2) (Nichol & Dhariwal
    2021)."""
    keep, add, lower, upper = posterior(now, then)
    return keep * z + add * x0 + math.sqrt(lower ** (1 - gamma) * upper**gamma) * noise


def dpmpp_2m_step(z: Tensor, x0: Tensor, before: Tensor | None, past: float, now: float, then: float) -> Tensor:
    """Take a DPM-Solver++(2M) step (Lu et al. 2022, algorithm 2): DDIM with x0 extrapolated from the previous estimate
    `before` at log-SNR `past`. The first step, and steps where the schedule's clamp makes levels equal, do not
    extrapolate."""
    if before is not None and past < now < then:
        ratio = (now - past) / (then - now)
        x0 = x0 + (x0 - before) / (2 * ratio)
    return ddim_step(z, x0, now, then)


def heun_step(z: Tensor, x0: Tensor, denoise: Denoise, now: float, then: float) -> Tensor:
    """Take a step of Heun's method (Karras et al. 2022, algorithm 1) in the angle phi with alpha = cos phi, where dz /
    dphi = v stays bounded. Calls `denoise` a second time, at `then`."""
    alpha, sigma = alpha_sigma_at(now)
    alpha_s, sigma_s = alpha_sigma_at(then)
    width = math.atan2(sigma_s, alpha_s) - math.atan2(sigma, alpha)
    slope = (alpha * z - x0) / sigma
    ahead = z + width * slope
    return z + width / 2 * (slope + (alpha_s * ahead - denoise(ahead, then)) / sigma_s)


def chosen_sizes(shape: tuple[int, int], original_side: float) -> tuple[float, ...]:
    """Return the six sizes on which a network with `size_condition` draws a picture of `shape` (H, W): an uncropped
    original of that aspect ratio whose shorter side has `original_side` pixels (order as in `SizeEmbedding`)."""
    height, width = shape
    scale = original_side / min(shape)
    return height * scale, width * scale, 0.0, 0.0, float(height), float(width)


@torch.no_grad()
def sample(
    denoise: Denoise,
    shape: tuple[int, ...],
    *,
    config: DiffusionConfig,
    sampler: SamplerConfig,
    seeds: Sequence[int] | Tensor,
    device: torch.device | str = "cpu",
    callback: Callable[[int, int], None] | None = None,
    image_size: int = 0,
    init: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    start_noise: Tensor | None = None,
    end: float = 0.0,
) -> Tensor:
    """Sample pictures with a denoiser.

    Args:
        denoise: (z, log_snr) -> x0, see `denoiser.guided`.
        shape: (B, C, H, W).
        seeds: one integer per picture.
        callback: called as (step, steps) after each step.
        image_size: the side used for the schedule's shift; 0: W.
        init: a picture (B, C, H, W) in [-1, 1] to start from (img2img, inpainting).
        strength: how much of `init` is redrawn: sampling starts at time `strength` in (0, 1].
        mask: bool (B, 1, H, W) or (B, C, H, W): True where the picture is redrawn, False where `init` is kept.
        start_noise: initial standard normal noise, instead of noise from `seeds`.
        end: time at which to stop; with 0 the result is the last x0 estimate, otherwise z at that time.

    Returns:
        fp32 (B, C, H, W); in [-1, 1] if the sampler thresholds.

    Raises:
        ValueError: `strength` outside (0, 1], a mask without `init`, or a wrong number of seeds.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: it must be above 0 and at most 1")
    if mask is not None and init is None:
        raise ValueError("mask: inpainting also needs `init`, the picture to redraw in")
    rows = torch.as_tensor(seeds, dtype=torch.int64).to(device)
    if len(rows) != shape[0]:
        raise ValueError(f"seeds: {len(rows)} given for {shape[0]} pictures")
    key, inner = shape[-1], tuple(shape[1:])
    levels = grid(Schedule.of(config, image_size or shape[-1]), sampler.steps, sampler.spacing, strength, end)

    def estimate(z: Tensor, log_snr: float) -> Tensor:
        x0 = threshold(denoise(z, log_snr), sampler.threshold, sampler.threshold_percentile)
        return x0 if mask is None or init is None else torch.where(mask, x0, init)

    noise = random.normal(key, rows, Stream.SAMPLE_START, inner) if start_noise is None else start_noise
    alpha, sigma = alpha_sigma_at(levels[0])
    whole = init is None or (mask is None and strength == 1.0)
    z = noise if whole else alpha * init + sigma * noise  # type: ignore[operator]
    before, past = None, levels[0]
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = estimate(z, now)
        last = step == sampler.steps - 1 and end == 0.0
        if last:
            z = x0
        elif sampler.name == "ddpm":
            fresh = random.normal(key, rows, Stream.SAMPLE_STEP, inner, sub=step)
            z = ddpm_step(z, x0, fresh, now, then, sampler.gamma)
        elif sampler.name == "heun":
            z = heun_step(z, x0, estimate, now, then)
        elif sampler.name == "dpmpp_2m":
            z = dpmpp_2m_step(z, x0, before, past, now, then)
        else:
            z = ddim_step(z, x0, now, then)
        before, past = x0, now
        if callback is not None:
            callback(step + 1, sampler.steps)
    return z


def augmented(
    low_res: Tensor, aug_level: float, seeds: Sequence[int] | Tensor, config: DiffusionConfig, image_size: int
) -> tuple[Tensor, Tensor]:
    """Return low-res pictures (B, 3, h, w) in [-1, 1] with the noise that `sample_stage` adds for these seeds, not yet
    up-sampled, and its log-SNR (B,)."""
    rows = torch.as_tensor(seeds, dtype=torch.int64).to(low_res.device)
    noise = random.normal(image_size, rows, Stream.SAMPLE_AUG, tuple(low_res.shape[1:]))
    level = torch.full((len(low_res),), aug_level, dtype=torch.float32, device=low_res.device)
    return augment(low_res, level, noise, Schedule.of(config, image_size))


@torch.no_grad()
def sample_stage(
    model: Callable[..., Tensor],
    text: Tensor,
    text_mask: Tensor,
    *,
    config: DiffusionConfig,
    sampler: SamplerConfig,
    image_size: int,
    seeds: Sequence[int] | Tensor,
    low_res: Tensor | None = None,
    negative: tuple[Tensor, Tensor] | None = None,
    init: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    callback: Callable[[int, int], None] | None = None,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Sample one stage from text: augmentation, guidance and sampling together.

    Args:
        text, text_mask: (B, T, D) and bool (B, T) on the model's device.
        image_size: side of the pictures in pixels; it decides the schedule.
        low_res: super-resolution only: (B, 3, h, w), uint8 or in [-1, 1]; noised once per picture at
            `sampler.aug_level`.
        negative: text and mask to steer away from; None: no text.
        init, strength, mask, callback: as for `sample`; `init` may be uint8.
        shape: (H, W) of the pictures; None: squares of side `image_size`.

    Returns:
        fp32 (B, 3, H, W) in [-1, 1].
    """
    device = text.device
    schedule = Schedule.of(config, image_size)
    shape = shape or (image_size, image_size)
    aug_log_snr = None
    if low_res is not None:
        low_res, aug_log_snr = augmented(to_unit(low_res.to(device)), sampler.aug_level, seeds, config, image_size)
        low_res = upsample(low_res, shape)
    sizes = None
    if config.size_condition:
        sizes = torch.tensor(chosen_sizes(shape, sampler.original_side), dtype=torch.float32, device=device)
        sizes = sizes.expand(len(text), -1)
    denoise = guided(
        model,
        text,
        text_mask,
        config=config,
        schedule=schedule,
        guidance=sampler.guidance,
        interval=(sampler.guidance_interval[0], sampler.guidance_interval[1]),
        negative=negative,
        low_res=low_res,
        aug_log_snr=aug_log_snr,
        sizes=sizes,
    )
    drawn = sample(
        denoise,
        (len(text), 3, *shape),
        image_size=image_size,
        config=config,
        sampler=sampler,
        seeds=seeds,
        device=device,
        callback=callback,
        init=None if init is None else to_unit(init.to(device)),
        strength=strength,
        mask=None if mask is None else mask.to(device),
    )
    return drawn.clamp(-1, 1)
