"""Which words the pixels attended to, summed over sampler steps and layers.

This is the method of DAAM (Tang et al. 2022): raw attention weights, up-sampled to one size and averaged. They show
where a word was attended to, which is not always what it caused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

from training.cascade.requests import Heat
from training.model.unet import UNet, record_attention


class WordMaps:
    """Records attention while used as a context manager; calling `add` after every sampler step keeps memory small.

    Args:
        pictures: number of pictures in the batch, without the second branch of guidance.
    """

    def __init__(self, unet: UNet, pictures: int) -> None:
        self._unet, self._pictures = unet, pictures
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._count = 0
        self._layers: list[list[Tensor]] = []
        self._stack = ExitStack()

    def __enter__(self) -> WordMaps:
        self._layers = self._stack.enter_context(record_attention(self._unet))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self) -> None:
        """Add what the layers have recorded since the last call to the sums, and discard it."""
        for layer in self._layers:
            for weights in layer:
                # the first rows are the conditional branch of guidance; the first token represents "no text"
                seen = weights[: self._pictures, 1:]
                size = (seen.shape[2], seen.shape[3])
                self._sums[size] = self._sums[size] + seen if size in self._sums else seen.clone()
                self._count += 1
            layer.clear()

    def of(self, row: int, words: Sequence[tuple[str, list[int]]]) -> Heat:
        """Return the heat of each word of picture `row`, fp32 (H, W) at the finest layer's size; an empty list if the
        network has no attention.

        Args:
            words: each word with the positions of its tokens, see `TextEncoder.words`.
        """
        if not self._sums:
            return []
        size = max(self._sums)
        heat = []
        for word, places in words:
            total = torch.zeros(size, dtype=torch.float32)
            for sums in self._sums.values():
                token_mean = sums[row, places].mean(dim=0)
                total += F.interpolate(token_mean[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            heat.append((word, (total / self._count).numpy()))
        return heat
