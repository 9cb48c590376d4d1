"""Captions pictures with a local vision-language model in transformers format; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from training.text.identity import folder_hash
from training.text.vision_language import load_vlm

if TYPE_CHECKING:
    from PIL import Image


class Captioner:
    """Describes pictures by greedy decoding after a prompt, so that the same picture always gets the same text.

    Args:
        path: directory of the model and its processor, as `save_pretrained` writes them (LLaVA, Qwen-VL, SmolVLM, BLIP,
            ...: any that `AutoModelForImageTextToText` loads).
        prompt: the request; sent as a user message if the processor has a chat template.
        max_tokens: maximum length of a caption, in tokens of the model.

    Raises:
        DataError: files are missing or unreadable, or the weights lack tensors.
    """

    def __init__(
        self, path: str, prompt: str, *, max_tokens: int = 128, dtype: str = "bf16", device: torch.device | str = "cpu"
    ) -> None:
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        self.prompt, self.max_tokens, self.device = prompt, max_tokens, torch.device(device)
        self.sha = folder_hash(path, "vlm.path")
        """Hash of the model's files."""
        model, self._processor = load_vlm("vlm.path", path, torch.bfloat16 if dtype == "bf16" else torch.float32)
        self._model = model.to(self.device)
        tokenizer = self._processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._asked = prompt
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            message = [{"role": "user", "content": content}]
            self._asked = self._processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)

    @torch.no_grad()
    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Return one text per picture, on one line; empty if the model generates nothing."""
        inputs = self._processor(
            images=list(pictures), text=[self._asked] * len(pictures), padding=True, return_tensors="pt"
        ).to(self.device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(self._model.dtype)
        tokens = self._model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        given = inputs["input_ids"]
        if tokens.shape[1] > given.shape[1] and torch.equal(tokens[:, : given.shape[1]], given):
            tokens = tokens[:, given.shape[1] :]
        texts = self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
