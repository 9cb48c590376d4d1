"""Distillation: a student whose one step goes where several guided steps of its teacher go.

Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512) halves the number of steps again and again. Here the
student's steps are given, and each is taught all of the teacher's steps between its two noise levels at once, so one
run does (as TRACT does, Berthelot et al. 2023, arXiv 2303.04248); guidance belongs to the teacher's steps (Meng et al.
2023, arXiv 2210.03142), so that the student needs no second pass. With two steps each the target is Salimans & Ho's.

    B pictures   z (B, 3, H, W)   levels fp64 (B, k + 1), log-SNRs from the student's level to its next one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.config.diffusion import DiffusionConfig, SamplerConfig
from training.diffusion.denoiser import Denoise, guided
from training.diffusion.sampler import ddim_step, grid, threshold
from training.diffusion.schedule import Schedule, per_sample


def taught_x0(denoise: Denoise, z: Tensor, levels: Tensor, final: Tensor, *, extrapolate: bool = False) -> Tensor:
    """The x0 with which one DDIM step from the first to the last level arrives where the teacher's steps arrive.

    A DDIM step adds (r_then - r_now) x0 to z / sigma, with r = alpha / sigma. So k of them are one with the mean of
    their x0, weighted by what each adds to r: the target of algorithm 2 in Salimans & Ho 2022, without its differences
    of nearly equal numbers.

    Args:
        denoise: the teacher, guided and thresholded: (z, log-SNRs (B,)) -> x0.
        levels: fp64 (B, k + 1), increasing.
        final: bool (B,): the last level is the clean picture, where a sampler returns its last x0 as it is.
        extrapolate: DPM-Solver++(2M) from the second step on (Lu et al. 2022), as `sampler.dpmpp_2m_step`.

    Returns:
        (B, 3, H, W), of z's dtype.
    """
    ratio = (levels / 2).exp()
    share = ratio.diff(dim=1) / (ratio[:, -1:] - ratio[:, :1])
    last = torch.zeros_like(share)
    last[:, -1] = 1.0
    share = torch.where(final[:, None], last, share)
    total, before = torch.zeros_like(z), z
    steps = share.shape[1]
    for step in range(steps):
        now, then = levels[:, step], levels[:, step + 1]
        x0 = estimate = denoise(z, now.to(z.dtype))
        if extrapolate and step:
            past = levels[:, step - 1]
            plain = (past >= now) | (now >= then) | (final & (step == steps - 1))
            slope = torch.where(plain, 0.0, (then - now) / (2 * (now - past)))
            x0 = estimate + per_sample(slope).to(z.dtype) * (estimate - before)
        before = estimate
        total += per_sample(share[:, step]).to(z.dtype) * x0
        if step + 1 < steps:
            z = ddim_step(z, x0, now.to(z.dtype), then.to(z.dtype))
    return total


@dataclass(frozen=True)
class Lesson:
    """A frozen teacher, and which of its steps make one of the student's.

    Attributes:
        levels: fp64 (N, k + 1): the log-SNRs of each of the student's N steps, the noisiest first.
        model: the teacher's network, called as `UNet.forward`.
        config: the teacher's diffusion process.
        sampler: how it is sampled: name (`ddim` or `dpmpp_2m`), guidance, interval, threshold.
        image_size: side of the whole picture, for the guidance interval.
    """

    levels: Tensor
    model: Callable[..., Tensor]
    config: DiffusionConfig
    sampler: SamplerConfig
    image_size: int

    @classmethod
    def of(
        cls,
        model: Callable[..., Tensor],
        config: DiffusionConfig,
        sampler: SamplerConfig,
        student: DiffusionConfig,
        steps: int,
        image_size: int,
    ) -> Lesson:
        """A lesson for a student of `steps` steps, from a teacher of `sampler.steps`, which is a multiple of them."""
        fine = grid(Schedule.of(student, image_size), sampler.steps, sampler.spacing)
        each = sampler.steps // steps
        rows = [fine[i * each : (i + 1) * each + 1] for i in range(steps)]
        return cls(torch.tensor(rows, dtype=torch.float64), model, config, sampler, image_size)

    def step(self, t: Tensor) -> Tensor:
        """int64 (B,): which of the student's steps belongs to a time in [0, 1), the noisiest (0) to the last times."""
        steps = len(self.levels)
        return steps - 1 - (t.to(torch.float64) * steps).long().clamp(0, steps - 1)

    def start(self, t: Tensor) -> Tensor:
        """fp32 (B,): the log-SNR at which that step begins."""
        return self.levels.to(t.device)[self.step(t), 0].to(torch.float32)

    @torch.no_grad()
    def target(
        self,
        z: Tensor,
        t: Tensor,
        text: Tensor,
        text_mask: Tensor,
        low_res: Tensor | None = None,
        aug_log_snr: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """The x0 that the student should answer at (z, start(t)). Other arguments as for `denoiser.guided`."""
        settings = self.sampler
        denoise = guided(
            self.model,
            text,
            text_mask,
            config=self.config,
            schedule=Schedule.of(self.config, self.image_size),
            guidance=settings.guidance,
            interval=(settings.guidance_interval[0], settings.guidance_interval[1]),
            low_res=low_res,
            aug_log_snr=aug_log_snr,
            sizes=sizes if self.config.size_condition else None,
        )

        def estimate(z: Tensor, log_snr: Tensor) -> Tensor:
            return threshold(denoise(z, log_snr), settings.threshold, settings.threshold_percentile)

        step = self.step(t)
        return taught_x0(
            estimate,
            z,
            self.levels.to(z.device)[step],
            step == len(self.levels) - 1,
            extrapolate=settings.name == "dpmpp_2m",
        )
