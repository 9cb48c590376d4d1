"""Feature extractors: one interface, a local file with a required SHA-256, never a download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.retry import load_files
from training.config.experiment import ExtractorConfig
from training.evaluation.metrics import features

INDEX = "model.safetensors.index.json"
"""Index of weights in several files."""
PROBE = 64
"""Side of the grey picture that every network is tested on."""
NO_RULE = "none: computed from the pictures at their own size"


class Extractor:
    """A named function from pictures to features.

    Args:
        name: name of the features in every figure.
        width: number of features d.
        pictures: maps uint8 (N, H, W, 3) to (N, d).
        texts: maps captions to (N, d) in the same space, if there is one (CLIP).
        rule: how pictures are preprocessed for the network.
        sha256: SHA-256 of the weights; empty without weights.
    """

    def __init__(
        self,
        name: str,
        width: int,
        pictures: Callable[[np.ndarray], np.ndarray],
        texts: Callable[[Sequence[str]], np.ndarray] | None = None,
        rule: str = NO_RULE,
        sha256: str = "",
    ) -> None:
        self.name, self.width, self.rule, self.sha256 = name, width, rule, sha256
        self._pictures, self.texts = pictures, texts

    def pictures(self, pictures: np.ndarray) -> np.ndarray:
        """Return the features float32 (N, d) of pictures uint8 (N, H, W, 3).

        Raises:
            DataError: a feature is not finite.
        """
        found = self._pictures(pictures).astype(np.float32)
        if not np.isfinite(found).all():
            raise DataError(f"{self.name}: the features of {_bad(found)} of {len(found)} pictures are not finite")
        return found

    def describe(self) -> dict[str, Any]:
        """Return the description for a protocol."""
        return {"width": self.width, "sha256": self.sha256, "rule": self.rule}


def _bad(found: np.ndarray) -> int:
    return int((~np.isfinite(found)).any(axis=1).sum())


def open_extractors(configs: Mapping[str, ExtractorConfig], device: str = "cpu") -> list[Extractor]:
    """Open the extractors without weights, which are always included, and those of `evaluation.extractors`.

    Raises:
        ConfigError, DataError: a file is missing, does not have the stated SHA-256, or does not fit the architecture.
    """
    found = [Extractor(name, features.WIDTHS[name], extract) for name, extract in features.EXTRACTORS.items()]
    for name, config in configs.items():
        if config.kind == "vlm":  # answers questions instead, see answers.py
            continue
        digest = verified(name, config)
        if config.kind == "inception":
            from training.evaluation.extractors.inception import load
        elif config.kind == "clip":
            from training.evaluation.extractors.towers import load_clip as load
        else:
            from training.evaluation.extractors.towers import load_dinov2 as load
        try:
            found.append(load_files(config.path, lambda: load(name, config, digest, device)))  # noqa: B023
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"evaluation.extractors.{name}.path={config.path}: not {config.kind} ({reason})") from error
        try:
            found[-1].pictures(np.full((1, PROBE, PROBE, 3), 128, np.uint8))
        except DataError as error:
            raise DataError(
                f"evaluation.extractors.{name}.path={config.path}: its features of a grey picture are not finite; "
                "the weights are damaged: fetch them again, and set the new sha256"
            ) from error
    return found


def verified(name: str, config: ExtractorConfig) -> str:
    """Return the SHA-256 of the weights, after checking that it is the configured one.

    Raises:
        ConfigError: none is configured.
        DataError: the file is missing, or has a different SHA-256.
    """
    return load_files(config.path, lambda: _verified(f"evaluation.extractors.{name}", config))


def _verified(key: str, config: ExtractorConfig) -> str:
    file = weights_file(config)
    if not file.is_file():
        origin = f"fetch it from {config.source} on a machine with internet access" if config.source else "put it there"
        stated = f" (SHA-256 {config.sha256})" if config.sha256 else ""
        raise DataError(
            f"{key}.path={config.path}: there is no {file}{stated}; {origin}: nothing is downloaded at run time"
        )
    digest = file_sha256(file) if file.name != INDEX else _sha256_of_all(file)
    if not config.sha256:
        raise ConfigError(f"{key}.sha256: set it to that of the weights, so that figures can be compared: {digest}")
    if digest != config.sha256.lower():
        raise DataError(
            f"{key}.path={config.path}: {file.name} has the SHA-256 {digest}, not {config.sha256} ({key}.sha256); "
            f"figures from other weights cannot be compared"
        )
    return digest


def weights_file(config: ExtractorConfig) -> Path:
    """Return the weights file (or its index): Inception is a single file, the others are directories in Hugging Face
    format."""
    path = Path(config.path)
    if config.kind == "inception":
        return path
    return path / (INDEX if (path / INDEX).is_file() else "model.safetensors")


def _sha256_of_all(index: Path) -> str:
    """Return the SHA-256 of weights in several files: that of their names and SHA-256s."""
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return hashlib.sha256(
        "".join(f"{name} {file_sha256(index.parent / name)}\n" for name in names).encode()
    ).hexdigest()


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def in_batches(
    pictures: np.ndarray, size: int, device: str, compute: Callable[[torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """Return a network's output, (N, d), for pictures uint8 (N, H, W, 3), `size` at a time and in full fp32 (no
    TF32)."""
    found = []
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # its default is False
        for at in range(0, len(pictures), size):
            part = torch.from_numpy(np.ascontiguousarray(pictures[at : at + size])).permute(0, 3, 1, 2).to(device)
            found.append(compute(part).float().cpu().numpy())
    return np.concatenate(found)
