"""Files of random weights: the real Inception, and small CLIP and DINOv2 towers in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from training.config.experiment import ExtractorConfig
from training.evaluation.extractors.base import file_sha256, weights_file
from training.evaluation.extractors.inception import Inception

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def inception_file(folder: Path) -> ExtractorConfig:
    """The layout that torch-fidelity publishes, with its classifier."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    fc = torch.nn.Linear(2048, 1008)
    state = network.state_dict() | {f"fc.{name}": tensor for name, tensor in fc.state_dict().items()}
    torch.save(state, folder / "inception.pth")
    return stated("inception", folder / "inception.pth")


def clip_folder(folder: Path) -> ExtractorConfig:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    text = {**shape, "vocab_size": len(vocabulary), "max_position_embeddings": 77, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return stated("clip", folder)


def dinov2_folder(folder: Path) -> ExtractorConfig:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    return stated("dinov2", folder)


def stated(kind: str, path: Path) -> ExtractorConfig:
    config = ExtractorConfig(kind=kind, path=str(path), source="https://example.org/weights", batch=4)
    config.sha256 = file_sha256(weights_file(config))
    return config
