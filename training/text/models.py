"""Loads language models from disk as text encoders, in the layouts they come in; errors name what is missing.

Pipelines store weights and tokenizer in separate folders (text_encoder_2, tokenizer_2), in several files, as encoders
alone, or as `fp16` variants; multimodal models contain a language model next to their vision tower.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.retry import load_files
from training.text.identity import fetch_hint

T5_TYPES = ("t5", "mt5", "umt5")
"""`model_type` of the encoders that `text.kind=t5` accepts; T5 v1.1 and ByT5 call themselves t5."""
HIDDEN_TYPES = (
    "t5gemma",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "qwen2",
    "qwen3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llama",
    "mistral",
)
"""`model_type` of the models that `text.kind=hidden` accepts."""
CLIP_TYPES = ("clip", "clip_text_model")
TYPES = {"t5": T5_TYPES, "hidden": HIDDEN_TYPES, "clip": CLIP_TYPES}
TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
"""Vocabulary files, of which a tokenizer needs at least one (except ByT5's)."""
_EMBEDDINGS = re.compile(r"(^|\.)(shared|embed_tokens|token_embedding)\.weight$")


@dataclass
class TextModel:
    """A loaded encoder: `model(input_ids=, attention_mask=, output_hidden_states=)`."""

    tokenizer: Any
    model: Any
    layers: int


def model_settings(kind: str, path: str) -> Any:
    """Read the transformers config of the model at text.path.

    Raises:
        DataError: there is no model, or a whole pipeline.
        ConfigError: the model is not of a type that `text.kind` accepts.
    """
    settings = load_files(path, lambda: _read_settings(path))
    if settings.model_type not in TYPES[kind]:
        other = next((name for name, types in TYPES.items() if settings.model_type in types), None)
        instead = f"; set text.kind={other}" if other else ""
        raise ConfigError(
            f"text.path={path}: it is a {settings.model_type} model, but text.kind={kind} accepts "
            f"{', '.join(TYPES[kind])}{instead}"
        )
    return settings


def _read_settings(path: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        inside = sorted(name for name in os.listdir(path) if name.startswith("text_encoder")) if _is_dir(path) else []
        if inside:
            raise DataError(
                f"text.path={path}: this is a pipeline; give one of its encoders: "
                f"{', '.join(os.path.join(path, name) for name in inside)}"
            ) from error
        if _is_dir(path) and not Path(path, "config.json").exists() and os.listdir(path):
            raise DataError(
                f"text.path={path}: config.json is missing; put the encoder's config.json next to its weights"
            ) from error
        raise DataError(
            f"text.path={path}: there is no encoder here or in the Hugging Face cache; {fetch_hint(path)}"
        ) from error


def text_settings(settings: Any) -> Any:
    """Return the part of a model's config that describes its text tower."""
    if settings.model_type == "t5gemma":
        return settings.encoder
    return getattr(settings, "text_config", None) or settings


def width_of(settings: Any) -> int:
    """Return the width of the hidden states."""
    own = text_settings(settings)
    return int(own.d_model if settings.model_type in T5_TYPES else own.hidden_size)


def model_class(settings: Any) -> Any:
    """Return the transformers class that loads the least of such a model."""
    import transformers

    if settings.model_type in T5_TYPES:
        return transformers.AutoModelForTextEncoding
    if settings.model_type == "t5gemma":
        return transformers.T5GemmaEncoderModel
    return transformers.CLIPTextModel if settings.model_type in CLIP_TYPES else transformers.AutoModel


def tower(model: Any) -> Any:
    """Return the text tower of a model that may have others."""
    return getattr(model, "language_model", None) or model


def load_text_model(kind: str, path: str, tokenizer: str | None, dtype: torch.dtype) -> TextModel:
    """Load tokenizer and weights, and make sure that the token embedding is the one in the file.

    Raises:
        DataError: files are missing or unreadable; the message names them.
        ConfigError: see `model_settings`.
    """
    return load_files(path, lambda: _load(kind, path, tokenizer, dtype))


def _load(kind: str, path: str, tokenizer: str | None, dtype: torch.dtype) -> TextModel:
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    settings = model_settings(kind, path)
    words = load_tokenizer(path, tokenizer)
    options: dict[str, Any] = {}
    if settings.model_type == "t5gemma":
        settings.is_encoder_decoder = False
        options["config"] = settings
    variant = _variant(path)
    if variant:
        options["variant"] = variant
    try:
        load: Any = model_class(settings).from_pretrained
        model, report = load(path, local_files_only=True, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(_what_weights_lack(path)) from error
    model = tower(model)
    checked = _restore_embedding(model, path)
    # transformers initialises missing weights at random and only warns
    lacking = [name for name in report["missing_keys"] if not (checked and _EMBEDDINGS.search(name))]
    if lacking:
        raise DataError(
            f"text.path={path}: its weights are missing {len(lacking)} tensors ({sorted(lacking)[0]}, ...); "
            f"{fetch_hint(path)}"
        )
    own = text_settings(settings)
    layers = own.num_layers if settings.model_type in T5_TYPES else own.num_hidden_layers
    return TextModel(words, model, int(layers))


def tokenizer_folder(path: str, tokenizer: str | None) -> str:
    """Return the folder of an encoder's tokenizer: `tokenizer`, otherwise next to the weights, or the folder where
    pipelines keep it."""
    if tokenizer:
        return tokenizer
    folder = os.path.basename(os.path.normpath(path))
    beside = os.path.join(os.path.dirname(os.path.normpath(path)), folder.replace("text_encoder", "tokenizer"))
    has_own = any(Path(path, name).exists() for name in (*TOKENIZERS, "tokenizer_config.json"))
    return beside if "text_encoder" in folder and not has_own and _is_dir(beside) else path


def load_tokenizer(path: str, tokenizer: str | None) -> Any:
    """Load the tokenizer of an encoder.

    Raises:
        DataError: its files are missing or unreadable.
    """
    from transformers import AutoTokenizer

    place = tokenizer_folder(path, tokenizer)
    lacking = DataError(
        f"text.{'tokenizer' if tokenizer else 'path'}={place}: its tokenizer files are missing or unreadable: put "
        f"tokenizer.json (or spiece.model, vocab.json with merges.txt) there, or set text.tokenizer to their folder; "
        f"{fetch_hint(path)}"
    )
    try:
        found: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError, KeyError) as error:
        raise lacking from error
    # without a vocabulary file, transformers builds a tokenizer with an empty vocabulary; ByT5 needs none
    if found.is_fast and not any(_file_of(place, name) for name in TOKENIZERS):
        raise lacking
    found.padding_side = "right"
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def _variant(path: str) -> str | None:
    """Return the variant (`fp16`, `bf16`) of a directory's weights if it has no plain ones, otherwise None."""
    names = os.listdir(path) if _is_dir(path) else []
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if any(name in ("model.safetensors", "pytorch_model.bin") or "model-0" in name for name in weights):
        return None
    found = (re.match(r"(?:pytorch_)?model\.(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$", name) for name in weights)
    return next((match[1] for match in found if match), None)


def _what_weights_lack(path: str) -> str:
    """Return the message for weights that cannot be loaded."""
    names = set(os.listdir(path)) if _is_dir(path) else set()
    for index in (name for name in names if ".index." in name and name.endswith(".json")):
        with open(os.path.join(path, index), encoding="utf-8") as file:
            wanted = set(json.load(file).get("weight_map", {}).values())
        absent = sorted(wanted - names)
        if absent:
            return (
                f"text.path={path}: {index} lists {len(wanted)} weight files, of which {absent[0]}"
                f"{f' and {len(absent) - 1} more are' if len(absent) > 1 else ' is'} missing; add what is missing"
            )
    others = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".gguf", ".pth")))
    if others and not any(name.startswith(("model", "pytorch_model")) for name in others):
        return f"text.path={path}: its weights are called {others[0]}; rename the file to model.safetensors"
    return f"text.path={path}: its weights are missing or unreadable; {fetch_hint(path)}"


def _restore_embedding(model: Any, path: str) -> bool:
    """Copy the token embedding from the file if transformers has left it random or zero because the file stores it
    under another name; return whether the file has one."""
    own = model.get_input_embeddings().weight
    stored = _stored_embedding(path, tuple(own.shape))
    if stored is None:
        return False
    stored = stored.to(own.dtype)
    if not torch.equal(own, stored):
        with torch.no_grad():
            own.copy_(stored)
    return True


def _stored_embedding(path: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return the text tower's token embedding of this shape from the weight files; None if there is none."""
    folder = path if _is_dir(path) else os.path.dirname(_file_of(path, "config.json") or "")
    names = sorted(os.listdir(folder)) if folder else []
    files = [name for name in names if name.endswith(".safetensors")]
    for name in files:
        from safetensors import safe_open

        with safe_open(os.path.join(folder, name), "pt") as content:
            for key in sorted(content.keys()):
                if _is_embedding(key) and tuple(content.get_slice(key).get_shape()) == shape:
                    return content.get_tensor(key)
    for name in [name for name in names if name.endswith(".bin") and "training_args" not in name] if not files else []:
        tensors = torch.load(os.path.join(folder, name), map_location="cpu", weights_only=True, mmap=True)
        for key, tensor in tensors.items():
            if _is_embedding(key) and tuple(tensor.shape) == shape:
                return tensor
    return None


def _is_embedding(key: str) -> bool:
    """Return whether a tensor of this name is the token embedding of the text tower."""
    return _EMBEDDINGS.search(key) is not None and "decoder" not in key and "vis" not in key


def _is_dir(path: str) -> bool:
    return Path(path).is_dir()  # unlike os.path.isdir, it raises the error of a file system that fails


def _file_of(path: str, name: str) -> str | None:
    from transformers.utils import cached_file

    return cached_file(path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
