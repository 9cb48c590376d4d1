"""What turns pictures into features: one interface, a local file with a required SHA-256, never a download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.common.errors import ConfigError, DataError
from training.config.experiment import ExtractorConfig
from training.evaluation.metrics import features

INDEX = "model.safetensors.index.json"
"""Names the files of weights that are too large for one."""
PROBE = 64
"""Side of the grey picture that every network sees before others do."""
NO_RULE = "none: computed from the pictures at their own size"


class Extractor:
    """A named function from pictures to features.

    Args:
        name: of the features, as it stands beside every figure.
        width: d.
        pictures: uint8 (N, H, W, 3) -> (N, d).
        texts: captions -> (N, d) in the same space, where there is one (CLIP).
        rule: what happens to a picture before the network sees it.
        sha256: of the weights; empty without weights.
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
        """float32 (N, d) of uint8 (N, H, W, 3).

        Raises:
            DataError: features that are not finite.
        """
        found = self._pictures(pictures).astype(np.float32)
        if not np.isfinite(found).all():
            raise DataError(f"{self.name}: the features of {_bad(found)} of {len(found)} pictures are not finite")
        return found

    def describe(self) -> dict[str, Any]:
        """What a protocol says of it."""
        return {"width": self.width, "sha256": self.sha256, "rule": self.rule}


def _bad(found: np.ndarray) -> int:
    return int((~np.isfinite(found)).any(axis=1).sum())


def open_extractors(configs: Mapping[str, ExtractorConfig], device: str = "cpu") -> list[Extractor]:
    """Those without weights, which always stand beside the others, and those of `evaluation.extractors`.

    Raises:
        ConfigError, DataError: a file is missing, is another one than it should be, or does not fit the architecture.
    """
    found = [Extractor(name, features.WIDTHS[name], extract) for name, extract in features.EXTRACTORS.items()]
    for name, config in configs.items():
        if config.kind == "vlm":  # it answers questions: answers.py
            continue
        digest = verified(name, config)
        if config.kind == "inception":
            from training.evaluation.extractors.inception import load
        elif config.kind == "clip":
            from training.evaluation.extractors.towers import load_clip as load
        else:
            from training.evaluation.extractors.towers import load_dinov2 as load
        try:
            with torch.backends.cudnn.flags(allow_tf32=False):
                found.append(load(name, config, digest, device))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"evaluation.extractors.{name}.path={config.path}: not {config.kind} ({reason})") from error
        try:
            found[-1].pictures(np.full((1, PROBE, PROBE, 3), 128, np.uint8))
        except DataError as error:
            raise DataError(
                f"evaluation.extractors.{name}.path={config.path}: its features of a grey picture are not finite; "
                "these weights are damaged: fetch them again, and state the new sha256"
            ) from error
    return found


def verified(name: str, config: ExtractorConfig) -> str:
    """The SHA-256 of the weights, which is the one that the configuration states.

    Raises:
        ConfigError: none is stated.
        DataError: the file is missing, or another one.
    """
    key = f"evaluation.extractors.{name}"
    file = weights_file(config)
    if not file.is_file():
        origin = f"fetch it from {config.source} on a machine with internet access" if config.source else "put it there"
        stated = f" (SHA-256 {config.sha256})" if config.sha256 else ""
        raise DataError(
            f"{key}.path={config.path}: there is no {file}{stated}; {origin}: nothing is downloaded at run time"
        )
    digest = file_sha256(file) if file.name != INDEX else _sha256_of_all(file)
    if not config.sha256:
        raise ConfigError(f"{key}.sha256: state the SHA-256 of the weights, so that figures can be compared: {digest}")
    if digest != config.sha256.lower():
        raise DataError(
            f"{key}.path={config.path}: {file.name} has the SHA-256 {digest}, not {config.sha256} ({key}.sha256); "
            f"figures of other weights cannot be compared"
        )
    return digest


def weights_file(config: ExtractorConfig) -> Path:
    """Inception is a single file; the others are directories as Hugging Face lays them out."""
    path = Path(config.path)
    if config.kind == "inception":
        return path
    return path / (INDEX if (path / INDEX).is_file() else "model.safetensors")


def _sha256_of_all(index: Path) -> str:
    """Of weights in several files: the SHA-256 of their names and SHA-256s."""
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return hashlib.sha256(
        "".join(f"{name} {file_sha256(index.parent / name)}\n" for name in names).encode()
    ).hexdigest()


def file_sha256(file: Path) -> str:
    """Of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def in_batches(
    pictures: np.ndarray, size: int, device: str, compute: Callable[[torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """A network's answers, (N, d), to uint8 (N, H, W, 3), `size` pictures at a time and in full fp32."""
    found = []
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        for at in range(0, len(pictures), size):
            part = torch.from_numpy(np.ascontiguousarray(pictures[at : at + size])).permute(0, 3, 1, 2).to(device)
            found.append(compute(part).float().cpu().numpy())
    return np.concatenate(found)
