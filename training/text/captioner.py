"""Captions for pictures from a local vision-language model of transformers; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from training.text.identity import folder_hash
from training.text.vision_language import load_vlm

if TYPE_CHECKING:
    from PIL import Image


class Captioner:
    """Describes pictures by the most likely words after a prompt, decoded greedily: the same picture, the same text.

    Args:
        path: directory of the model with its processor, as `save_pretrained` writes them (LLaVA, Qwen-VL, SmolVLM,
            BLIP, ...: what `AutoModelForImageTextToText` loads).
        prompt: what is asked; where the processor has a chat template, as a message of the user.
        max_tokens: longest answer.

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
        """One text per picture, on one line; empty where the model says nothing."""
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
