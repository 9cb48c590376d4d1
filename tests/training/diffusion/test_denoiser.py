"""Parametrisations, guidance, low-res augmentation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from training.config.diffusion import PARAMETRIZATIONS, SCHEDULES, DiffusionConfig
from training.diffusion.denoiser import augment, guided, predict_x0, scaling, target, to_unit, upsample
from training.diffusion.sampler import grid
from training.diffusion.schedule import Schedule, add_noise, per_sample


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_a_perfect_network_gives_x0_back(parametrization: str) -> None:
    level = torch.linspace(-9, 9, 13).double()
    x0, eps = draw(13, 3, 4, 4).double(), draw(13, 3, 4, 4, seed=1).double()
    z = add_noise(x0, eps, level)
    out = target(parametrization, x0, eps, per_sample(level))
    scale = scaling(parametrization, per_sample(level))
    back = out if scale.c_out is None or scale.c_skip is None else scale.c_skip * z + scale.c_out * out
    torch.testing.assert_close(back, x0, atol=1e-9, rtol=0)


def test_edm_scaling_is_the_table_of_karras() -> None:
    level = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)
    sigma, data = torch.exp(-level / 2), 0.5  # noise level of z / alpha
    alpha = torch.sigmoid(level).sqrt()
    scale = scaling("edm", level, data)
    assert scale.c_in is not None and scale.c_skip is not None and scale.c_out is not None
    torch.testing.assert_close(scale.c_in * alpha, 1 / (sigma**2 + data**2).sqrt())
    torch.testing.assert_close(scale.c_skip * alpha, data**2 / (sigma**2 + data**2))
    torch.testing.assert_close(scale.c_out, sigma * data / (sigma**2 + data**2).sqrt())


def test_edm_with_unit_data_is_v_with_the_sign_reversed() -> None:
    level = torch.linspace(-6, 6, 7).double()
    edm, v = scaling("edm", level, 1.0), scaling("v", level)
    assert edm.c_in is not None and edm.c_skip is not None and edm.c_out is not None
    assert v.c_skip is not None and v.c_out is not None
    torch.testing.assert_close(edm.c_in, torch.ones_like(level))
    torch.testing.assert_close(edm.c_skip, v.c_skip)
    torch.testing.assert_close(edm.c_out, -v.c_out)


class Linear:
    """Takes the place of the U-Net: its x0 depends on the text, and it counts its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.low_res: list[Any] = []

    def __call__(
        self, z: Tensor, log_snr: Tensor, text: Tensor, mask: Tensor, low_res: Tensor | None, aug: Tensor | None
    ) -> Tensor:
        self.calls.append(len(z))
        self.low_res.append(low_res)
        visible = (text * mask[:, :, None]).sum((1, 2))
        return 0.5 * z + per_sample(visible)


def guide(model: Linear, w: float, **options: Any) -> Tensor:
    text, mask = draw(2, 4, 3, seed=3), torch.ones(2, 4, dtype=torch.bool)
    config = DiffusionConfig(parametrization="x0")
    denoise = guided(model, text, mask, config=config, schedule=Schedule(), guidance=w, **options)
    return denoise(draw(2, 3, 4, 4), options.pop("at", 0.0))


def test_guidance_of_one_is_the_conditional_model_bit_for_bit_and_costs_one_pass() -> None:
    model = Linear()
    text, mask = draw(2, 4, 3, seed=3), torch.ones(2, 4, dtype=torch.bool)
    wanted = Linear()(draw(2, 3, 4, 4), torch.zeros(2), text, mask, None, None)
    assert torch.equal(guide(model, 1.0), wanted)
    assert model.calls == [2]


def test_guidance_of_zero_is_the_unconditional_model() -> None:
    assert torch.equal(guide(Linear(), 0.0), 0.5 * draw(2, 3, 4, 4))


def test_guidance_extrapolates_linearly_in_one_batched_pass() -> None:
    model = Linear()
    conditional, unconditional = guide(Linear(), 1.0), guide(Linear(), 0.0)
    torch.testing.assert_close(guide(model, 3.0), unconditional + 3 * (conditional - unconditional))
    assert model.calls == [4]


def test_negative_prompt_takes_the_place_of_no_text() -> None:
    text, mask = draw(2, 4, 3, seed=3), torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(guide(Linear(), 3.0, negative=(text, mask)), guide(Linear(), 1.0))


def test_guidance_is_off_outside_its_interval() -> None:
    model = Linear()
    off = guide(model, 3.0, interval=(0.6, 0.9))  # log-SNR 0 is t = 0.5
    assert torch.equal(off, guide(Linear(), 1.0)) and model.calls == [2]
    assert not torch.equal(guide(Linear(), 3.0, interval=(0.4, 0.6)), off)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_steps_at_the_ends_of_the_interval_are_inside(kind: str) -> None:
    """As numbers and as fp32 tensors, for which the grid's log-SNRs are rounded differently from the interval's."""
    schedule = Schedule.of(DiffusionConfig(schedule=kind), 64)
    text, mask = draw(2, 4, 3, seed=3), torch.ones(2, 4, dtype=torch.bool)
    for steps, first, last in ((10, 2, 8), (10, 1, 7), (5, 1, 4), (8, 2, 6), (20, 0, 20)):
        for spacing in ("time", "karras") if first == 0 else ("time",):
            model, interval = Linear(), (first / steps, last / steps)
            config = DiffusionConfig(parametrization="x0")
            denoise = guided(model, text, mask, config=config, schedule=schedule, guidance=3.0, interval=interval)
            inside = [last >= steps - step >= first for step in range(steps)]
            for level, guides in zip(grid(schedule, steps, spacing), inside, strict=False):
                alone = denoise(draw(2, 3, 4, 4), level)
                assert model.calls[-1] == (4 if guides else 2), (spacing, steps, interval, level)
                many = denoise(draw(2, 3, 4, 4), torch.full((2,), level))
                torch.testing.assert_close(many, alone, rtol=0, atol=1e-6)


def test_both_branches_share_the_noised_low_res_picture() -> None:
    model, low = Linear(), draw(2, 3, 4, 4, seed=9)
    guide(model, 2.0, low_res=low, aug_log_snr=torch.zeros(2))
    assert torch.equal(model.low_res[0][:2], low) and torch.equal(model.low_res[0][2:], low)


def test_guided_gaussian_is_the_denoiser_of_the_extrapolated_mean() -> None:
    spread, w = 0.5, 2.5

    def model(z: Tensor, level: Tensor, text: Tensor, mask: Tensor, low: Any, aug: Any) -> Tensor:
        mean = torch.where(mask.any(1), 0.4, -0.1)
        return optimal(z, level, per_sample(mean))

    def optimal(z: Tensor, level: Tensor, mean: Tensor | float) -> Tensor:
        alpha2, sigma2 = torch.sigmoid(per_sample(level)), torch.sigmoid(-per_sample(level))
        return (mean * sigma2 + alpha2.sqrt() * spread**2 * z) / (alpha2 * spread**2 + sigma2)

    z, level = draw(2, 3, 4, 4), torch.full((2,), 0.7)
    text, mask = torch.ones(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)
    config = DiffusionConfig(parametrization="x0")
    drawn = guided(model, text, mask, config=config, schedule=Schedule(), guidance=w)(z, 0.7)
    torch.testing.assert_close(drawn, optimal(z, level, -0.1 + w * 0.5))


def test_residual_adds_the_picture_the_network_sees() -> None:
    low = draw(2, 3, 4, 4, seed=5)
    config = DiffusionConfig(parametrization="x0", residual=True)
    out = predict_x0(
        lambda z, *rest: torch.zeros_like(z), draw(2, 3, 4, 4), torch.zeros(2), draw(2, 4, 3),
        torch.ones(2, 4, dtype=torch.bool), config=config, low_res=low, aug_log_snr=torch.zeros(2),
    )  # fmt: skip
    assert torch.equal(out, low)


def test_augmentation_level_zero_is_the_clean_picture_and_one_is_noise() -> None:
    low, noise = draw(3, 3, 4, 4).clamp(-1, 1), draw(3, 3, 4, 4, seed=1)
    noised, level = augment(low, torch.tensor([0.0, 0.5, 1.0]), noise, Schedule(shift=-3.0))
    assert torch.equal(noised[0], low[0]) and level[0] == 20
    torch.testing.assert_close(noised[1], (low[1] + noise[1]) / 2**0.5)  # the shift does not apply to the augmentation
    torch.testing.assert_close(noised[2], noise[2], atol=1e-3, rtol=0)


def test_to_unit_and_upsample() -> None:
    pictures = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4)
    unit = to_unit(pictures)
    assert unit.dtype == torch.float32 and unit[0].max() == -1 and unit[1].min() == 1
    large = upsample(unit, 16)
    torch.testing.assert_close(large, unit[:, :, :1, :1].expand(2, 3, 16, 16))
    assert upsample(unit, 4) is unit
