"""CLIP and DINOv2 through transformers, from local directories in Hugging Face format.

Pictures are resized with Pillow's antialiased bicubic filter to the network's input size, as in both papers' code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.config.experiment import ExtractorConfig
from training.evaluation.extractors.base import Extractor, in_batches
from training.model.dinov2 import MEAN, STD

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINOV2_SIDE = 224
"""Input side of FD-DINOv2 (Stein et al. 2023); training of the checkpoint itself ended at 518."""
TOKENS = 77
"""Maximum number of tokens that CLIP reads."""


def load_clip(name: str, config: ExtractorConfig, sha256: str, device: str) -> Extractor:
    """Return the extractor of CLIP's projected embeddings of pictures and captions, not normalised, for CLIP score and
    CMMD."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(config.path, local_files_only=True, dtype=torch.float32)
    model = model.eval().requires_grad_(False).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(config.path, local_files_only=True)
    side = model.config.vision_config.image_size

    def embed(batch: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(normalised(batch, CLIP_MEAN, CLIP_STD)).pooler_output)

    def texts(captions: Sequence[str]) -> np.ndarray:
        found = []
        with torch.inference_mode():
            for at in range(0, len(captions), config.batch):
                tokens = tokenizer(
                    list(captions[at : at + config.batch]),
                    padding=True,
                    truncation=True,
                    max_length=min(TOKENS, model.config.text_config.max_position_embeddings),
                    return_tensors="pt",
                ).to(device)
                found.append(model.text_projection(model.text_model(**tokens).pooler_output).cpu().numpy())
        return np.concatenate(found)

    def pictures(given: np.ndarray) -> np.ndarray:
        return in_batches(resized(given, side), config.batch, device, embed)

    return Extractor(name, model.config.projection_dim, pictures, texts, _rule(side), sha256)


def load_dinov2(name: str, config: ExtractorConfig, sha256: str, device: str) -> Extractor:
    """Return the extractor of DINOv2's class token after the final layer norm."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(config.path, local_files_only=True, dtype=torch.float32)
    model = model.eval().requires_grad_(False).to(device)
    side = min(DINOV2_SIDE, model.config.image_size)

    def embed(batch: Tensor) -> Tensor:
        return model(normalised(batch, MEAN, STD)).pooler_output

    def pictures(given: np.ndarray) -> np.ndarray:
        return in_batches(resized(given, side), config.batch, device, embed)

    return Extractor(name, model.config.hidden_size, pictures, rule=_rule(side), sha256=sha256)


def resized(pictures: np.ndarray, side: int) -> np.ndarray:
    """Resize square pictures to uint8 (N, side, side, 3)."""
    if pictures.shape[1] == side:
        return pictures
    return np.stack([np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC)) for p in pictures])


def normalised(batch: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise uint8 (N, 3, H, W) to fp32 with the mean and standard deviation of the network's training data."""
    centre, spread = (torch.tensor(v, device=batch.device).view(1, 3, 1, 1) for v in (mean, std))
    return (batch.to(torch.float32) / 255 - centre) / spread


def _rule(side: int) -> str:
    return f"{side} px by Pillow's antialiased bicubic"
