"""A tiny LLaVA with random weights and its processor, stored as the hub stores one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = ["describe", "the", "picture", "a", "red", "blue", "circle", "square", "on", "white", "user", "assistant", ":"]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def word_tokenizer(special: dict[str, str], words: Sequence[str] = WORDS) -> Any:
    """A tokenizer of whole words, as `PreTrainedTokenizerFast`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", "<image>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", **special
    )


def tiny_vlm(path: Path, template: bool = True, seed: int = 10, words: Sequence[str] = WORDS) -> str:
    """16 channels, one layer on each side, pictures of 16 pixels. With this seed, answers differ by picture."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(seed)
    tokenizer = word_tokenizer({"additional_special_tokens": ["<image>"]}, words)  # type: ignore[dict-item]
    sides = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sides},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2, **sides},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        for layer in (
            model.model.multi_modal_projector.linear_2,
            model.model.language_model.layers[0].self_attn.o_proj,
        ):
            layer.weight.mul_(30)  # answers depend on the picture
    model.save_pretrained(path)
    square = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size=square, crop_size=square),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE if template else None,
    ).save_pretrained(path)
    return str(path)
