"""Schedules: closed-form log-SNR values, clamped ends, identities between eps, x0 and v."""

from __future__ import annotations

import math

import pytest
import torch

from training.config.diffusion import SCHEDULES, DiffusionConfig
from training.diffusion.denoiser import scaling, target
from training.diffusion.schedule import Schedule, add_noise, alpha_sigma, per_sample

COSINE = {
    0.10: (3.68546007, 0.91287135, -1.85971738),
    0.25: (1.76274717, -1.00984155, -3.78243027),
    0.50: (0.0, -2.77258872, -5.54517744),
    0.75: (-1.76274717, -4.53533590, -7.30792462),
    0.90: (-3.68546007, -6.45804879, -9.23063751),
}
"""t -> log-SNR without shift, shifted from 64 to 256, shifted from 64 to 1024."""


@pytest.mark.parametrize("t", COSINE)
def test_cosine_values(t: float) -> None:
    for value, size in zip(COSINE[t], (64, 256, 1024), strict=True):
        schedule = Schedule.of(DiffusionConfig(shift_from=64), size)
        assert schedule.log_snr(torch.tensor([t])).item() == pytest.approx(value, abs=2e-6)
        assert schedule.log_snr_at(t) == pytest.approx(value, abs=1e-7)


def test_linear_is_the_continuous_thousand_step_schedule() -> None:
    # alpha_bar of betas 1e-4 ... 0.02 over 1000 steps
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for step in (100, 500, 900):
        discrete = torch.log(alpha_bar[step] / (1 - alpha_bar[step])).item()
        assert Schedule("linear").log_snr(torch.tensor([(step + 0.5) / 1000])).item() == pytest.approx(
            discrete, abs=0.12
        )


def test_edm_is_normal_in_log_sigma() -> None:
    t = torch.linspace(0.02, 0.98, 97)
    ln_sigma = -Schedule("edm").log_snr(t).double() / 2
    normal = torch.distributions.Normal(-1.2, 1.2)
    torch.testing.assert_close(normal.cdf(ln_sigma), t.double(), atol=1e-5, rtol=0)


def test_logit_normal_is_jits_distribution() -> None:
    """JiT draws s = sigmoid(0.8 n - 0.8) on the straight path s x0 + (1 - s) eps: its SNR is (s / (1 - s))^2."""
    t = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    s = torch.sigmoid(0.8 * normal.icdf(1 - t) - 0.8)
    schedule = Schedule.of(DiffusionConfig(schedule="logit_normal"), 64)
    torch.testing.assert_close(schedule.log_snr(t).double(), 2 * torch.log(s / (1 - s)), atol=1e-4, rtol=1e-5)
    shifted = Schedule.of(DiffusionConfig(schedule="logit_normal", shift_from=64), 256)
    assert shifted.log_snr_at(0.5) == pytest.approx(-1.6 - 2 * math.log(4))
    assert schedule.unshifted().log_snr_at(0.5) == pytest.approx(0), "levels of low-res augmentation stay the cosine's"


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_density_is_one_over_the_slope(kind: str) -> None:
    schedule = Schedule.of(DiffusionConfig(schedule=kind, shift_from=64, log_snr_min=-60, log_snr_max=60), 256)
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        slope = (schedule.log_snr_at(t + 1e-5) - schedule.log_snr_at(t - 1e-5)) / 2e-5
        found = schedule.density(torch.tensor(schedule.log_snr_at(t), dtype=torch.float64)).item()
        assert found == pytest.approx(-1 / slope, rel=1e-4)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_ends_are_finite_clamped_and_falling(kind: str) -> None:
    t = torch.linspace(0, 1, 1001)
    level = Schedule(kind).log_snr(t)
    assert level.dtype == torch.float32 and level.isfinite().all()
    assert level.max() <= 20 and level.min() >= -20
    assert (level[1:] <= level[:-1]).all()
    alpha, sigma = alpha_sigma(level)
    assert (alpha > 0).all() and (sigma > 0).all()
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(t))
    assert alpha_sigma(level.bfloat16())[0].isfinite().all()


def test_cosine_reaches_both_clamps_in_fp32() -> None:
    assert Schedule().log_snr(torch.tensor([0.0, 1.0], dtype=torch.float32)).tolist() == [20.0, -20.0]


def test_cosine_alpha_is_a_cosine() -> None:
    t = torch.linspace(0.01, 0.99, 99)
    alpha, sigma = alpha_sigma(Schedule().log_snr(t))
    torch.testing.assert_close(alpha, torch.cos(t * math.pi / 2))
    torch.testing.assert_close(sigma, torch.sin(t * math.pi / 2))


def test_identities_between_eps_x0_and_v_hold_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(9, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    level = per_sample(torch.linspace(-8, 8, 9, dtype=torch.float64))
    alpha, sigma = alpha_sigma(level)
    z = add_noise(x0, eps, level.flatten())
    close = {"atol": 1e-10, "rtol": 0.0}
    v = target("v", x0, eps, level)
    torch.testing.assert_close((alpha * z - x0) / sigma, v, **close)
    torch.testing.assert_close(sigma * z + alpha * v, eps, **close)
    torch.testing.assert_close((z - alpha * x0) / sigma, eps, **close)
    torch.testing.assert_close(z.square() + v.square(), x0.square() + eps.square(), **close)
    for kind, output in (("v", v), ("eps", eps)):
        scale = scaling(kind, level)
        assert scale.c_skip is not None and scale.c_out is not None
        torch.testing.assert_close(scale.c_skip * z + scale.c_out * output, x0, **close)
