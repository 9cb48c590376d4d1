"""Tiny language models with random weights, of each architecture that encodes text, stored as the hub stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.training.text.tiny_vlm import word_tokenizer

WIDE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
DECODER: dict[str, Any] = {**WIDE, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
NAMES = ("t5gemma", "gemma2", "gemma3", "qwen3", "qwen2_5_vl", "clip")


def tiny_model(name: str, path: Path) -> str:
    """One of `NAMES`: 16 channels, 3 layers, with a tokenizer of whole words."""
    import transformers as hf

    torch.manual_seed(0)
    tokenizer = word_tokenizer({})
    words = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    model: Any
    if name == "t5gemma":
        part = {**DECODER, **words}
        model = hf.T5GemmaForConditionalGeneration(hf.T5GemmaConfig(encoder=part, decoder=part, **words))
    elif name == "gemma2":
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, **words))
    elif name == "gemma3":
        sides = {**vision, "image_size": 16, "patch_size": 8}
        model = hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(text_config={**DECODER, **words}, vision_config=sides, mm_tokens_per_image=4)
        )
    elif name == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, **words))
    elif name == "qwen2_5_vl":
        sides = {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 16}
        text = {**WIDE, "num_key_value_heads": 1, "max_position_embeddings": 64, **words, "rope_parameters": rope}
        model = hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=text, vision_config=sides))
    else:
        text = {**WIDE, **words, "max_position_embeddings": 40}
        sides = {**vision, "image_size": 16, "patch_size": 8}
        model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=sides, projection_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
