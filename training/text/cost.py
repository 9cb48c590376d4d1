"""The cost of encoding captions: parameters, memory and FLOPs of text encoders, from their configs alone."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.common.errors import DataError
from training.config.experiment import TextConfig


@dataclass(frozen=True)
class T5Shape:
    """Structure of a T5 encoder."""

    width: int
    inner: int
    """Total width of all attention heads."""
    feed_forward: int
    heads: int
    layers: int
    vocabulary: int = 32128
    gated: bool = True
    buckets: int = 32

    @property
    def matrices(self) -> int:
        """Number of weights of one layer that multiply every token."""
        return 4 * self.width * self.inner + (3 if self.gated else 2) * self.width * self.feed_forward

    @property
    def parameters(self) -> int:
        """Number of parameters: embedding, layers with two norms each, position biases of the first layer, final
        norm."""
        layer = self.matrices + 2 * self.width
        return self.vocabulary * self.width + self.layers * layer + self.buckets * self.heads + self.width

    def flops(self, tokens: int) -> int:
        """Return the FLOPs of one caption (2 per multiply-add; the embedding lookup counts as none)."""
        attention = 4 * tokens * tokens * self.inner
        return self.layers * (2 * tokens * self.matrices + attention)


V1_1 = {
    "small": T5Shape(512, 384, 1024, 6, 8),
    "base": T5Shape(768, 768, 2048, 12, 12),
    "large": T5Shape(1024, 1024, 2816, 16, 24),
    "xl": T5Shape(2048, 2048, 5120, 32, 24),
    "xxl": T5Shape(4096, 4096, 10240, 64, 24),
}
"""T5 v1.1 by the last part of the model's name, for plans on machines without its files."""


@dataclass(frozen=True)
class TextCost:
    """Cost of a text encoder; zeros for `words`, which has no network, and for an unknown encoder."""

    parameters: int
    basis: str
    """How the cost was determined."""
    bytes: int
    """Weights in memory, bytes."""
    flops_per_caption: float
    """FLOPs for text.max_tokens tokens and those of text.prefix (shorter captions cost less)."""


def text_cost(text: TextConfig) -> TextCost:
    """Return the cost of an encoder, from its config, or from its name if its files are not on this machine."""
    if text.also:
        pair = [text_cost(one) for one in text.encoders()]
        basis = " + ".join(dict.fromkeys(one.basis for one in pair))
        sums = (sum(one.parameters for one in pair), sum(one.bytes for one in pair))
        return TextCost(sums[0], basis, sums[1], sum(one.flops_per_caption for one in pair))
    if text.kind == "words":
        return TextCost(0, "no network", 0, 0.0)
    if text.kind != "t5":
        return _model_cost(text)
    shape, basis = t5_shape(str(text.path))
    if shape is None:
        return TextCost(0, basis, 0, 0.0)
    width = 2 if text.dtype == "bf16" else 4
    return TextCost(shape.parameters, basis, shape.parameters * width, float(shape.flops(text.max_tokens)))


def _model_cost(text: TextConfig) -> TextCost:
    """Count the cost on the structure of the text tower, without weights: each matrix except the embeddings multiplies
    every token once. An encoder that transformers does not load is not counted."""
    import torch

    from training.text.models import TYPES, load_tokenizer, model_class, model_settings, text_settings, tower

    if text.kind not in TYPES:
        return TextCost(0, "not counted", 0, 0.0)
    try:
        settings = model_settings(text.kind, str(text.path))
    except DataError:
        return TextCost(0, "not on this machine", 0, 0.0)
    own = text_settings(settings)
    if settings.model_type == "t5gemma":
        settings.is_encoder_decoder = False
    kind = model_class(settings)
    with torch.device("meta"):
        make = getattr(kind, "from_config", None) or kind._from_config
        model = tower(make(own if settings.model_type == "clip" else settings))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    width = own.num_attention_heads * (getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads)
    tokens, basis = text.max_tokens, "counted"
    if text.prefix:
        try:
            tokens += len(load_tokenizer(str(text.path), text.tokenizer)(text.prefix)["input_ids"])
        except DataError:
            basis = "counted, without text.prefix: no tokenizer on this machine"
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name)
    flops = 2 * tokens * matrices + own.num_hidden_layers * 4 * tokens * tokens * width
    return TextCost(parameters, basis, parameters * (2 if text.dtype == "bf16" else 4), float(flops))


def t5_shape(path: str) -> tuple[T5Shape | None, str]:
    """Return the structure of a T5 encoder (None if unknown), and how it was determined."""
    from training.text.models import model_settings

    try:
        settings = model_settings("t5", path)
    except DataError:
        known = V1_1.get(path.rstrip("/").rpartition("-")[2].lower())
        return known, "T5 v1.1 by its name" if known else "not on this machine, and its name says no size"
    shape = T5Shape(
        settings.d_model,
        settings.num_heads * settings.d_kv,
        settings.d_ff,
        settings.num_heads,
        settings.num_layers,
        settings.vocab_size,
        settings.is_gated_act,
        settings.relative_attention_num_buckets,
    )
    return shape, "counted"
