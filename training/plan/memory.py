"""The memory that one training process needs, by part, computed before one is started.

Activations are not estimated: one forward and one backward pass run on tensors without data, and every storage is
tracked from its creation to its end. This is done for two and for three pictures; each moment of the pass is linear in
the micro-batch. What ZeRO keeps, and where, follows the source of DeepSpeed 0.19.

    N parameters   b bytes of a weight in the network (4 fp32, 2 bf16)   W world size   D averages

With `lora`, only the adapters have gradients, moments and averages.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from training.config.experiment import Experiment, LoraConfig, StageConfig, ZeroConfig
from training.config.unet import UNetConfig, for_stage
from training.engine.base import DTYPES
from training.optim.registry import optimizer_class

if TYPE_CHECKING:
    import torch

    from training.model.unet import UNet

Align = tuple[int, int]
"""Hidden width and number of features of the projection head of `repa`."""
Adapters = tuple[int, float, tuple[str, ...]]
"""The fields of LoraConfig."""
BUCKET = 500_000_000
"""Number of gradient elements that DeepSpeed sends together (`reduce_bucket_size`)."""
LIVE_WEIGHTS = 1_000_000_000
"""Number of gathered weight elements that ZeRO 3 keeps at a time (`stage3_max_live_parameters`)."""
GPU_OVERHEAD = 1_500_000_000
"""Bytes of the CUDA context, NCCL, convolution workspaces and fragmentation; assumed."""
CPU_FLOOR = {
    "process": 327_000_000,
    "deepspeed": 29_000_000,
    "zero3": 77_000_000,
    "wandb": 34_000_000,
    "transformers": 166_000_000,
    "peft": 175_000_000,
}
"""Resident bytes of a training process on a CPU with a tiny network (0.3 M parameters), and the additional bytes for
each import; peft imports transformers. Measured with torch 2.13 for CPUs."""
DECODER_FLOOR = 307_000_000
"""Resident bytes of the separate decoding process (data.own_process=true), without its prefetched data."""
MMAP = 32 << 20
"""Size in bytes from which glibc returns freed blocks to the system; smaller ones stay with the process."""
UNUSED_HEAP = 0.35
"""Freed blocks that fit no new tensor, as a fraction of the activations below that size (measured: 0.2 to 0.4)."""
CPU_WORKSPACE = 1.5
"""Memory that convolutions on a CPU take for their own layout of inputs and outputs, as a multiple of the largest
tensor (measured)."""


# --------------------------------------------------------------------------------------- one pass, without data


@dataclass(frozen=True)
class Pass:
    """Live bytes after each allocation of a forward and backward pass.

    Attributes:
        activations: bytes of everything except weights and finished gradients.
        gradients: bytes of finished gradients of weights, if all are kept.
        largest: bytes of the largest single tensor.
    """

    activations: np.ndarray
    gradients: np.ndarray
    largest: int

    def peak(self, keep_gradients: bool) -> int:
        """Return the maximum bytes live at once."""
        return int((self.activations + self.gradients if keep_gradients else self.activations).max())


@dataclass(frozen=True)
class Passes:
    """The passes for two and for three pictures (with one picture, some copies become views)."""

    two: Pass
    three: Pass

    def at(self, batch: int) -> Pass:
        """Return the pass for `batch` pictures, by linear extrapolation."""
        grown = self.two.activations + (batch - 2) * (self.three.activations - self.two.activations)
        largest = self.two.largest + (batch - 2) * (self.three.largest - self.two.largest)
        return Pass(grown, self.two.gradients, largest)


def follow(
    config: UNetConfig,
    size: int,
    tokens: int,
    dtype: torch.dtype,
    lora: LoraConfig | None = None,
    align: Align | None = None,
) -> Passes:
    """Follow a training pass over pictures of side `size` with texts of `tokens` tokens; takes seconds the first time,
    without data or a GPU."""
    return Passes(*(_follow_one(config, size, tokens, dtype, batch, _adapters(lora), align) for batch in (2, 3)))


@functools.cache
def _follow_one(
    config: UNetConfig,
    size: int,
    tokens: int,
    dtype: torch.dtype,
    batch: int,
    adapters: Adapters | None,
    align: Align | None,
) -> Pass:
    """Follow a training pass over `batch` pictures."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = _network(config, adapters, align)
    finally:
        torch.set_default_dtype(default)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        live = live_bytes()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda p: live.to_gradient(p.grad))
        x = torch.empty(batch, config.channels, size, size, dtype=dtype)
        level = torch.empty(batch)
        text = torch.empty(batch, tokens, config.text_dim, dtype=dtype)
        mask = torch.ones(batch, tokens, dtype=torch.bool)
        low_res = (torch.empty_like(x), level) if config.low_res else (None, None)
        sizes = torch.empty(batch, 6) if config.size_condition else None
        with live:
            out = model(x, level, text, mask, *low_res, sizes).float().square().mean()
            (out if model.alignment is None else out + model.alignment.take().mean()).backward()
    return Pass(np.array(live.activations), np.array(live.gradients), live.largest)


def _adapters(lora: LoraConfig | None) -> Adapters | None:
    """Return the settings as what a cache may have as its key; None without adapters."""
    return (lora.rank, lora.alpha, tuple(lora.targets)) if lora is not None and lora.rank else None


def _network(config: UNetConfig, adapters: Adapters | None, align: Align | None) -> UNet:
    """Return the network on the meta device, with adapters and projection head if requested."""
    import torch

    from training.model.alignment import Alignment
    from training.model.lora import add_adapters
    from training.model.unet import UNet

    with torch.device("meta"):
        model = UNet(config)
        if align is not None:
            model.alignment = Alignment(config.widths[-1], *align)
        if adapters is not None:
            rank, alpha, targets = adapters
            add_adapters(model, LoraConfig(rank, alpha, list(targets)))
    return model


def live_bytes() -> Any:
    """Return a dispatch mode that records live bytes whenever a new storage appears."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, int] = {}
            self.finished: set[int] = set()
            self.now = self.done = self.largest = 0
            self.activations: list[int] = []
            self.gradients: list[int] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf.untyped_storage())
            return out

        def add(self, storage: Any) -> None:
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                self.largest = max(self.largest, self.sizes[key])
                self.activations.append(self.now)
                self.gradients.append(self.done)
                weakref.finalize(storage, self.drop, key)

        def to_gradient(self, gradient: Any) -> None:
            key = gradient.untyped_storage()._cdata
            if key in self.sizes and key not in self.finished:
                self.finished.add(key)
                self.now -= self.sizes[key]
                self.done += self.sizes[key]

        def drop(self, key: int) -> None:
            size = self.sizes.pop(key)
            if key in self.finished:
                self.finished.discard(key)
                self.done -= size
            else:
                self.now -= size

    return Live()


# ---------------------------------------------------------------------------------------------- what ZeRO keeps


def parameter_count(stage: StageConfig, text_dim: int) -> int:
    """Return the number of parameters of the stage's network, built without data."""
    return sum(math.prod(shape) for shape in parameter_shapes(for_stage(stage, text_dim)))


def parameter_shapes(
    unet: UNetConfig, lora: LoraConfig | None = None, align: Align | None = None
) -> list[tuple[int, ...]]:
    """Return the shapes of all trained parameters (with `lora`, the adapters), from a network without data."""
    return list(_trained_shapes(unet, _adapters(lora), align))


@functools.cache
def _trained_shapes(unet: UNetConfig, adapters: Adapters | None, align: Align | None) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(p.shape) for p in _network(unet, adapters, align).parameters() if p.requires_grad)


@dataclass(frozen=True)
class Setup:
    """Everything that the size of the state depends on."""

    shapes: Sequence[tuple[int, ...]]
    """Shapes of the trained parameters."""
    zero: ZeroConfig
    weight_bytes: int
    world_size: int
    averages: int
    optimizer: str = "adamw"
    on_gpu: bool = True
    frozen: int = 0
    """Number of frozen parameters."""
    floor: int = 0
    """Bytes of the process without any tensor (`process_floor`)."""
    features: int = 0
    """Bytes of the frozen picture encoder."""
    teacher: int = 0
    """Bytes of a distillation's teacher, which every process holds whole, in the network's precision. The activations
    of its passes take less than what the student later keeps for its backward pass."""

    @property
    def trained(self) -> int:
        """Number of trained values."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def parameters(self) -> int:
        """Number of values, including frozen ones."""
        return self.trained + self.frozen

    @property
    def share(self) -> int:
        """Number of trained values in this process's shard."""
        return -(-self.trained // self.world_size) if self.zero.stage else self.trained


def process_floor(config: Experiment, on_gpu: bool) -> int:
    """Return the bytes of a process without any tensor: a constant on a GPU; on a CPU depending on its imports."""
    if on_gpu:
        return GPU_OVERHEAD
    peft = config.lora.rank > 0
    parts = {
        "process": True,
        "deepspeed": config.zero.stage > 0,
        "zero3": config.zero.stage == 3,
        "wandb": config.wandb.mode != "disabled",
        "transformers": not peft
        and ((config.text.kind != "words" and not config.data.embeddings) or config.compares_features),
        "peft": peft,
    }
    return sum(CPU_FLOOR[name] for name, loaded in parts.items() if loaded)


def setup_of(config: Experiment, world_size: int, on_gpu: bool, align: Align | None = None, features: int = 0) -> Setup:
    """Return what the size of a run's state depends on.

    Args:
        align: see `features.align_of`.
        features: bytes of the frozen picture encoder.
    """
    weight_bytes, has_more = DTYPES[config.precision.dtype].itemsize, config.lora.rank or config.distill.steps
    everything = parameter_count(config.stage, config.text.dim) if has_more else 0
    return Setup(
        parameter_shapes(for_stage(config.stage, config.text.dim), config.lora, align),
        config.zero,
        weight_bytes,
        world_size,
        len(config.ema.decays),
        config.optimizer.name,
        on_gpu,
        frozen=everything if config.lora.rank else 0,
        floor=process_floor(config, on_gpu),
        features=features,
        teacher=everything * weight_bytes if config.distill.steps else 0,
    )


def kept(setup: Setup) -> dict[str, int]:
    """Return the bytes that a process holds on the device between two steps, by part; `host`: offloaded parts, and the
    copy from which checkpoints are written."""
    share, b, stage = setup.share, setup.weight_bytes, setup.zero.stage
    optimizer = optimizer_class(setup.optimizer)
    parts = {
        "weights": b * (-(-setup.parameters // setup.world_size) if stage == 3 else setup.parameters),
        "master_weights": 4 * share if stage else 0,
        "moments": optimizer.state_bytes(setup.shapes, share),
        "ema": 4 * share * setup.averages,
        "gradients": b * share if stage == 3 else 0,
        "teacher": setup.teacher,
    }
    host = 4 * share * (1 + setup.averages) + optimizer.saved_bytes(setup.shapes, share)
    if setup.zero.offload_optimizer:
        host += sum(parts.pop(name) for name in ("master_weights", "moments", "ema")) + 4 * share
    if setup.zero.offload_parameters:
        host += parts.pop("weights")
    return {**parts, "host": host}


def least(setup: Setup) -> int:
    """Return the bytes of weights, moments, averages and gradients on the device: the minimum for any micro-batch."""
    gradients = 0 if setup.zero.stage == 3 else setup.weight_bytes * setup.trained
    return gradients + sum(size for name, size in kept(setup).items() if name != "host" or not setup.on_gpu)


def phases(setup: Setup, work: Pass) -> dict[str, dict[str, int]]:
    """Return the bytes in addition to `kept`, at each moment of a step that can be the peak."""
    n, share, b, stage = setup.trained, setup.share, setup.weight_bytes, setup.zero.stage
    workspace = 0 if setup.on_gpu else int(CPU_WORKSPACE * work.largest)
    if stage == 0:
        first = 4 * n if setup.averages else 0
        return {
            "backward": _moment(b * n, workspace, work.peak(True) - b * n),
            "step": _moment(b * n, first, 0),  # an average starts as a copy of the weights
        }
    if setup.on_gpu:  # gradients are sent in buckets during the backward pass; two buckets alternate
        bucket, keeps_all = BUCKET * b * (1 if stage == 3 else 2), False
    else:
        bucket, keeps_all = min(BUCKET, n) * b, True
    gathered = min(setup.parameters, LIVE_WEIGHTS) * b if stage == 3 else 0
    collected = 0 if stage == 3 else b * share
    widened = 4 * share if b != 4 else 0
    if keeps_all:
        backward = _moment(b * n, gathered + workspace, work.peak(True) - b * n)
    else:
        backward = _moment(collected, bucket + gathered, work.peak(False))
    return {
        "backward": backward,
        "reduction": _moment(2 * collected, bucket + gathered + (b * n if stage == 3 and keeps_all else 0), 0),
        "step": _moment(2 * collected + widened, 0, 0),
    }


def _moment(gradients: int, buffers: int, activations: int) -> dict[str, int]:
    return {"gradients": gradients, "buffers": buffers, "activations": max(activations, 0)}


def memory(setup: Setup, passes: Passes, micro_batch: int, text_encoder: int = 0) -> dict[str, Any]:
    """Return the bytes by part at the peak of a step; `total` is the memory that the device needs.

    On a CPU the peak may be a checkpoint: its copy is in the same memory, in addition to what the allocator has kept of
    the step's tensors.
    """
    parts = kept(setup)
    work = passes.at(micro_batch)
    moments = phases(setup, work)
    host = parts.pop("host")
    if not setup.on_gpu:
        moments["checkpoint"] = {"gradients": 0, "activations": 0, "buffers": unreturned(setup, work, moments) + host}
    highest = max(moments, key=lambda name: sum(moments[name].values()))
    top = moments[highest]
    report = {**parts, "text_encoder": text_encoder, "picture_encoder": setup.features, "overhead": setup.floor}
    report["gradients"] += top["gradients"]
    report |= {"buffers": top["buffers"], "activations": top["activations"]}
    return {**report, "total": sum(report.values()), "host": host, "moment": highest}


def unreturned(setup: Setup, work: Pass, moments: dict[str, dict[str, int]]) -> int:
    """Return the bytes that glibc keeps after a step on a CPU: freed tensors too small to be returned to the system,
    from each moment, since the next moment needs other sizes."""
    b, flat = setup.weight_bytes, setup.weight_bytes * min(setup.trained, BUCKET)
    activations = moments["backward"]["activations"] if work.largest < MMAP else 0
    single = b * max((math.prod(shape) for shape in setup.shapes), default=0)
    gradients = b * setup.trained if single < MMAP else 0
    kept_back = activations * (1 + UNUSED_HEAP) + gradients
    if setup.zero.stage and flat < MMAP:
        kept_back += sum(moments["reduction"].values()) + (flat if setup.world_size > 1 else 0)  # gloo copies a bucket
        kept_back += flat * (setup.world_size > 1) if setup.zero.stage == 3 else 0
    return int(kept_back)


def largest_micro_batch(
    setup: Setup, passes: Passes, available: float, text_encoder: int = 0, limit: int = 4096
) -> int:
    """Return the maximum number of pictures per forward pass that fits in `available` bytes; 0: not even one."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory(setup, passes, middle, text_encoder)["total"] <= available
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
