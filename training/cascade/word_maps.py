"""Which words drew which pixels: the attention that pixels give the text tokens, summed over sampler steps and layers.

The method of DAAM (Tang et al. 2022): raw attention weights, enlarged to one size and averaged. They say where a word
was looked at, which is not always what it caused.
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
    """Records while used as a context; `add` after every sampler step keeps memory small.

    Shapes: B pictures, T tokens, h, w pixels of an attention layer.
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
        """Takes in what the layers recorded since the last call."""
        for layer in self._layers:
            for weights in layer:
                # the first rows are the conditional branch of guidance; the first token stands for "no text"
                seen = weights[: self._pictures, 1:]
                size = (seen.shape[2], seen.shape[3])
                self._sums[size] = self._sums[size] + seen if size in self._sums else seen.clone()
                self._count += 1
            layer.clear()

    def of(self, row: int, words: Sequence[tuple[str, list[int]]]) -> Heat:
        """The heat of each word of picture `row`, fp32 (H, W) at the finest layer's size; empty without attention.

        Args:
            words: each word with the places of its tokens, see `TextEncoder.words`.
        """
        if not self._sums:
            return []
        size = max(self._sums)
        heat = []
        for word, places in words:
            total = torch.zeros(size)
            for sums in self._sums.values():
                token_mean = sums[row, places].mean(dim=0)
                total += F.interpolate(token_mean[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            heat.append((word, (total / self._count).numpy()))
        return heat
