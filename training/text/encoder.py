"""Captions to embeddings: `words` (hash-based, no weights) and frozen models from disk, behind one interface.

Shapes: B captions, T = max_tokens (fixed, so that compiled networks see one shape), D = dim.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.recent import Recent
from training.text.models import TextModel, load_text_model, model_settings, width_of
from training.text.words import normalise_word, split_words, token_vectors

if TYPE_CHECKING:
    from training.config.experiment import TextConfig

log = logging.getLogger(__name__)

CACHE_BYTES = 128 * 2**20
CHARACTERS_PER_TOKEN = 32
"""Captions are truncated to this many characters per token before tokenizing, so that very long ones cost nothing."""


def _size(row: Tensor) -> int:  # a named function, so that encoders can be pickled
    return row.nbytes


class TextEncoder(ABC):
    """Encodes captions as token embeddings. Deterministic and frozen; repeated captions come from a bounded cache.

    Attributes:
        dim: width D of the embeddings.
        max_tokens: T; longer captions are truncated.
        name: description for logs and reports, one line.
    """

    dim: int
    max_tokens: int
    name: str

    def __init__(self, config: TextConfig, device: torch.device | str) -> None:
        self.max_tokens = config.max_tokens
        self.device = torch.device(device)
        self._cache: Recent[str, Tensor] = Recent(CACHE_BYTES, _size)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode captions, on `self.device`.

        Returns:
            text: fp32 (B, T, D), zero where there is no token.
            mask: bool (B, T), True on tokens. An empty caption has an all-False row, which means "no text" to the
            U-Net.
        """
        cut = [self._cut(caption) for caption in captions]
        rows = self._rows_of({caption for caption in cut if caption})
        lengths = torch.tensor([len(rows[caption]) if caption else 0 for caption in cut], dtype=torch.long)
        text = torch.zeros(len(cut), self.max_tokens, self.dim, dtype=torch.float32, device=self.device)
        for b, caption in enumerate(cut):
            if caption:
                text[b, : lengths[b]] = rows[caption]
        mask = torch.arange(self.max_tokens)[None, :] < lengths[:, None]
        return text, mask.to(self.device, non_blocking=True)

    def words(self, caption: str) -> list[tuple[str, list[int]]]:
        """Return the words of a caption, each with the indices (0 to T - 1) of its tokens, for heat maps. Words that
        share a token (Chinese characters) are merged."""
        caption = self._cut(caption)
        spans = self._token_spans(caption)[: self.max_tokens]
        found: list[tuple[int, int, list[int]]] = []
        for start, end in split_words(caption):
            places = [place for place, (first, last) in enumerate(spans) if first < end and last > start]
            if found and places and found[-1][2][-1] == places[0]:
                start, _, before = found.pop()
                places = before + places[1:]
            if places:
                found.append((start, end, places))
        return [(caption[start:end], places) for start, end, places in found]

    def is_cut(self, caption: str) -> bool:
        """Return whether the caption is longer than `max_tokens` and would be truncated."""
        return len(self._token_spans(" ".join(caption.split()))) > self.max_tokens

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move weights and cache to a device; return self."""
        self.device = torch.device(device)
        self._cache.change(lambda row: row.to(self.device))
        return self

    def _cut(self, caption: str) -> str:
        short = caption[: self.max_tokens * CHARACTERS_PER_TOKEN]
        return " ".join(short.encode("utf-8", "replace").decode().split())

    def _rows_of(self, captions: set[str]) -> dict[str, Tensor]:
        rows = {caption: row for caption in captions if (row := self._cache.get(caption)) is not None}
        missing = sorted(captions - rows.keys())
        for caption, row in zip(missing, self._encode(missing) if missing else [], strict=True):
            rows[caption] = self._cache.put(caption, row)
        return rows

    @abstractmethod
    def _encode(self, captions: list[str]) -> list[Tensor]:
        """Return fp32 (tokens of the caption, D) for each caption, on `self.device`; captions are truncated and not
        empty."""

    @abstractmethod
    def _token_spans(self, caption: str) -> list[tuple[int, int]]:
        """Return for each token of a caption the index of its first character and the index after its last; equal for a
        special token."""


class WordEncoder(TextEncoder):
    """Fixed pseudo-random vectors from each word, its trigrams, neighbours and position: any language, no download, no
    semantics.

    Words are similar only if they are spelled alike, so a model trained with it only understands the words of its
    training captions. It is meant for demos and tests, whose captions use a small set of words.
    """

    def __init__(self, config: TextConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        self.dim = config.dim
        self.name = f"words-{config.dim} (hashed words and characters, knows no meaning)"

    def _encode(self, captions: list[str]) -> list[Tensor]:
        return [torch.from_numpy(self._rows(caption)).to(self.device) for caption in captions]

    def _rows(self, caption: str) -> np.ndarray:
        words = [normalise_word(caption[start:end]) for start, end in split_words(caption)[: self.max_tokens]]
        return token_vectors(words, self.dim)

    def _token_spans(self, caption: str) -> list[tuple[int, int]]:
        return split_words(caption)


class ModelEncoder(TextEncoder):
    """A frozen language model from a directory or the Hugging Face cache; never downloaded.

    It is in eval mode, runs in `text.dtype`, and outputs fp32 hidden states with zero padding. `t5` outputs the
    encoder's `last_hidden_state` (after T5's final norm); `hidden` and `clip` output the states of `text.layer`,
    without those of `text.prefix` and of any tokens that the tokenizer puts before it.

    Args:
        any_width: do not require the model's width to be `text.dim`.

    Raises:
        DataError: there is no such model, or files are missing.
        ConfigError: the model is of another type, it has no such layer, or its width is not `text.dim`.
    """

    def __init__(self, config: TextConfig, device: torch.device | str = "cpu", any_width: bool = False) -> None:
        super().__init__(config, device)
        self.path, self._layer, self._prefix = str(config.path), config.layer, config.prefix
        settings = model_settings(config.kind, self.path)
        self.dim = width_of(settings)
        if self.dim != config.dim and not any_width:
            raise ConfigError(f"text.dim={config.dim}: {self.path} outputs {self.dim}; set text.dim={self.dim}")
        state = "" if self._layer == -1 else f", layer {self._layer}"
        self.name = f"{config.kind} {self.path} ({settings.model_type}, {self.dim} wide, {config.dtype}{state})"
        dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        found: TextModel = load_text_model(config.kind, self.path, config.tokenizer, dtype)
        self._tokenizer, self._model = found.tokenizer, found.model
        self._model.eval().requires_grad_(False).to(self.device)
        layers = found.layers
        if not -layers - 1 <= self._layer <= layers:
            raise ConfigError(f"text.layer={self._layer}: {self.path} has {layers} layers: give -{layers + 1} to -1")
        self._skipped = len(self._prefix_tokens()) if self._prefix else 0

    def to(self, device: torch.device | str) -> TextEncoder:
        """See TextEncoder.to."""
        self._model.to(device)
        return super().to(device)

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> list[Tensor]:
        tokens = self._tokenizer(
            [self._prefix + caption for caption in captions],
            max_length=self.max_tokens + self._skipped,
            truncation=True,
            padding=True,
            return_tensors="pt",
        )
        lengths = tokens["attention_mask"].sum(dim=1).tolist()
        output = self._model(
            input_ids=tokens["input_ids"].to(self.device),
            attention_mask=tokens["attention_mask"].to(self.device),
            output_hidden_states=self._layer != -1,
        )
        hidden = output.last_hidden_state if self._layer == -1 else output.hidden_states[self._layer]
        starts = [self._start(caption) for caption in captions]
        rows = zip(hidden.float(), starts, lengths, strict=True)
        return [row[start:length][: self.max_tokens].clone() for row, start, length in rows]

    def _prefix_tokens(self) -> list[int]:
        return list(self._tokenizer(self._prefix)["input_ids"])

    def _start(self, caption: str) -> int:
        """Return the index of the first token that contains part of the caption."""
        if not self._prefix:
            return 0
        offsets = self._tokenizer(self._prefix + caption, return_offsets_mapping=True)["offset_mapping"]
        return next(place for place, (_, end) in enumerate(offsets) if end > len(self._prefix))

    def _token_spans(self, caption: str) -> list[tuple[int, int]]:
        if not self._tokenizer.is_fast:  # ByT5: one token per UTF-8 byte
            return [*((i, i + 1) for i, char in enumerate(caption) for _ in char.encode()), (0, 0)]
        cut = len(self._prefix)
        offsets = self._tokenizer(self._prefix + caption, return_offsets_mapping=True)["offset_mapping"]
        spans = [(max(start - cut, 0), max(end - cut, 0)) for start, end in offsets]
        return spans[self._start(caption) :]


class T5Encoder(ModelEncoder):
    """The encoder of a T5 v1.1, mT5, umT5 or ByT5 model."""


class PairEncoder(TextEncoder):
    """Two encoders: the tokens of the second follow those of the first; the narrower one is padded with zeros.

    Raises:
        ConfigError: `text.dim` is not the larger width.
    """

    def __init__(self, config: TextConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        self._pair = [_build(one, device, any_width=number == 0) for number, one in enumerate(config.encoders())]
        self.dim = max(one.dim for one in self._pair)
        self.name = " + ".join(one.name for one in self._pair)
        if self.dim != config.dim:
            raise ConfigError(
                f"text.dim={config.dim}: the wider of {self.name} has {self.dim}; set text.dim={self.dim}"
            )

    def to(self, device: torch.device | str) -> TextEncoder:
        """See TextEncoder.to."""
        for one in self._pair:
            one.to(device)
        return super().to(device)

    def words(self, caption: str) -> list[tuple[str, list[int]]]:
        """See TextEncoder.words; the indices of a word's tokens in both encoders."""
        first, second = self._pair
        behind = min(len(first._token_spans(first._cut(caption))), first.max_tokens)
        found = first.words(caption)
        more = [(word, [place + behind for place in places]) for word, places in second.words(caption)]
        shared = min(len(found), len(more))
        if [word for word, _ in found[:shared]] != [word for word, _ in more[:shared]]:
            return found  # the encoders merge words differently, so use only the first one's
        both = [(word, places + more[number][1]) for number, (word, places) in enumerate(found[:shared])]
        return both + found[shared:] + more[shared:]

    def is_cut(self, caption: str) -> bool:
        """See TextEncoder.is_cut; whether either encoder truncates the caption."""
        return any(one.is_cut(caption) for one in self._pair)

    def _encode(self, captions: list[str]) -> list[Tensor]:
        rows = [one._encode([one._cut(caption) for caption in captions]) for one in self._pair]
        wide = [[torch.nn.functional.pad(row, (0, self.dim - row.shape[1])) for row in several] for several in rows]
        return [torch.cat(both) for both in zip(*wide, strict=True)]

    def _token_spans(self, caption: str) -> list[tuple[int, int]]:
        first, second = self._pair
        return [*first._token_spans(caption)[: first.max_tokens], *second._token_spans(caption)]


ENCODERS: dict[str, type[TextEncoder]] = {
    "words": WordEncoder,
    "t5": T5Encoder,
    "hidden": ModelEncoder,
    "clip": ModelEncoder,
}
"""Encoder class by `text.kind`. To add one: a class and a line here, its name in TEXT_KINDS, and
conf/text/NAME.yaml."""


def _build(config: TextConfig, device: torch.device | str, any_width: bool = False) -> TextEncoder:
    kind = ENCODERS[config.kind]
    return kind(config, device, any_width) if issubclass(kind, ModelEncoder) else kind(config, device)


def build_text_encoder(config: TextConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """Build the encoder of `config` on `device`, and log its name.

    Raises:
        ConfigError, DataError: see `ModelEncoder`, `PairEncoder`.
    """
    encoder = PairEncoder(config, device) if config.also else _build(config, device)
    log.info("text encoder: %s, at most %d tokens", encoder.name, encoder.max_tokens)
    return encoder
