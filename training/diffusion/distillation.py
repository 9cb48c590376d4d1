"""Distillation: one step of the student learns to arrive where several guided steps of its teacher arrive.

Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512) halves the number of steps repeatedly. Here the number
of student steps is fixed, and each learns all of the teacher's steps between its two noise levels at once, so that one
run is enough (as in TRACT, Berthelot et al. 2023, arXiv 2303.04248). The teacher's steps include guidance (Meng et al.
2023, arXiv 2210.03142), so that the student needs no second forward pass. With two teacher steps per student step, the
target is that of Salimans & Ho.

    B pictures   z (B, 3, H, W)   levels fp64 (B, k + 1), log-SNRs from one of the student's levels to its next
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
    """Return the x0 with which one DDIM step from the first to the last level arrives where the teacher's steps arrive.

    A DDIM step adds (r_then - r_now) x0 to z / sigma, with r = alpha / sigma. So k steps equal one step with the mean
    of their x0, weighted by what each adds to r: the target of algorithm 2 in Salimans & Ho 2022, computed without
    subtracting nearly equal numbers.

    Args:
        denoise: the teacher, guided and thresholded: (z, log-SNRs (B,)) -> x0.
        levels: fp64 (B, k + 1), increasing.
        final: bool (B,): the last level is the clean picture, where a sampler returns its last x0 unchanged.
        extrapolate: DPM-Solver++(2M) from the second step on (Lu et al. 2022), as in `sampler.dpmpp_2m_step`.

    Returns:
        (B, 3, H, W) in z's dtype.
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
    """A frozen teacher, and the teacher steps that make up each student step.

    Attributes:
        levels: fp64 (N, k + 1): the log-SNRs of the k teacher steps in each of the student's N steps, noisiest first.
        model: the teacher's network, called as `UNet.forward`.
        config: the teacher's diffusion process.
        sampler: the teacher's sampler: name (`ddim` or `dpmpp_2m`), guidance, interval, threshold.
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
        """Return a lesson for a student of `steps` steps from a teacher of `sampler.steps` steps, a multiple of
        `steps`."""
        fine = grid(Schedule.of(student, image_size), sampler.steps, sampler.spacing)
        each = sampler.steps // steps
        rows = [fine[i * each : (i + 1) * each + 1] for i in range(steps)]
        return cls(torch.tensor(rows, dtype=torch.float64), model, config, sampler, image_size)

    def step(self, t: Tensor) -> Tensor:
        """Return the student's step for each time in [0, 1), int64 (B,); the noisiest step, 0, has the latest times."""
        steps = len(self.levels)
        return steps - 1 - (t.to(torch.float64) * steps).long().clamp(0, steps - 1)

    def start(self, t: Tensor) -> Tensor:
        """Return the log-SNR at which that step starts, fp32 (B,)."""
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
        """Return the x0 that the student should predict at (z, start(t)), (B, 3, H, W). Other arguments as for
        `denoiser.guided`."""
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
