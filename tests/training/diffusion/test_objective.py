"""The objective compared with closed forms, its weights, and its independence of batch and rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config.diffusion import PARAMETRIZATIONS, DiffusionConfig
from training.diffusion.denoiser import scaling
from training.diffusion.objective import drop_text, loss, times, x0_weight
from training.diffusion.schedule import Schedule, alpha_sigma, per_sample

MEAN, SPREAD = 0.3, 0.5
TEXT, MASK = torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(2)), torch.ones(64, 5, dtype=torch.bool)


def pictures(count: int = 64, size: int = 24) -> Tensor:
    return MEAN + SPREAD * torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def run(model: Any, images: Tensor, config: DiffusionConfig, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    count = len(images)
    options = {"seed": 4, "positions": torch.arange(count), **options}
    return loss(model, images, TEXT[:count], MASK[:count], config=config, **options)


def zero(z: Tensor, *rest: Any) -> Tensor:
    return torch.zeros_like(z)


@pytest.mark.parametrize(("t", "wanted"), [(0.1, 0.93160594), (0.5, 0.4), (0.9, 0.25467424)])
def test_the_optimal_network_has_the_bayes_loss(t: float, wanted: float) -> None:
    def optimal(z: Tensor, log_snr: Tensor, *rest: Any) -> Tensor:
        alpha, sigma = alpha_sigma(per_sample(log_snr))
        x0 = (MEAN * sigma**2 + alpha * SPREAD**2 * z) / (alpha**2 * SPREAD**2 + sigma**2)
        return (alpha * z - x0) / sigma

    value, _ = run(optimal, pictures(), DiffusionConfig(), t=torch.full((64,), t))
    assert value.item() == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("t", [0.05, 0.4, 0.8])
def test_a_network_of_zeros_has_the_closed_form_loss(t: float) -> None:
    power = MEAN**2 + SPREAD**2
    alpha2, sigma2 = math.cos(math.pi * t / 2) ** 2, math.sin(math.pi * t / 2) ** 2
    wanted = {
        "v": alpha2 + sigma2 * power,
        "eps": 1 / alpha2,  # weight SNR + 1 on an x0 error of sigma^2 / alpha^2
        "x0": power / sigma2,
    }
    for parametrization, value in wanted.items():
        config = DiffusionConfig(parametrization=parametrization)
        got, _ = run(zero, pictures(), config, t=torch.full((64,), t))
        assert got.item() == pytest.approx(value, rel=0.02)


def test_paper_weighting_is_the_plain_error_in_eps() -> None:
    config = DiffusionConfig(parametrization="eps", weighting="paper")
    value, parts = run(zero, pictures(), config)
    assert value.item() == pytest.approx(1, rel=0.01)
    assert parts["loss"].min() > 0.9  # at every noise level, including the clamped ends


def test_weights_in_x0_space() -> None:
    level = torch.tensor([-4.0, 0.0, 3.0])
    snr = level.exp()
    sigma2 = 1 / snr
    wanted = {
        "paper": snr,
        "v": snr + 1,
        "min_snr": torch.minimum(snr, torch.tensor(5.0)),
        "edm": (sigma2 + 0.25) / (sigma2 * 0.25),
    }
    for weighting, value in wanted.items():
        config = DiffusionConfig(weighting=weighting)
        torch.testing.assert_close(x0_weight(level, config), value)
        capped = DiffusionConfig(weighting=weighting, max_weight=2.0)
        torch.testing.assert_close(x0_weight(level, capped), value.clamp(max=2))


@pytest.mark.parametrize("s", [0.1, 0.5, 0.9])
def test_flow_v_is_the_error_in_the_straight_paths_velocity(s: float) -> None:
    """JiT's v-loss from its own definitions: v = (x0 - z) / (1 - s) on z = s x0 + (1 - s) eps."""
    x0, eps, predicted = torch.randn(3, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = s * x0 + (1 - s) * eps
    wanted = ((x0 - z) / (1 - s) - (predicted - z) / (1 - s)).square()
    level = torch.tensor(2 * math.log(s / (1 - s)), dtype=torch.float64)
    weight = x0_weight(level, DiffusionConfig(weighting="flow_v"))
    torch.testing.assert_close(weight * (x0 - predicted).square(), wanted)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "logit_normal"])
def test_the_sigmoid_loss_is_the_same_integral_on_every_schedule(schedule: str) -> None:
    """The integral of sigmoid(b - lambda) |eps error|^2 over lambda, of a network with the x0 error 1 / (1 + SNR)."""
    bias, t = -1.0, (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    config = DiffusionConfig(schedule=schedule, weighting="sigmoid", sigmoid_bias=bias, log_snr_std=4.0)
    level = Schedule.of(config, 64).log_snr(t).double()
    found = (x0_weight(level, config) / (1 + level.exp())).mean().item()
    at = torch.linspace(-18, 18, 100_001, dtype=torch.float64)
    eps_error = at.exp() / (1 + at.exp())
    wanted = torch.trapezoid(torch.sigmoid(bias - at) * eps_error, at).item()
    assert found == pytest.approx(wanted, rel=0.01)


def test_a_fixed_noise_level_means_the_same_for_every_schedule() -> None:
    level = torch.linspace(-6, 6, 8)
    answers = []
    for schedule, weighting in (("cosine", "v"), ("logit_normal", "flow_v")):
        config = DiffusionConfig(schedule=schedule, parametrization="x0", weighting=weighting)
        _, parts = run(lambda z, *rest: 0.5 * z, pictures(8), config, log_snr=level)
        answers.append(parts["x0_error"])
        assert torch.equal(parts["log_snr"], level)
    assert torch.equal(*answers)


@pytest.mark.parametrize("level", [-6.0, 0.0, 6.0])
def test_min_snr_factors_of_every_parametrisation(level: float) -> None:
    snr, gamma = math.exp(level), 5.0
    wanted = {"eps": min(snr, gamma) / snr, "x0": min(snr, gamma), "v": min(snr, gamma) / (snr + 1)}
    weight = x0_weight(torch.tensor([level]), DiffusionConfig(weighting="min_snr", min_snr_gamma=gamma))
    for parametrization, value in wanted.items():
        c_out = scaling(parametrization, torch.tensor([level])).c_out
        assert (weight if c_out is None else weight * c_out.square()).item() == pytest.approx(value, rel=1e-5)


def test_edm_weight_makes_the_output_error_uniform() -> None:
    level = torch.linspace(-8, 8, 9)
    c_out = scaling("edm", level, 0.5).c_out
    assert c_out is not None
    weight = x0_weight(level, DiffusionConfig(weighting="edm", sigma_data=0.5)) * c_out.square()
    torch.testing.assert_close(weight, torch.ones_like(level))


def test_a_v_network_and_its_conversions_have_the_same_loss_and_gradient() -> None:
    losses, gradients = [], []
    for parametrization in ("v", "x0", "eps"):
        weight = torch.tensor(0.3, requires_grad=True)

        def model(z: Tensor, log_snr: Tensor, *rest: Any, w: Tensor = weight, to: str = parametrization) -> Tensor:
            alpha, sigma = alpha_sigma(per_sample(log_snr))
            v = w * z
            return {"v": v, "x0": alpha * z - sigma * v, "eps": sigma * z + alpha * v}[to]

        value, _ = run(
            model, pictures(8), DiffusionConfig(parametrization=parametrization), t=torch.linspace(0.1, 0.9, 8)
        )
        value.backward()
        losses.append(value.item())
        gradients.append(weight.grad.item() if weight.grad is not None else math.nan)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    assert gradients == pytest.approx([gradients[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_losses_are_finite_at_both_clamped_ends(parametrization: str) -> None:
    config = DiffusionConfig(parametrization=parametrization, weighting="edm" if parametrization == "edm" else "paper")
    value, _ = run(zero, pictures(2), config, t=torch.tensor([0.0, 1.0]))
    assert value.isfinite()


def test_a_sample_has_the_same_loss_on_any_rank() -> None:
    images = pictures(16)
    config = DiffusionConfig(parametrization="x0")

    def model(z: Tensor, log_snr: Tensor, text: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        return 0.3 * z + per_sample((text * mask[:, :, None]).mean((1, 2)))

    _, whole = run(model, images, config, global_batch=16)
    for rank in range(4):
        mine = torch.arange(rank, 16, 4)
        _, part = loss(
            model, images[mine], TEXT[mine], MASK[mine], config=config, seed=4, positions=mine, global_batch=16
        )
        torch.testing.assert_close(part["loss"], whole["loss"][mine])


def test_uint8_pictures_mean_the_same_as_floats() -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(zero, pixels, DiffusionConfig())[0], run(zero, pixels / 127.5 - 1, DiffusionConfig())[0])


def test_stratified_times_are_evenly_spread_over_each_global_batch() -> None:
    batch = 48
    for step in (0, 1, 7):
        t = times(5, step * batch + torch.arange(batch), global_batch=batch)
        assert abs(t.mean().item() - 0.5) <= 1 / (2 * batch) + 1e-9
        even = torch.full((batch - 1,), 1 / batch, dtype=torch.float64)
        torch.testing.assert_close(t.sort().values.diff(), even, rtol=0, atol=1e-15)


def test_a_lane_sees_all_times() -> None:
    lane = 3 + 64 * torch.arange(4000)
    t = times(5, lane, global_batch=64)
    counts = torch.histc(t.float(), bins=10, min=0, max=1)
    assert counts.min() > 330 and counts.max() < 470


def test_times_without_a_global_batch_are_independent_uniforms() -> None:
    t = times(5, torch.arange(4000))
    assert abs(t.mean().item() - 0.5) < 0.02 and abs(t.var().item() - 1 / 12) < 0.005


def test_text_is_dropped_for_the_stated_share_of_positions() -> None:
    seen: list[Tensor] = []

    def model(z: Tensor, log_snr: Tensor, text: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        dropped = ~mask.any(1)
        assert torch.equal(dropped, (text == 0).all(2).all(1))
        seen.append(dropped)
        return torch.zeros_like(z)

    for start in range(0, 2048, 64):
        run(model, pictures(64, 4), DiffusionConfig(text_drop=0.25), positions=start + torch.arange(64))
    share = torch.cat(seen).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)


def test_dropped_text_hides_the_length_of_the_caption() -> None:
    text, mask = drop_text(TEXT[:2], MASK[:2], torch.tensor([True, False]))
    assert not text[0].any() and not mask[0].any()
    assert torch.equal(text[1], TEXT[1]) and torch.equal(mask[1], MASK[1])


def test_low_res_levels_are_per_sample_bounded_and_their_noise_is_fresh() -> None:
    seen: dict[str, Tensor] = {}

    def model(z: Tensor, log_snr: Tensor, text: Tensor, mask: Tensor, low: Tensor, aug: Tensor) -> Tensor:
        seen.update(z=z, low=low, aug=aug)
        return torch.zeros_like(z)

    config = DiffusionConfig(aug_max=0.5)
    _, parts = run(model, torch.zeros(64, 3, 24, 24), config, low_res=torch.zeros(64, 3, 24, 24))
    assert seen["aug"].unique().numel() > 50 and seen["aug"].min() >= -1e-6  # t = 0.5 is log-SNR 0
    sigma = alpha_sigma(seen["aug"])[1]
    torch.testing.assert_close(seen["low"].flatten(1).std(1), sigma, atol=0.01, rtol=0.1)
    noise = seen["z"] / per_sample(alpha_sigma(parts["log_snr"])[1])
    assert abs((noise * seen["low"]).mean().item()) < 0.01


def test_low_res_noise_has_the_resolution_of_the_picture() -> None:
    seen: list[Tensor] = []

    def model(z: Tensor, log_snr: Tensor, text: Tensor, mask: Tensor, low: Tensor, aug: Tensor) -> Tensor:
        seen.append(low)
        return torch.zeros_like(z)

    run(model, torch.zeros(8, 3, 24, 24), DiffusionConfig(aug_max=1.0), low_res=torch.zeros(8, 3, 6, 6))
    small = F.interpolate(seen[0], size=(6, 6), mode="area")
    assert seen[0].shape == (8, 3, 24, 24)
    assert small.std() > 0.7 * seen[0].std()  # noise drawn at 24 pixels would retain a quarter


def test_low_res_without_augmentation_is_the_up_sampled_picture() -> None:
    seen: list[Tensor] = []

    def model(z: Tensor, log_snr: Tensor, text: Tensor, mask: Tensor, low: Tensor, aug: Tensor) -> Tensor:
        seen.append(low)
        return torch.zeros_like(z)

    grey = torch.full((2, 3, 4, 4), 0.25)
    run(model, torch.zeros(2, 3, 16, 16), DiffusionConfig(aug_max=0.0), low_res=grey)
    torch.testing.assert_close(seen[0], torch.full((2, 3, 16, 16), 0.25))


def test_residual_learns_the_difference_from_the_low_res_picture() -> None:
    images = pictures(4, 8).clamp(-1, 1)
    config = DiffusionConfig(parametrization="x0", residual=True, aug_max=0.0)
    value, _ = run(zero, images, config, low_res=images)
    assert value.item() == 0


def test_shift_of_a_crop_refers_to_the_whole_picture() -> None:
    config = DiffusionConfig(shift_from=64)
    t = torch.full((2,), 0.5)
    _, crop = run(zero, pictures(2, 16), config, t=t, image_size=1024)
    assert crop["log_snr"].tolist() == pytest.approx([-5.54517744] * 2, abs=1e-5)
