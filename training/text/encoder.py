"""Captions to embeddings: `words` (hash-based, no weights) and `t5` (frozen, loaded from disk) behind one interface.

Shapes: B captions, T = max_tokens (fixed, so that compiled networks see one shape), D = dim.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.errors import ConfigError, DataError
from training.text.identity import fetch_hint
from training.text.words import normalise_word, split_words, token_vectors

if TYPE_CHECKING:
    from training.config.experiment import TextConfig

log = logging.getLogger(__name__)

CACHE_BYTES = 128 * 2**20
CHARACTERS_PER_TOKEN = 32
"""Captions are truncated to this many characters per token before tokenizing, so that very long ones cost nothing."""
T5_TYPES = ("t5", "mt5", "umt5")
"""`model_type` of the encoders that `text.kind=t5` accepts; T5 v1.1 and ByT5 call themselves t5."""


class TextEncoder(ABC):
    """Turns captions into token embeddings. Deterministic, frozen; repeated captions come from a bounded cache.

    Attributes:
        dim: width D of the embeddings.
        max_tokens: T; longer captions are truncated.
        name: one line for logs and reports.
    """

    dim: int
    max_tokens: int
    name: str

    def __init__(self, config: TextConfig, device: torch.device | str) -> None:
        self.max_tokens = config.max_tokens
        self.device = torch.device(device)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_bytes = 0

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of `captions`.

        Returns:
            text: fp32 (B, T, D), zero where there is no token.
            mask: bool (B, T), True on tokens. An empty caption has an all-False row: "no text" to the U-Net.
        """
        cut = [self._cut(caption) for caption in captions]
        rows = self._rows_of({caption for caption in cut if caption})
        lengths = torch.tensor([len(rows[caption]) if caption else 0 for caption in cut], dtype=torch.long)
        text = torch.zeros(len(cut), self.max_tokens, self.dim, device=self.device)
        for b, caption in enumerate(cut):
            if caption:
                text[b, : lengths[b]] = rows[caption]
        mask = torch.arange(self.max_tokens)[None, :] < lengths[:, None]
        return text, mask.to(self.device, non_blocking=True)

    def words(self, caption: str) -> list[tuple[str, list[int]]]:
        """The words of a caption, each with the indices (0 to T - 1) of its tokens; for heat maps. Words that share a
        token (Chinese characters) are merged."""
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
        """Whether the caption is longer than `max_tokens` and would be truncated."""
        return len(self._token_spans(" ".join(caption.split()))) > self.max_tokens

    def to(self, device: torch.device | str) -> TextEncoder:
        """Moves weights and cache; returns self."""
        self.device = torch.device(device)
        self._cache = OrderedDict((c, row.to(self.device)) for c, row in self._cache.items())
        return self

    def _cut(self, caption: str) -> str:
        short = caption[: self.max_tokens * CHARACTERS_PER_TOKEN]
        return " ".join(short.encode("utf-8", "replace").decode().split())

    def _rows_of(self, captions: set[str]) -> dict[str, Tensor]:
        rows = {caption: self._cache[caption] for caption in captions if caption in self._cache}
        for caption in rows:
            self._cache.move_to_end(caption)
        missing = sorted(captions - rows.keys())
        for caption, row in zip(missing, self._encode(missing) if missing else [], strict=True):
            rows[caption] = self._cache[caption] = row
            self._cache_bytes += row.nbytes
        while self._cache_bytes > CACHE_BYTES:
            self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
        return rows

    @abstractmethod
    def _encode(self, captions: list[str]) -> list[Tensor]:
        """fp32 (tokens of the caption, D) for each of the cut, non-empty captions, on `self.device`."""

    @abstractmethod
    def _token_spans(self, caption: str) -> list[tuple[int, int]]:
        """For each token of a caption, the places of its first character and after its last; equal for a special
        token."""


class WordEncoder(TextEncoder):
    """Fixed pseudo-random vectors per word, its trigrams, neighbours and place: any language, no download, no meaning.

    Two words are near each other only when they are spelled alike, so a model trained with it understands just the
    words of its training captions. It serves demos and tests, where captions come from a small set of words.
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


class T5Encoder(TextEncoder):
    """The encoder of a T5 v1.1, mT5, umT5 or ByT5 model from a directory or the Hugging Face cache; never downloads.

    Frozen, in eval mode; runs in `text.dtype`, outputs fp32 `last_hidden_state` (after T5's final norm), zero padding.

    Raises:
        DataError: there is no encoder, or files are missing.
        ConfigError: the model is of another type, or its width is not `text.dim`.
    """

    def __init__(self, config: TextConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        self.path = str(config.path)
        settings = _t5_settings(self.path)
        if settings.d_model != config.dim:
            raise ConfigError(
                f"text.dim={config.dim}: {self.path} outputs {settings.d_model}; set text.dim={settings.d_model}"
            )
        self.dim = int(settings.d_model)
        self.name = f"t5 {self.path} ({settings.model_type}, {self.dim} wide, {config.dtype})"
        dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        self._tokenizer, self._model = _load_t5(self.path, dtype)
        self._model.eval().requires_grad_(False).to(self.device)

    def to(self, device: torch.device | str) -> TextEncoder:
        """Moves the encoder to a device; returns itself."""
        self._model.to(device)
        return super().to(device)

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> list[Tensor]:
        tokens = self._tokenizer(
            captions, max_length=self.max_tokens, truncation=True, padding=True, return_tensors="pt"
        )
        lengths = tokens["attention_mask"].sum(dim=1).tolist()
        hidden = self._model(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        ).last_hidden_state.float()
        return [row[:length].clone() for row, length in zip(hidden, lengths, strict=True)]

    def _token_spans(self, caption: str) -> list[tuple[int, int]]:
        if not self._tokenizer.is_fast:  # ByT5: one token per UTF-8 byte
            return [*((i, i + 1) for i, char in enumerate(caption) for _ in char.encode()), (0, 0)]
        return [(start, end) for start, end in self._tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]]


def _t5_settings(path: str) -> Any:
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"text.path={path}: no encoder there nor in the Hugging Face cache; {fetch_hint(path)}"
        ) from error
    if settings.model_type not in T5_TYPES:
        raise ConfigError(f"text.path={path}: a {settings.model_type} model; text.kind=t5 takes {', '.join(T5_TYPES)}")
    return settings


def _load_t5(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    lacking = DataError(f"text.path={path}: its tokenizer files are missing or unreadable; {fetch_hint(path)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise lacking from error
    # without a vocabulary file transformers builds a tokenizer that knows no words; ByT5 needs none
    if tokenizer.is_fast and not any(_file_of(path, name) for name in ("tokenizer.json", "spiece.model")):
        raise lacking
    try:
        model, report = AutoModelForTextEncoding.from_pretrained(
            path, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"text.path={path}: its weights are missing or unreadable; {fetch_hint(path)}") from error
    # transformers initialises missing weights at random and only warns
    if report["missing_keys"]:
        raise DataError(f"text.path={path}: its weights lack {len(report['missing_keys'])} tensors; {fetch_hint(path)}")
    return tokenizer, model


def _file_of(path: str, name: str) -> str | None:
    from transformers.utils import cached_file

    return cached_file(path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)


def build_text_encoder(config: TextConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """Builds the encoder of `config.kind` on `device` and logs its name.

    Raises:
        ConfigError, DataError: see `T5Encoder`.
    """
    encoder = WordEncoder(config, device) if config.kind == "words" else T5Encoder(config, device)
    log.info("text encoder: %s, at most %d tokens", encoder.name, encoder.max_tokens)
    return encoder
