"""Settings of the diffusion process and of its samplers (plain dataclasses, no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

SCHEDULES = ("cosine", "linear", "edm", "logit_normal")
PARAMETRIZATIONS = ("eps", "x0", "v", "edm")
WEIGHTINGS = ("paper", "min_snr", "edm", "v", "flow_v", "sigmoid")
SAMPLERS = ("ddpm", "ddim", "heun", "dpmpp_2m")
THRESHOLDS = ("none", "static", "dynamic")
SPACINGS = ("auto", "time", "log_snr", "karras")


MOST_LOG_SNR = 80.0
"""Beyond this, sigma or alpha would be subnormal in fp32."""


SOLVERS = ("ddim", "dpmpp_2m")
"""Deterministic samplers, whose steps can be distilled."""

NUMBERS = {
    "min_snr_gamma": "above",
    "log_snr_std": "above",
    "sigma_data": "above",
    "max_weight": "at least",
    "shift_from": "at least",
}


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value}: it must be one of {', '.join(allowed)}")


@dataclass
class DiffusionConfig:
    """The diffusion process of a stage: noise schedule, what the network predicts, how errors are weighted."""

    schedule: str = "cosine"
    """Noise over time: a curve of training/diffusion/schedule.py, `cosine`, `linear`, `edm` or `logit_normal`."""
    log_snr_mean: float = -1.6
    """`logit_normal`: mean of the log signal-to-noise ratio in training."""
    log_snr_std: float = 1.6
    """`logit_normal`: its standard deviation."""
    parametrization: str = "v"
    """What the network outputs: `eps`, `x0`, `v`, or `edm` (preconditioned denoiser)."""
    weighting: str = "v"
    """Weight of the x0 error: `paper` (= error in eps), `v` (SNR + 1, capped), `min_snr`, `edm`, `flow_v` (= error in
    the velocity of a straight path), `sigmoid` (independent of the schedule)."""
    sigmoid_bias: float = 2.0
    """`sigmoid`: the log signal-to-noise ratio above which the weight of the eps error falls."""
    min_snr_gamma: float = 5.0
    """`min_snr`: the signal-to-noise ratio at which the weight is capped."""
    max_weight: float = 0.0
    """Cap on the weight of the x0 error; 0: none."""
    log_snr_min: float = -20.0
    """Minimum log signal-to-noise ratio (nearly pure noise)."""
    log_snr_max: float = 20.0
    """Maximum log signal-to-noise ratio (nearly clean)."""
    shift_from: int = 0
    """Reference resolution of the resolution shift 2 ln(shift_from / image_size); 0: no shift."""
    residual: bool = False
    """Super-resolution with x0 output: the network predicts the difference from the upsampled low-res picture."""
    text_drop: float = 0.1
    """Probability of training a sample without its text, for classifier-free guidance."""
    null_text: str = "zero"
    """The token that represents no text: `zero` or `learned`; stored in the checkpoint."""
    aug_max: float = 1.0
    """Super-resolution: the augmentation level (a time in [0, 1]) of the low-res input is uniform in [0, aug_max]."""
    size_condition: bool = False
    """Condition the network on each picture's original size, crop position and target size (SDXL, section 2.2), so that
    small originals can stay in the data; stage.sampler.original_side sets the original size when sampling."""
    sigma_data: float = 0.5
    """`edm`: standard deviation of the pictures' values, which lie in [-1, 1]."""
    stratified: bool = True
    """Spread the times of a global batch evenly over [0, 1]."""

    def __post_init__(self) -> None:
        _one_of("stage.diffusion.schedule", self.schedule, SCHEDULES)
        _one_of("stage.diffusion.parametrization", self.parametrization, PARAMETRIZATIONS)
        _one_of("stage.diffusion.weighting", self.weighting, WEIGHTINGS)
        _one_of("stage.diffusion.null_text", self.null_text, ("zero", "learned"))
        if self.residual and self.parametrization != "x0":
            raise ValueError(
                f"stage.diffusion.residual=true: needs stage.diffusion.parametrization=x0, not {self.parametrization}"
            )
        if not -MOST_LOG_SNR <= self.log_snr_min < self.log_snr_max <= MOST_LOG_SNR:
            raise ValueError(
                f"stage.diffusion.log_snr_min={self.log_snr_min}: it must be below log_snr_max={self.log_snr_max}, "
                f"both within +-{MOST_LOG_SNR:g}"
            )
        for key, least in NUMBERS.items():
            value = getattr(self, key)
            if not (math.isfinite(value) and (value > 0 or (value == 0 and least == "at least"))):
                raise ValueError(f"stage.diffusion.{key}={value}: it must be a number {least} 0")
        for key in ("log_snr_mean", "sigmoid_bias"):
            value = getattr(self, key)
            if not abs(value) <= MOST_LOG_SNR:
                raise ValueError(f"stage.diffusion.{key}={value}: it must be a number within +-{MOST_LOG_SNR:g}")
        for key, value in (("text_drop", self.text_drop), ("aug_max", self.aug_max)):
            if not 0 <= value <= 1:
                raise ValueError(f"stage.diffusion.{key}={value}: it must lie between 0 and 1")


class SamplerError(ValueError):
    """An invalid sampler setting.

    Args:
        key: the field of `SamplerConfig`.
        words: what follows the key, `=VALUE: ...`.
    """

    def __init__(self, key: str, words: str) -> None:
        super().__init__(key, words)
        self.key, self.words = key, words

    def __str__(self) -> str:
        return f"stage.sampler.{self.key}{self.words}"


@dataclass
class SamplerConfig:
    """How a stage is sampled: method, steps, guidance, thresholding."""

    name: str = "dpmpp_2m"
    """`ddpm`, `ddim`, `heun` or `dpmpp_2m`."""
    steps: int = 20
    """Number of sampling steps; heun evaluates the network twice per step."""
    guidance: float = 3.0
    """Guidance weight w; 1: no guidance."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """First and last time t at which guidance is applied."""
    spacing: str = "auto"
    """Spacing of the steps: uniform in `time` or `log_snr`, or `karras` (rho 7); auto: karras for the edm schedule,
    otherwise time. Use `log_snr` for few steps of dpmpp_2m: spacing them in time blurs fine detail."""
    threshold: str = "dynamic"
    """Thresholding of the guided x0: `none`, `static` (clip to [-1, 1]) or `dynamic` (per-picture percentile, Imagen
    section 2.3)."""
    threshold_percentile: float = 0.995
    """`dynamic`: fraction of a picture's values that lie within the threshold, 0 to 1."""
    aug_level: float = 0.1
    """Super-resolution: level (a time in [0, 1]) of the noise added to the low-res input."""
    original_side: float = 1024.0
    """`stage.diffusion.size_condition`: draw as if from an uncropped original whose shorter side has this many
    pixels."""
    gamma: float = 0.3
    """`ddpm`: posterior variance = lower bound^(1 - gamma) * upper bound^gamma."""

    def __post_init__(self) -> None:
        for key, allowed in (("name", SAMPLERS), ("threshold", THRESHOLDS), ("spacing", SPACINGS)):
            if getattr(self, key) not in allowed:
                raise SamplerError(key, f"={getattr(self, key)}: it must be one of {', '.join(allowed)}")
        if self.steps < 1:
            raise SamplerError("steps", f"={self.steps}: it must be at least 1")
        low_high = list(self.guidance_interval)
        if len(low_high) != 2 or not 0 <= low_high[0] <= low_high[1] <= 1:
            raise SamplerError("guidance_interval", f"={low_high}: give two times, 0 <= first <= second <= 1")
        if not (math.isfinite(self.original_side) and self.original_side > 0):
            raise SamplerError("original_side", f"={self.original_side}: it must be a number above 0")
        if not math.isfinite(self.guidance):
            raise SamplerError("guidance", f"={self.guidance}: it must be a finite number")
        for key in ("aug_level", "threshold_percentile", "gamma"):
            value = getattr(self, key)
            if not 0 <= value <= 1:
                raise SamplerError(key, f"={value}: it must lie between 0 and 1")


TAUGHT = ("steps", "teacher_steps", "solver", "guidance", "guidance_interval")
"""Distillation settings that the student's weights depend on."""


@dataclass
class DistillConfig:
    """`cascade distill`: a student with the same network learns to match several guided sampling steps of its teacher
    in one step. Both use the spacing and thresholding of stage.sampler."""

    steps: int = 0
    """Sampling steps of the student, typically 1 to 8; 0: no distillation."""
    teacher: str | None = None
    """The trained stage: a run, a checkpoint or a bundle. It stays frozen; the student starts from its averaged
    weights. A student can teach only its own steps: distill.solver=ddim, guidance=1, and teacher_steps its steps."""
    teacher_steps: int = 20
    """Sampling steps of the teacher over the same range of noise levels, rounded up to a multiple of `steps`."""
    solver: str = "dpmpp_2m"
    """Sampler of the teacher: `ddim`, or `dpmpp_2m`, restarted at each of the student's noise levels."""
    guidance: float = 3.0
    """Guidance weight to distil into the student, which then samples without guidance; 1: none."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """First and last time t at which the teacher applies guidance."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"distill.steps={self.steps}: it must be at least 1; 0: no distillation")
        if not self.steps:
            return
        if self.solver not in SOLVERS:
            raise ValueError(f"distill.solver={self.solver}: it must be ddim or dpmpp_2m, the deterministic samplers")
        if self.teacher_steps < self.steps:
            raise ValueError(
                f"distill.teacher_steps={self.teacher_steps}: the teacher needs at least as many steps as the student, "
                f"distill.steps={self.steps}"
            )
        self.teacher_sampler(SamplerConfig())

    @property
    def substeps(self) -> int:
        """Teacher steps per student step."""
        return -(-self.teacher_steps // self.steps)

    @property
    def teacher_passes(self) -> int:
        """Forward passes of the teacher per picture and training step; 2 per teacher step with guidance."""
        return self.substeps * (1 if self.guidance == 1.0 else 2) if self.steps else 0

    def teacher_sampler(self, shared: SamplerConfig) -> SamplerConfig:
        """Return the teacher's sampler; `shared` (stage.sampler) supplies spacing and thresholding."""
        return replace(
            shared,
            name=self.solver,
            steps=self.substeps * self.steps,
            guidance=self.guidance,
            guidance_interval=list(self.guidance_interval),
        )

    def student_sampler(self, shared: SamplerConfig) -> SamplerConfig:
        """Return the student's sampler: deterministic DDIM without guidance; the rest from `shared` (stage.sampler)."""
        return replace(shared, name="ddim", steps=self.steps, guidance=1.0, guidance_interval=[0.0, 1.0])
