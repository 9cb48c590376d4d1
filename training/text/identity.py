"""Identifies a text encoder by hashes of its files, so that weights are only used with their own encoder."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.retry import load_files

if TYPE_CHECKING:
    from training.config.experiment import TextConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
MORE_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt")
"""Additional files of tokenizers other than T5's."""
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PIECES, _PIECE = 64, 1 << 16


def pinned(config: TextConfig) -> TextConfig:
    """Return the config with `sha` filled in: the hash of the encoder's weights and tokenizer, independent of its path.

    Raises:
        ConfigError: `text.sha` is the hash of a different encoder.
        DataError: there is no encoder at text.path.
    """
    facts = identity(config)
    found = f"{facts['weights']}-{facts['tokenizer']}"
    if config.sha not in (None, found):
        where = f"the one at text.path={config.path}" if config.path else "the `words` encoder of this version"
        raise ConfigError(
            f"text.sha={config.sha}: this is not the same text encoder as {where}, which is {found}; use the encoder "
            "that the weights were trained with"
        )
    return replace(config, sha=found)


def identity(config: TextConfig) -> dict[str, Any]:
    """Return everything that an encoder's output depends on: hashes of its weights and tokenizer, its width and length.

    Weights are hashed by name, size and 64 samples of each file, so that 20 GB take only a moment. The path does not
    matter.

    Raises:
        DataError: there is no encoder at text.path.
    """
    facts: dict[str, Any] = {"kind": config.kind, "dim": config.dim, "max_tokens": config.max_tokens}
    if config.also:
        pair = [identity(one) for one in config.encoders()]
        shares = [f"{one['kind']}-{one['max_tokens']}-{one['weights']}" for one in pair]
        return {**facts, "weights": "+".join(shares), "tokenizer": "+".join(str(one["tokenizer"]) for one in pair)}
    if config.kind == "words":
        from training.text.words import token_vectors

        probe = token_vectors(["red", "東京"], config.dim).tobytes()
        return {**facts, "weights": hashlib.blake2b(probe, digest_size=8).hexdigest(), "tokenizer": "words"}
    return {**facts, **load_files(str(config.path), lambda: _hashes(config))}


def _hashes(config: TextConfig) -> dict[str, str]:
    """Return the hashes of a model's weights and tokenizer."""
    folder = _encoder_folder(str(config.path))
    there = sorted(os.listdir(folder))
    weights = [name for name in there if name.endswith(".safetensors")] or [n for n in there if n.endswith(".bin")]
    weights.append("config.json")
    from training.text.models import tokenizer_folder

    place = _encoder_folder(tokenizer_folder(folder, config.tokenizer))
    known = TOKENIZER_FILES if config.kind == "t5" else (*TOKENIZER_FILES, *MORE_TOKENIZER_FILES)
    beside = set(os.listdir(place))
    tokenizer = [name for name in known if name in beside]
    how = "" if config.layer == -1 else f"-layer{config.layer}"
    if config.prefix:
        how += f"-prefix{hashlib.blake2b(config.prefix.encode(), digest_size=4).hexdigest()}"
    return {"weights": _hash_files(folder, weights) + how, "tokenizer": _hash_files(place, tokenizer)}


def folder_hash(path: str, key: str, model: str = "MODEL") -> str:
    """Return the hash of a model's directory: weights, config, tokenizer and processor, independent of its path.

    Args:
        key: the setting to name in an error.
        model: the model to fetch, to name in an error.

    Raises:
        DataError: there is no such directory, or it contains no weights.
    """
    return load_files(path, lambda: _folder_hash(path, key, model))


def _folder_hash(path: str, key: str, model: str) -> str:
    there = sorted(os.listdir(path)) if Path(path).is_dir() else []
    names = [name for name in there if name.endswith((".safetensors", ".bin", ".json", ".model", ".jinja", ".txt"))]
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        missing = "it has no weights (model.safetensors)" if Path(path).is_dir() else "there is no model"
        raise DataError(
            f"{key}={path}: {missing}; fetch one on a machine with internet access: hf download {model} "
            f"--local-dir {path}"
        )
    return _hash_files(path, names)


def _encoder_folder(path: str) -> str:
    """Return the directory of an encoder: a local one, or the one in the Hugging Face cache."""
    if Path(path).is_dir():
        return path
    from transformers.utils import cached_file

    names = ("config.json", *WEIGHT_FILES)
    try:
        found = [
            cached_file(path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
            for name in names
        ]
    except OSError:  # not a valid repository name
        found = [None]
    if found[0] is None:
        raise DataError(f"text.path={path}: there is no encoder here or in the Hugging Face cache; {fetch_hint(path)}")
    return os.path.dirname(found[0])


def _hash_files(folder: str, names: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        path = os.path.join(folder, name)
        size = os.path.getsize(path)
        digest.update(f"{name} {size}\n".encode())
        with open(path, "rb") as file:
            for number in range(_PIECES if size > _PIECES * _PIECE else 1):
                file.seek(number * (size - _PIECE) // (_PIECES - 1) if size > _PIECES * _PIECE else 0)
                digest.update(file.read(_PIECE if size > _PIECES * _PIECE else size))
    return digest.hexdigest()


def fetch_hint(path: str) -> str:
    """Return how to get the weights of a text encoder."""
    looks_local = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") != 1
    command = f"hf download google/t5-v1_1-xxl --local-dir {path}" if looks_local else f"hf download {path}"
    return f"fetch it on a machine with internet access: {command}"
