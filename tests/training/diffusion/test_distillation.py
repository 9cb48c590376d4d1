"""What a teacher's steps teach, compared with closed forms: Gaussian data, whose ideal denoiser and flow are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.tiny import random_unet, stage_config
from training.config.diffusion import DiffusionConfig, DistillConfig, SamplerConfig
from training.diffusion.denoiser import scaling
from training.diffusion.distillation import Lesson, taught_x0
from training.diffusion.objective import loss
from training.diffusion.sampler import alpha_sigma_at, ddim_step, grid, sample, sample_stage
from training.diffusion.schedule import Schedule

MEAN, SPREAD = 0.3, 0.5
CONFIG = DiffusionConfig()
SHAPE = (4, 3, 8, 8)


def gaussian(z: Tensor, log_snr: Any) -> Tensor:
    """E[x0 | z] for x0 ~ N(MEAN, SPREAD^2)."""
    alpha, sigma = alpha_sigma_at(log_snr)
    return (MEAN * sigma**2 + alpha * SPREAD**2 * z) / (alpha**2 * SPREAD**2 + sigma**2)


def flow(z: Tensor, now: float, then: float) -> Tensor:
    """The exact solution of the probability-flow equation."""
    (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma_at(now), alpha_sigma_at(then)
    scale = math.sqrt(((alpha_s * SPREAD) ** 2 + sigma_s**2) / ((alpha * SPREAD) ** 2 + sigma**2))
    return alpha_s * MEAN + scale * (z - alpha * MEAN)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def levels_between(start: float, end: float, steps: int) -> Tensor:
    row = grid(Schedule(), steps, "time", start, end)
    return torch.tensor([row] * len(noise()), dtype=torch.float64)


NOT_FINAL = torch.zeros(4, dtype=torch.bool)


def test_one_step_with_the_target_is_the_teachers_two() -> None:
    z, levels = noise(), levels_between(0.75, 0.5, 2)
    first, second, third = levels[0].tolist()
    z1 = ddim_step(z, gaussian(z, first), first, second)
    z2 = ddim_step(z1, gaussian(z1, second), second, third)
    wanted = taught_x0(gaussian, z, levels, NOT_FINAL)
    torch.testing.assert_close(ddim_step(z, wanted, first, third), z2, atol=1e-12, rtol=0)
    # algorithm 2 of Salimans & Ho 2022, in its notation
    (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma_at(first), alpha_sigma_at(third)
    published = (z2 - sigma_s / sigma * z) / (alpha_s - sigma_s / sigma * alpha)
    torch.testing.assert_close(wanted, published, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.75), (0.75, 0.5), (0.25, 0.02)])
def test_many_steps_of_the_ideal_denoiser_teach_the_exact_flow(start: float, end: float) -> None:
    z, errors = noise(), []
    for steps in (64, 128):
        levels = levels_between(start, end, steps)
        now, then = float(levels[0, 0]), float(levels[0, -1])
        errors.append(
            (ddim_step(z, taught_x0(gaussian, z, levels, NOT_FINAL), now, then) - flow(z, now, then)).abs().max()
        )
    assert errors[1] < 0.01 and errors[0] / errors[1] == pytest.approx(2, rel=0.1), "first order, as DDIM is"


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.75), (0.5, 0.25), (0.25, 0.0)])
def test_the_target_lands_where_the_sampler_does(name: str, start: float, end: float) -> None:
    z, steps = noise(), 5
    reached = sample(
        gaussian, SHAPE, config=CONFIG, sampler=SamplerConfig(name=name, steps=steps, threshold="none"),
        seeds=range(4), init=torch.zeros(SHAPE, dtype=torch.float64), strength=start, end=end,
        start_noise=z / alpha_sigma_at(Schedule().log_snr_at(start))[1],
    )  # fmt: skip
    levels, final = levels_between(start, end, steps), torch.full((4,), end == 0.0)
    wanted = taught_x0(gaussian, z, levels, final, extrapolate=name == "dpmpp_2m")
    landed = wanted if end == 0.0 else ddim_step(z, wanted, float(levels[0, 0]), float(levels[0, -1]))
    torch.testing.assert_close(landed, reached, atol=1e-9, rtol=1e-9)


def test_samples_of_a_batch_do_not_influence_each_other() -> None:
    rows = torch.cat([levels_between(*ends, 4)[:1] for ends in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0))])
    z, final = noise(), torch.tensor([False, False, False, True])
    together = taught_x0(gaussian, z, rows, final, extrapolate=True)
    for i in range(4):
        own = slice(i, i + 1)
        alone = taught_x0(gaussian, z[own], rows[own], final[own], extrapolate=True)
        torch.testing.assert_close(together[own], alone, atol=1e-12, rtol=0)


# ---------------------------------------------------------------------------------------- a network as the teacher

STAGE = stage_config("base", 16)
TEXT = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 5, [False] * 5])


def lesson(steps: int, teacher_steps: int, **settings: Any) -> Lesson:
    distill = DistillConfig(steps=steps, teacher="x", teacher_steps=teacher_steps, **settings)
    unet, diffusion = random_unet(STAGE), STAGE.diffusion
    return Lesson.of(unet, diffusion, distill.teacher_sampler(STAGE.sampler), diffusion, steps, 16)


@pytest.mark.parametrize("settings", [{}, {"guidance": 1.0, "solver": "ddim"}, {"guidance_interval": [0.2, 0.6]}])
def test_a_student_of_one_step_is_taught_the_teachers_result(settings: dict[str, Any]) -> None:
    own = {"guidance": 2.0, **settings}
    taught = lesson(1, 6, **own)
    sampler = SamplerConfig(
        name=own.get("solver", "dpmpp_2m"), steps=6, guidance=own["guidance"],
        guidance_interval=own.get("guidance_interval", [0.0, 1.0]), threshold=STAGE.sampler.threshold,
    )  # fmt: skip
    drawn = sample_stage(
        taught.model, TEXT, MASK, config=STAGE.diffusion, sampler=sampler, image_size=16, seeds=range(4)
    )
    seen: dict[str, Tensor] = {}

    def start(denoise_input: Tensor, *_: Any) -> Tensor:
        seen.setdefault("z", denoise_input)
        return torch.zeros_like(denoise_input)

    once = replace(sampler, steps=1, guidance=1.0)
    sample_stage(start, TEXT, MASK, config=STAGE.diffusion, sampler=once, image_size=16, seeds=range(4))
    wanted = taught.target(seen["z"], torch.full((4,), 0.5), TEXT, MASK)
    torch.testing.assert_close(wanted.clamp(-1, 1), drawn, atol=2e-5, rtol=0)


def test_times_fall_on_the_levels_that_the_student_draws_at() -> None:
    taught = lesson(4, 10)
    assert taught.levels.shape == (4, 4), "ten teacher steps become twelve"
    starts = taught.start(torch.tensor([0.999, 0.75, 0.749, 0.5, 0.3, 0.0]))
    own = grid(Schedule(), 4, "time")[:4]
    assert starts.tolist() == pytest.approx([own[0], own[0], own[1], own[1], own[2], own[3]])
    torch.testing.assert_close(taught.levels[1:, 0], taught.levels[:-1, -1])


@pytest.mark.parametrize("parametrization", ["x0", "v", "edm"])
def test_a_student_that_returns_the_target_has_no_loss(parametrization: str) -> None:
    config = DiffusionConfig(parametrization=parametrization, text_drop=0.5)
    taught = lesson(4, 8, guidance=1.7)
    images = noise().repeat(1, 1, 2, 2).float().clamp(-1, 1)
    pupil = Pupil(taught, config)
    options = {"seed": 3, "positions": torch.arange(4), "global_batch": 4, "config": config}
    value, each = loss(pupil, images, TEXT, MASK, lesson=taught, **options)
    assert sorted(each["log_snr"].tolist()) == pytest.approx(taught.levels[:, 0].sort().values.tolist()), "one of each"
    assert value.item() == pytest.approx(0.0, abs=1e-7)
    plain, _ = loss(pupil, images, TEXT, MASK, lesson=lesson(4, 8, guidance=3.0), **options)
    assert plain.item() > 1e-5, "another guidance is another target"


class Pupil:
    """Returns the target itself, in its own parametrisation."""

    def __init__(self, taught: Lesson, config: DiffusionConfig) -> None:
        self.taught, self.config = taught, config

    def __call__(self, x: Tensor, log_snr: Tensor, text: Tensor, mask: Tensor, *_: Any) -> Tensor:
        scale = scaling(self.config.parametrization, log_snr.view(-1, 1, 1, 1), self.config.sigma_data)
        z = x if scale.c_in is None else x / scale.c_in
        starts = self.taught.levels[:, 0].float()
        step = (log_snr[:, None] - starts).abs().argmin(1)
        t = 1 - (step + 0.5) / len(starts)
        x0 = self.taught.target(z, t, text, mask)
        return x0 if scale.c_out is None else (x0 - scale.c_skip * z) / scale.c_out


class Affine(torch.nn.Module):
    """x0 = a z + b with one pair (a, b) per level of the student: all that a Gaussian student needs."""

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.levels = levels.float()
        self.pairs = torch.nn.Parameter(torch.zeros(len(levels), 2))

    def forward(self, z: Tensor, log_snr: Tensor, *_: Any) -> Tensor:
        slope, offset = self.pairs[(log_snr[:, None] - self.levels).abs().argmin(1)].unbind(1)
        return slope.view(-1, 1, 1, 1) * z + offset.view(-1, 1, 1, 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_learns_to_draw_what_its_teacher_draws(steps: int) -> None:
    config = DiffusionConfig(parametrization="x0", max_weight=4.0)
    shared = SamplerConfig(threshold="none")
    distill = DistillConfig(steps=steps, teacher="x", teacher_steps=16, solver="ddim", guidance=1.0)
    teacher, pupil = distill.teacher_sampler(shared), distill.student_sampler(shared)

    def ideal(z: Tensor, log_snr: Tensor, *_: Any) -> Tensor:
        return gaussian(z, log_snr)

    taught = Lesson.of(ideal, config, teacher, config, steps, 16)
    student = Affine(taught.levels[:, 0])
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for step in range(250):
        positions = torch.arange(step * 8, step * 8 + 8)
        images = MEAN + SPREAD * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        text, mask = torch.zeros(8, 1, 4), torch.zeros(8, 1, dtype=torch.bool)
        value, _ = loss(
            student, images, text, mask, config=config, seed=0, positions=positions, global_batch=8, lesson=taught
        )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    options: dict[str, Any] = {"config": config, "seeds": range(4)}
    drawn = sample(gaussian, (4, 3, 8, 8), sampler=teacher, **options)
    few = sample(lambda z, level: student(z, torch.full((4,), level)), (4, 3, 8, 8), sampler=pupil, **options)
    torch.testing.assert_close(few, drawn, atol=0.02, rtol=0)
    assert drawn.std() == pytest.approx(SPREAD, rel=0.15)
