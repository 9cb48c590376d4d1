"""A frozen DINOv2 from a local directory; training compares pictures by its patch features. Nothing is downloaded."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.retry import load_files
from training.config.features import DinoConfig
from training.text.identity import folder_hash

DINO = "facebook/dinov2-base"
"""The encoder to fetch where none is found; DINOv2 of any size will do."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of each colour channel that DINOv2 expects pictures in [0, 1] to be normalised with
(ImageNet's)."""


def pinned_dino(config: DinoConfig) -> DinoConfig:
    """Return the config with `sha` filled in from the files at dino.path; unchanged if no path is set.

    Raises:
        ConfigError: `dino.sha` is the hash of a different encoder.
        DataError: there is no encoder at dino.path.
    """
    if not config.path:
        return config
    found = folder_hash(config.path, "dino.path", DINO)
    if config.sha not in (None, found):
        raise ConfigError(
            f"dino.sha={config.sha}: dino.path={config.path} has a different encoder, {found}; use the one that the "
            "run started with"
        )
    return replace(config, sha=found)


def dino_settings(path: str) -> Any:
    """Read the encoder's structure (a transformers `Dinov2Config`) from its config.json.

    Raises:
        DataError: the file is missing, unreadable, or of another type of model.
    """
    from transformers import Dinov2Config

    file = Path(path) / "config.json"
    try:
        kind = json.loads(load_files(path, file.read_text)).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"dino.path={path}: it has no readable config.json; fetch the encoder on a machine with internet access: "
            f"hf download {DINO} --local-dir {path}"
        ) from error
    if kind != "dinov2":
        raise DataError(f"dino.path={path}: it holds a model of type {kind}, not dinov2")
    return Dinov2Config.from_json_file(file)


def patch_grid(height: int, width: int, side: int, patch: int) -> tuple[int, int]:
    """Return the rows and columns of patches of a picture resized to about side x side pixels, keeping its aspect
    ratio. `patch`: pixels per side of a patch."""
    scale = side / (height * width) ** 0.5
    return max(round(height * scale / patch), 1), max(round(width * scale / patch), 1)


class Dinov2:
    """The frozen encoder; a call returns patch features after the final norm, without the class token.

    Raises:
        DataError: files are missing or unreadable, or the weights lack tensors, which transformers would fill at
            random.
    """

    def __init__(self, config: DinoConfig, dtype: torch.dtype, device: str) -> None:
        from transformers import Dinov2Model

        path = str(config.path)
        dino_settings(path)
        try:
            load: Any = Dinov2Model.from_pretrained
            model, report = load_files(
                path, lambda: load(path, local_files_only=True, dtype=dtype, output_loading_info=True)
            )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise DataError(f"dino.path={path}: it cannot be loaded ({' '.join(str(error).split())[:200]})") from error
        if report["missing_keys"]:
            lacking = len(report["missing_keys"])
            raise DataError(f"dino.path={path}: its weights lack {lacking} tensors; fetch the encoder again")
        self.model, self.side, self.dtype = model.eval().requires_grad_(False).to(device), config.side, dtype
        self.patch: int = model.config.patch_size

    def __call__(self, pictures: Tensor, *, learn: bool = False) -> tuple[Tensor, tuple[int, int]]:
        """Return fp32 features (B, rows x columns, D) of pictures (B, 3, H, W) in [-1, 1], and (rows, columns).

        Args:
            learn: let gradients flow back to the pictures.
        """
        rows, columns = patch_grid(pictures.shape[2], pictures.shape[3], self.side, self.patch)
        with nullcontext() if learn else torch.no_grad():
            found = self.model(pixel_values=prepared(pictures, rows * self.patch, columns * self.patch).to(self.dtype))
            return found.last_hidden_state[:, 1:].float(), (rows, columns)


def prepared(pictures: Tensor, height: int, width: int) -> Tensor:
    """Resize pictures (B, 3, H, W) in [-1, 1] to height x width (bicubic, antialiased) and normalise them as the
    encoder expects; fp32 (B, 3, height, width)."""
    sized = F.interpolate(pictures.float(), size=(height, width), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values, device=pictures.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((sized + 1) / 2 - mean) / std
