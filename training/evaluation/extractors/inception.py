"""Inception v3 as in TensorFlow's FID graph of 2015-12-05 (Szegedy et al. 2015, "Rethinking the Inception
architecture"), with which published FIDs are computed.

The weights file is the state dict published by torch-fidelity. That package cannot be installed next to the project's
CPU build of torch (it needs torchvision), so the network is implemented here, and a test compares the two. The graph
differs from the paper in two points: average pools exclude the padding, and the last block has a maximum pool.

Shapes: N pictures, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from training.config.experiment import ExtractorConfig
from training.evaluation.extractors.base import Extractor, in_batches

SIDE = 299
WIDTH = 2048
RULE = f"{SIDE} px by TensorFlow 1.x bilinear without antialiasing, (x - 128) / 128"
Size = int | tuple[int, int]
Layer = tuple[str, int, Size] | tuple[str, int, Size, int]
"""Name in the state dict, output channels, kernel size, stride (default: 1)."""


def load(name: str, config: ExtractorConfig, sha256: str, device: str) -> Extractor:
    """Return the extractor for a local state dict.

    Raises:
        RuntimeError: the weights are of another architecture.
    """
    state = torch.load(config.path, map_location="cpu", weights_only=True)
    network = Inception()
    network.load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith("fc.")})
    network = fused(network.eval().requires_grad_(False)).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def pictures(given: np.ndarray) -> np.ndarray:
        return in_batches(given, config.batch, device, network)

    return Extractor(name, WIDTH, pictures, rule=RULE, sha256=sha256)


def fused(network: Inception) -> Inception:
    """Fold each batch norm into its convolution, in place, to save a pass over each activation; return the network."""
    for module in network.modules():
        if isinstance(module, Convolution):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.add_module("bn", nn.Identity())
    return network


class Inception(nn.Module):
    """Maps pictures uint8 (N, 3, H, W) to features fp32 (N, 2048), the global average pool before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        for name, channels, out, kernel, stride, padding in STEM:
            self.add_module(name, Convolution(channels, out, kernel, stride, padding))
        for name, channels, branches, pool in BLOCKS:
            self.add_module(name, Block(channels, branches, pool))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), 0 to 255 -> features (N, 2048)."""
        x = (resize_like_tensorflow(pictures.to(torch.float32), SIDE) - 128) / 128
        for name, *_ in STEM:
            x = getattr(self, name)(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        for name, *_ in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Size, stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Parallel branches; the last entry of a branch may be two layers that read the same input.

    Args:
        branches: the layers of each branch, in order.
        pool: `average` or `maximum` before the branch named branch_pool; `shrink`: a maximum pool of stride 2 is the
            last branch.
    """

    def __init__(self, channels: int, branches: Sequence[Sequence[Layer | tuple[Layer, Layer]]], pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.branches: list[list[tuple[str, ...]]] = []
        for branch in branches:
            width, chain = channels, []
            for entry in branch:
                layers: Any = entry if isinstance(entry[0], tuple) else (entry,)
                for name, out, kernel, *stride in layers:
                    step = stride[0] if stride else 1
                    half = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
                    self.add_module(name, Convolution(width, out, kernel, step, 0 if step > 1 else half))
                width = sum(layer[1] for layer in layers)
                chain.append(tuple(layer[0] for layer in layers))
            self.branches.append(chain)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> the concatenated branches."""
        found = []
        for chain in self.branches:
            y = self._pooled(x) if chain[0] == ("branch_pool",) else x
            for names in chain:
                y = torch.cat([getattr(self, name)(y) for name in names], dim=1)
            found.append(y)
        if self.pool == "shrink":
            found.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(found, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "maximum":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def resize_like_tensorflow(pictures: Tensor, side: int) -> Tensor:
    """Resize to (N, C, side, side) bilinearly as `tf.image.resize_bilinear` of TensorFlow 1.x does: output pixel i is
    at i * in / out, without half-pixel centres and without antialiasing."""
    for axis in (2, 3):
        size = pictures.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=pictures.device) * torch.tensor(size / side)
        low = place.long()
        shape = [1, 1, 1, 1]
        shape[axis] = side
        part = (place - low).view(shape)
        first = pictures.index_select(axis, low)
        second = pictures.index_select(axis, (low + 1).clamp(max=size - 1))
        pictures = first + (second - first) * part
    return pictures


# ------------------------------------------------------------------------------------------------- the layers

STEM: Sequence[tuple[str, int, int, Size, int, int]] = (
    ("Conv2d_1a_3x3", 3, 32, 3, 2, 0),
    ("Conv2d_2a_3x3", 32, 32, 3, 1, 0),
    ("Conv2d_2b_3x3", 32, 64, 3, 1, 1),
    ("Conv2d_3b_1x1", 64, 80, 1, 1, 0),
    ("Conv2d_4a_3x3", 80, 192, 3, 1, 0),
)
"""Name, input and output channels, kernel size, stride and padding."""


def _double(first: int, second: int, last_stride: int = 1) -> list[Layer]:
    return [
        ("branch3x3dbl_1", first, 1),
        ("branch3x3dbl_2", second, 3),
        ("branch3x3dbl_3", second, 3, last_stride),
    ]


def _block_a(pool: int) -> list[list[Any]]:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        _double(64, 96),
        [("branch_pool", pool, 1)],
    ]


def _block_c(width: int) -> list[list[Any]]:
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [
            ("branch7x7dbl_1", width, 1),
            ("branch7x7dbl_2", width, (7, 1)),
            ("branch7x7dbl_3", width, (1, 7)),
            ("branch7x7dbl_4", width, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
        [("branch_pool", 192, 1)],
    ]


def _fork(name: str) -> tuple[Layer, Layer]:
    return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))


BLOCK_B = [[("branch3x3", 384, 3, 2)], _double(64, 96, 2)]
BLOCK_D = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
    [
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3, 2),
    ],
]
BLOCK_E = [
    [("branch1x1", 320, 1)],
    [("branch3x3_1", 384, 1), _fork("branch3x3_2")],
    [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), _fork("branch3x3dbl_3")],
    [("branch_pool", 192, 1)],
]
BLOCKS: Sequence[tuple[str, int, Any, str]] = (
    ("Mixed_5b", 192, _block_a(32), "average"),
    ("Mixed_5c", 256, _block_a(64), "average"),
    ("Mixed_5d", 288, _block_a(64), "average"),
    ("Mixed_6a", 288, BLOCK_B, "shrink"),
    ("Mixed_6b", 768, _block_c(128), "average"),
    ("Mixed_6c", 768, _block_c(160), "average"),
    ("Mixed_6d", 768, _block_c(160), "average"),
    ("Mixed_6e", 768, _block_c(192), "average"),
    ("Mixed_7a", 768, BLOCK_D, "shrink"),
    ("Mixed_7b", 1280, BLOCK_E, "average"),
    ("Mixed_7c", 2048, BLOCK_E, "maximum"),
)
"""Name, input channels, branches and pool of each block."""
