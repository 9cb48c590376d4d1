"""A tiny T5 with random weights, stored as the hub stores one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def tiny_t5(path: Path, *, byte_level: bool = False, multilingual: bool = False, drop: str | None = None) -> str:
    """A whole T5 v1.1, ByT5 or mT5 (encoder and decoder) of 16 channels with its tokenizer files, as the hub stores
    one."""
    from safetensors.torch import load_file, save_file
    from transformers import (  # type: ignore[attr-defined]
        ByT5Tokenizer,
        MT5Config,
        MT5ForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
        T5TokenizerFast,
    )

    torch.manual_seed(0)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    pieces += [(f"▁{word}", -2.0) for word in ["a", "large", "red", "circle", "on", "white"]]
    pieces += [(char, -6.0) for char in "▁abcdefghijklmnopqrstuvwxyz"]
    pieces += [(piece, -3.0) for piece in ["蓝天", "白云", "下", "的", "沙滩"] if multilingual]
    if byte_level:
        ByT5Tokenizer().save_pretrained(path)
    else:
        T5TokenizerFast(vocab=pieces, extra_ids=0).save_pretrained(path)
    kind: Any
    kind, whole = (MT5Config, MT5ForConditionalGeneration) if multilingual else (T5Config, T5ForConditionalGeneration)
    config = kind(
        vocab_size=384 if byte_level else len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1,
        num_heads=2, feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        tokenizer_class="ByT5Tokenizer" if byte_level else "T5Tokenizer",
    )  # fmt: skip
    whole(config).save_pretrained(path)
    if drop:
        tensors = load_file(path / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if drop not in k}, path / "model.safetensors", {"format": "pt"})
    return str(path)
