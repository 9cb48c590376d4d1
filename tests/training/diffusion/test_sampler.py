"""Samplers against closed forms: Gaussian data, where the optimal denoiser and the flow are known exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from training.cli.compose import load_config
from training.config.diffusion import SAMPLERS, DiffusionConfig, SamplerConfig
from training.diffusion.denoiser import Denoise, guided
from training.diffusion.objective import loss
from training.diffusion.sampler import alpha_sigma_at, dpmpp_2m_step, grid, posterior, sample, sample_stage, threshold
from training.diffusion.schedule import Schedule

MEAN, SPREAD = 0.3, 0.5
CONFIG = DiffusionConfig()
EXACT = [-0.7016268921, -0.2008874620, 0.2998519681, 0.8005913982, 1.3013308283]


def gaussian(z: Tensor, log_snr: float) -> Tensor:
    """E[x0 | z] for x0 ~ N(MEAN, SPREAD^2)."""
    alpha, sigma = alpha_sigma_at(log_snr)
    return (MEAN * sigma**2 + alpha * SPREAD**2 * z) / (alpha**2 * SPREAD**2 + sigma**2)


def flow(t: float) -> Tensor:
    """Exact solutions of the probability-flow equation at time t, for z in -2 ... 2."""
    alpha, sigma = alpha_sigma_at(Schedule().log_snr_at(t))
    z = torch.tensor([-2.0, -1, 0, 1, 2], dtype=torch.float64)
    return alpha * MEAN + math.sqrt((alpha * SPREAD) ** 2 + sigma**2) * z


def integrate(name: str, steps: int, spacing: str = "time") -> Tensor:
    """The flow's solutions, integrated from t = .98 to t = .02."""
    _, sigma = alpha_sigma_at(Schedule().log_snr_at(0.98))
    return sample(
        gaussian, (1, 1, 1, 5), config=CONFIG,
        sampler=SamplerConfig(name=name, steps=steps, spacing=spacing, threshold="none"), seeds=[0],
        init=torch.zeros(1, 1, 1, 5, dtype=torch.float64), strength=0.98,
        start_noise=(flow(0.98) / sigma).view(1, 1, 1, 5), end=0.02,
    ).flatten()  # fmt: skip


def test_the_exact_flow_is_as_published() -> None:
    torch.testing.assert_close(flow(0.02), torch.tensor(EXACT, dtype=torch.float64), atol=1e-9, rtol=0)


def test_ddim_of_sixteen_steps_to_ten_digits() -> None:
    wanted = [-0.6186715271, -0.1594097795, 0.2998519681, 0.7591137157, 1.2183754634]
    torch.testing.assert_close(integrate("ddim", 16), torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("name", "spacing", "order", "at_64"),
    [
        ("ddim", "time", 1, 0.0214),
        ("heun", "time", 2, 0.000217),
        ("heun", "log_snr", 2, 0.000494),
        ("dpmpp_2m", "time", 2, 0.00344),
        ("dpmpp_2m", "log_snr", 2, 0.000710),
    ],
)
def test_convergence_order(name: str, spacing: str, order: int, at_64: float) -> None:
    coarse, fine = ((integrate(name, n, spacing) - flow(0.02)).abs().max().item() for n in (64, 256))
    assert coarse == pytest.approx(at_64, rel=0.05)
    assert math.log2(coarse / fine) / 2 == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", ["cosine", "linear", "edm"])
def test_every_sampler_reproduces_mean_and_variance(name: str, schedule: str) -> None:
    sampler = SamplerConfig(name=name, steps=100, threshold="none")
    drawn = sample(
        gaussian, (64, 3, 16, 16), config=DiffusionConfig(schedule=schedule), sampler=sampler, seeds=range(64)
    )
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert drawn.std().item() == pytest.approx(SPREAD, rel=0.05 if name == "ddpm" else 0.03)


def test_ancestral_sampling_to_one_percent_at_250_steps() -> None:
    drawn = sample(
        gaussian, (64, 3, 16, 16), config=CONFIG, seeds=range(64),
        sampler=SamplerConfig(name="ddpm", steps=250, threshold="none"),
    )  # fmt: skip
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert drawn.std().item() == pytest.approx(SPREAD, rel=0.01)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_few_steps_keep_fine_detail_if_spaced_evenly_in_log_snr(schedule: str) -> None:
    """Exact Gaussian data of deviation s: 20 steps evenly spaced in time lose up to 70 % of it, the presets' spacing
    5 %."""

    def lost(s: float, spacing: str) -> float:
        def exact(z: Tensor, log_snr: float) -> Tensor:
            alpha, sigma = alpha_sigma_at(log_snr)
            return z * alpha * s**2 / (alpha**2 * s**2 + sigma**2)

        settings = SamplerConfig(steps=20, threshold="none", spacing=spacing)
        config = DiffusionConfig(schedule=schedule)
        drawn = sample(exact, (32, 3, 16, 16), config=config, sampler=settings, seeds=range(32), image_size=64)
        return 1 - float(drawn.std()) / s

    assert max(abs(lost(s, "log_snr")) for s in (0.05, 0.17, 0.5, 1.0)) < 0.055
    assert lost(0.17, "time") > 0.08 and lost(0.05, "time") > 0.4


def test_posterior_of_six_tenths_to_five_tenths() -> None:
    schedule = Schedule()
    keep, add, lower, upper = posterior(schedule.log_snr_at(0.6), schedule.log_snr_at(0.5))
    assert (keep, add, lower) == pytest.approx((0.6350214544, 0.3338505354, 0.2360679775), abs=1e-9)
    assert upper > lower


def test_two_points_are_found_and_dynamic_threshold_is_inactive() -> None:
    def two_points(z: Tensor, log_snr: float) -> Tensor:
        alpha, sigma = alpha_sigma_at(log_snr)
        return torch.tanh(alpha * z / sigma**2)

    assert two_points(torch.tensor(0.3), 0.0).item() == pytest.approx(0.4005165892, abs=1e-6)
    options: dict[str, Any] = {"config": CONFIG, "seeds": range(8)}
    plain, dynamic = (
        sample(two_points, (8, 3, 8, 8), sampler=SamplerConfig(threshold=kind, steps=30), **options)
        for kind in ("none", "dynamic")
    )
    assert torch.equal(plain, dynamic)
    assert (plain.abs() > 0.99).float().mean() > 0.97
    assert abs(plain.mean().item()) < 0.1


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun", "dpmpp_2m"])
def test_steps_that_the_clamp_makes_equal_are_harmless(name: str) -> None:
    """With narrow clamps several steps lie at the same log-SNR, at both ends."""
    config = DiffusionConfig(log_snr_min=-4, log_snr_max=4)
    sampler = SamplerConfig(name=name, steps=40, threshold="none")
    drawn = sample(gaussian, (512, 1, 2, 2), config=config, sampler=sampler, seeds=list(range(512)))
    assert drawn.isfinite().all()
    assert drawn.mean() == pytest.approx(MEAN, abs=0.05)


def test_thresholds() -> None:
    x0 = torch.linspace(-3, 3, 3 * 400).view(1, 3, 20, 20).repeat(2, 1, 1, 1)
    x0[1] /= 4
    assert threshold(x0, "none", 0.9) is x0
    assert threshold(x0, "static", 0.9).abs().max() == 1
    dynamic = threshold(x0, "dynamic", 0.9)
    assert torch.equal(dynamic[1], x0[1])  # decided per picture: all of this one is within [-1, 1]
    torch.testing.assert_close(dynamic[0], x0[0].clamp(-2.7, 2.7) / 2.7, atol=1e-4, rtol=0)
    large = torch.linspace(-3, 3, 4097**2).view(1, 1, 4097, 4097)  # more values than torch.quantile accepts
    assert (threshold(large, "dynamic", 0.9).abs() == 1).double().mean() == pytest.approx(0.1, abs=1e-4)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    for name in SAMPLERS:
        options: dict[str, Any] = {"config": CONFIG, "sampler": SamplerConfig(name=name, steps=5)}
        together = sample(gaussian, (3, 3, 8, 8), seeds=[7, 8, 9], **options)
        alone = sample(gaussian, (1, 3, 8, 8), seeds=[8], **options)
        torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=0)
        assert not torch.allclose(together[0], together[1])


def test_callback_counts_the_steps() -> None:
    seen: list[tuple[int, int]] = []
    sample(
        gaussian, (1, 3, 4, 4), config=CONFIG, sampler=SamplerConfig(steps=3), seeds=[0],
        callback=lambda step, steps: seen.append((step, steps)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("stage", ["photos_base", "photos_sr", "base64", "sr256", "sr1024"])
def test_the_stages_for_photographs_keep_fine_detail(stage: str) -> None:
    """With their own schedule, steps and size, on exact Gaussian data (docs/evaluation.md has the other spacings)."""
    config = load_config("train", [f"stage={stage}"]).stage
    for s in (0.05, 0.5):

        def exact(z: Tensor, log_snr: float, s: float = s) -> Tensor:
            alpha, sigma = alpha_sigma_at(log_snr)
            return z * alpha * s**2 / (alpha**2 * s**2 + sigma**2)

        settings = replace(config.sampler, threshold="none", guidance=1.0)
        drawn = sample(
            exact,
            (16, 3, 16, 16),
            config=config.diffusion,
            sampler=settings,
            seeds=range(16),
            image_size=config.image_size,
        )
        assert abs(1 - float(drawn.std()) / s) < 0.09, s


@pytest.mark.parametrize("spacing", ["time", "log_snr", "karras"])
def test_grids_run_from_noise_to_data(spacing: str) -> None:
    levels = grid(Schedule(), 10, spacing)
    assert len(levels) == 11 and all(a < b for a, b in pairwise(levels))
    assert levels[0] < -8 and levels[-1] > 12


def test_karras_grid_is_the_formula() -> None:
    levels = grid(Schedule("edm"), 4, "auto")
    wanted = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    assert [math.exp(-level / 2) for level in levels] == pytest.approx(wanted, rel=1e-6)


def test_second_order_step_without_history_is_ddim_and_exact_for_linear_x0() -> None:
    z, x0 = torch.randn(5, generator=torch.Generator().manual_seed(0)), torch.full((5,), 0.2)
    first = dpmpp_2m_step(z, x0, None, 0.0, 1.0, 2.0)
    assert torch.equal(first, dpmpp_2m_step(z, x0, x0, 0.0, 1.0, 2.0))


def test_img2img_of_small_strength_stays_near_its_picture() -> None:
    def pull(z: Tensor, log_snr: float) -> Tensor:  # an optimal denoiser of pictures around 0.3, spread 0.5
        return gaussian(z, log_snr)

    init = torch.linspace(-0.8, 0.9, 192).view(1, 3, 8, 8)
    options: dict[str, Any] = {"config": CONFIG, "sampler": SamplerConfig(steps=20), "seeds": [3], "init": init}
    distances = [
        (sample(pull, (1, 3, 8, 8), strength=strength, **options) - init).abs().mean().item()
        for strength in (0.05, 0.3, 0.7)
    ]
    assert distances[0] < 0.1 and distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("name", SAMPLERS)
def test_inpainting_keeps_the_unmasked_part(name: str) -> None:
    init = torch.linspace(-0.8, 0.9, 192).view(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 4:] = True
    options: dict[str, Any] = {"config": CONFIG, "sampler": SamplerConfig(name=name, steps=8), "init": init}
    first = sample(gaussian, (1, 3, 8, 8), mask=mask, seeds=[1], **options)
    second = sample(gaussian, (1, 3, 8, 8), mask=mask, seeds=[2], **options)
    assert torch.equal(first[..., :4], init[..., :4])
    assert (first[..., 4:] - second[..., 4:]).abs().mean() > 0.1


def test_wrong_arguments_are_named() -> None:
    options: dict[str, Any] = {"config": CONFIG, "sampler": SamplerConfig(steps=2)}
    with pytest.raises(ValueError, match="seeds: 1 given for 2"):
        sample(gaussian, (2, 3, 4, 4), seeds=[0], **options)
    with pytest.raises(ValueError, match="strength=0"):
        sample(gaussian, (1, 3, 4, 4), seeds=[0], strength=0.0, **options)
    with pytest.raises(ValueError, match="init"):
        sample(gaussian, (1, 3, 4, 4), seeds=[0], mask=torch.ones(1, 1, 4, 4, dtype=torch.bool), **options)


def test_a_stage_noises_its_low_res_picture_once_and_repeats_itself() -> None:
    seen: list[Tensor] = []

    def model(z: Tensor, level: Tensor, text: Tensor, mask: Tensor, low: Tensor, aug: Tensor) -> Tensor:
        seen.append(low)
        return low

    low = torch.linspace(-0.9, 0.9, 48).view(1, 3, 4, 4)
    config = DiffusionConfig(parametrization="x0")
    drawn = [
        sample_stage(
            model, torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), config=config, image_size=16, seeds=[5],
            sampler=SamplerConfig(steps=3, guidance=2.0, aug_level=level), low_res=low,
        )
        for level in (0.2, 0.2, 0.0)
    ]  # fmt: skip
    assert all(torch.equal(seen[0], again) for again in seen[1:3])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (1, 3, 16, 16) and drawn[0].abs().max() <= 1


def test_solvers_and_ancestral_sampler_agree_in_distribution() -> None:
    def spread(denoise: Denoise, name: str) -> float:
        sampler = SamplerConfig(name=name, steps=120, threshold="none")
        return sample(denoise, (64, 1, 16, 16), config=CONFIG, sampler=sampler, seeds=range(64)).std().item()

    spreads = [spread(gaussian, name) for name in SAMPLERS]
    assert max(spreads) / min(spreads) < 1.03


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_adds_no_noise(name: str) -> None:
    seen: list[Tensor] = []

    def remember(z: Tensor, log_snr: float) -> Tensor:
        seen.append(gaussian(z, log_snr))
        return seen[-1]

    options: dict[str, Any] = {"config": CONFIG, "sampler": SamplerConfig(name=name, steps=4, threshold="none")}
    assert torch.equal(sample(remember, (2, 3, 4, 4), seeds=[1, 2], **options), seen[-1])


def test_the_guided_estimate_is_thresholded_not_its_two_parts() -> None:
    def model(z: Tensor, level: Tensor, text: Tensor, mask: Tensor, low: Any, aug: Any) -> Tensor:
        return torch.where(mask.any(1), 0.9, -0.9).view(-1, 1, 1, 1).expand_as(z)

    text, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    config = DiffusionConfig(parametrization="x0")
    denoise = guided(model, text, mask, config=config, schedule=Schedule(), guidance=3.0)  # -0.9 + 3 x 1.8 = 4.5
    for kind, wanted in (("none", 4.5), ("static", 1.0), ("dynamic", 1.0)):
        drawn = sample(denoise, (1, 3, 4, 4), config=config, sampler=SamplerConfig(steps=2, threshold=kind), seeds=[0])
        torch.testing.assert_close(drawn, torch.full_like(drawn, wanted))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun"])
def test_the_noise_is_derived_anew_from_the_thresholded_estimate(name: str) -> None:
    seen: list[Tensor] = []

    def far(z: Tensor, log_snr: float) -> Tensor:
        seen.append(z)
        return torch.full_like(z, 3.0)

    def near(z: Tensor, log_snr: float) -> Tensor:
        seen.append(z)
        return torch.full_like(z, 1.0)

    sampler = SamplerConfig(name=name, steps=3, threshold="static")
    for denoise in (far, near):
        sample(denoise, (1, 3, 4, 4), config=CONFIG, sampler=sampler, seeds=[0])
    half = len(seen) // 2
    assert half >= 3 and all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_the_paper_says_99_and_a_half_percent() -> None:
    assert (SamplerConfig().threshold, SamplerConfig().threshold_percentile) == ("dynamic", 0.995)


def test_the_low_res_picture_is_prepared_alike_in_training_and_sampling() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def model(z: Tensor, level: Tensor, text: Tensor, mask: Tensor, low: Tensor, aug: Tensor) -> Tensor:
        seen.append((low, aug))
        return low

    picture = torch.arange(3 * 16 * 16).view(1, 3, 16, 16).remainder(256).to(torch.uint8)
    low = torch.arange(48).view(1, 3, 4, 4).mul(5).to(torch.uint8)
    text, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    config = DiffusionConfig(parametrization="x0", aug_max=0.0)
    loss(model, picture, text, mask, config=config, seed=0, positions=torch.tensor([0]), low_res=low)
    sampler = SamplerConfig(steps=1, guidance=1.0, aug_level=0.0)
    sample_stage(model, text, mask, config=config, sampler=sampler, image_size=16, seeds=[0], low_res=low)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert seen[0][0].shape == picture.shape and seen[0][0].abs().max() < 1.2  # normalised, then enlarged


def test_training_and_sampling_each_state_the_sizes() -> None:
    seen: list[Tensor] = []

    def model(z: Tensor, level: Tensor, text: Tensor, mask: Tensor, low: Any, aug: Any, *sizes: Tensor) -> Tensor:
        seen.extend(sizes)
        return z

    text, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    frames = torch.tensor([[300.0, 400.0, 0.0, 2.0, 16.0, 16.0]])
    for told in (False, True):
        config = DiffusionConfig(parametrization="x0", size_condition=told)
        options: dict[str, Any] = {"config": config, "seed": 0, "positions": torch.tensor([0]), "sizes": frames}
        loss(model, torch.zeros(1, 3, 16, 16), text, mask, **options)
        sampler = SamplerConfig(steps=1, guidance=2.0, original_side=512.0)
        sample_stage(model, text, mask, config=config, sampler=sampler, image_size=16, seeds=[0], shape=(16, 32))
    assert torch.equal(seen[0], frames) and len(seen) == 2
    assert seen[1].tolist() == [[512.0, 1024.0, 0.0, 0.0, 16.0, 32.0]] * 2, "both branches of the guidance"
