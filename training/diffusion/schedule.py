"""Noise schedules in continuous time: one clamped fp32 log-SNR for training, sampling and low-res augmentation.

t in [0, 1], 0 = clean; z_t = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1 (variance preserving);
log-SNR lambda = 2 ln(alpha / sigma), so alpha^2 = sigmoid(lambda) and sigma^2 = sigmoid(-lambda).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.config.diffusion import DiffusionConfig

EDM_MEAN, EDM_STD = -1.2, 1.2
EDM_SIGMA_MIN, EDM_SIGMA_MAX = 0.002, 80.0


def cosine(t: Tensor) -> Tensor:
    """alpha = cos(pi t / 2): lambda = -2 ln tan(pi t / 2) (Ho & Salimans 2022), without Nichol & Dhariwal's offset
    s."""
    return -2 * torch.log(torch.tan(t * (math.pi / 2)))


def linear(t: Tensor) -> Tensor:
    """Continuous form of "1000 linear steps, 1e-4 to 0.02": lambda = -ln expm1(1e-4 + 10 t^2) (Kingma et al. 2021)."""
    return -torch.log(torch.expm1(1e-4 + 10 * t.square()))


def edm(t: Tensor) -> Tensor:
    """t is the quantile of ln sigma ~ N(-1.2, 1.2^2), sigma clamped to [0.002, 80] (Karras et al. 2022, table 1)."""
    ln_sigma = EDM_MEAN + EDM_STD * math.sqrt(2) * torch.erfinv(2 * t - 1)
    return -2 * ln_sigma.clamp(math.log(EDM_SIGMA_MIN), math.log(EDM_SIGMA_MAX))


def logit_normal(t: Tensor) -> Tensor:
    """1 - t is the quantile of a standard normal lambda, which `Schedule` scales and shifts.

    These are the logit-normal times of Esser et al. 2024 and JiT (Li & He 2025): their path s x0 + (1 - s) eps has
    lambda = 2 logit(s), so logit(s) ~ N(m, d^2) means lambda ~ N(2 m, (2 d)^2).
    """
    return math.sqrt(2) * torch.erfinv(1 - 2 * t)


CURVES = {"cosine": cosine, "linear": linear, "edm": edm, "logit_normal": logit_normal}
"""lambda(t) by name, before shift and clamp."""


def cosine_density(log_snr: Tensor) -> Tensor:
    """sech(lambda / 2) / (2 pi) (after Kingma & Gao 2023)."""
    return 1 / (2 * math.pi * torch.cosh(log_snr / 2))


def linear_density(log_snr: Tensor) -> Tensor:
    """(1 - e^-u) / (20 t) with u = ln(1 + e^-lambda) = 1e-4 + 10 t^2."""
    u = torch.nn.functional.softplus(-log_snr)
    return torch.sigmoid(-log_snr) / (20 * ((u - 1e-4) / 10).clamp(min=1e-12).sqrt())


def edm_density(log_snr: Tensor) -> Tensor:
    """Density of lambda = -2 ln sigma for ln sigma ~ N(-1.2, 1.2^2)."""
    return normal_density(log_snr, -2 * EDM_MEAN, 2 * EDM_STD)


def normal_density(log_snr: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Density of N(mean, std^2)."""
    return torch.exp(-((log_snr - mean) / std).square() / 2) / (std * math.sqrt(2 * math.pi))


DENSITIES = {"cosine": cosine_density, "linear": linear_density, "edm": edm_density, "logit_normal": normal_density}
"""Density of lambda for uniform t, 1 / |dlambda / dt|, for each of `CURVES`, before the shift."""


@dataclass(frozen=True)
class Schedule:
    """lambda(t), clamped at both ends (the cosine would reach +-infinity)."""

    kind: str = "cosine"
    shift: float = 0.0
    """Added to lambda: 2 ln(reference side / picture side) (Hoogeboom et al. 2023, "simple diffusion", eq. 3)."""
    low: float = -20.0
    high: float = 20.0
    mean: float = 0.0
    std: float = 1.0
    """`logit_normal`: mean and standard deviation of lambda, before the shift."""

    @classmethod
    def of(cls, config: DiffusionConfig, image_size: int) -> Schedule:
        """Return the schedule for pictures of side `image_size` (the whole picture, even when training on crops)."""
        shift = 2 * math.log(config.shift_from / image_size) if config.shift_from else 0.0
        ends = config.log_snr_min, config.log_snr_max
        return cls(config.schedule, shift, *ends, config.log_snr_mean, config.log_snr_std)

    def unshifted(self) -> Schedule:
        """Return the schedule for low-res augmentation: the same without the shift. `logit_normal`, which only decides
        how often each level is trained, is replaced by `cosine`."""
        return Schedule("cosine" if self.kind == "logit_normal" else self.kind, 0.0, self.low, self.high)

    def _curve(self, t: Tensor) -> Tensor:
        """Return lambda at fp64 times, before the clamp."""
        curve = CURVES[self.kind](t)
        return (self.mean + self.std * curve if self.kind == "logit_normal" else curve) + self.shift

    def density(self, log_snr: Tensor) -> Tensor:
        """Return the density of lambda for uniform t, 1 / |dlambda / dt|, ignoring the clamp at the ends."""
        own = log_snr - self.shift
        if self.kind == "logit_normal":
            return normal_density(own, self.mean, self.std)
        return DENSITIES[self.kind](own)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return lambda at times in [0, 1] (any shape) in fp32; computed in fp64, where cos(pi/2) is still positive."""
        return self._curve(t.to(torch.float64)).clamp(self.low, self.high).to(torch.float32)

    def log_snr_at(self, t: float) -> float:
        """Return lambda at a single time as a Python float."""
        return min(max(float(self._curve(torch.tensor(t, dtype=torch.float64))), self.low), self.high)


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha = sqrt(sigmoid(lambda)) and sigma = sqrt(sigmoid(-lambda)), in the same shape and dtype."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def per_sample(values: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, 1, 1), to broadcast over pictures."""
    return values.view(-1, 1, 1, 1)


def add_noise(x0: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """Return z_t = alpha x0 + sigma eps for x0, eps (B, C, H, W) and log_snr (B,)."""
    alpha, sigma = alpha_sigma(per_sample(log_snr))
    return alpha * x0 + sigma * eps
