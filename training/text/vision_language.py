"""Loads vision-language models in transformers format from a local directory, to caption pictures and to judge them."""

from __future__ import annotations

from typing import Any

import torch

from data_pipeline.common.errors import DataError
from data_pipeline.storage.retry import load_files


def load_vlm(key: str, path: str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """Load a model, frozen and in evaluation mode on the CPU, and its processor, which pads prompts on the left, so
    that answers start where prompts end.

    Args:
        key: the setting to name in an error.
        dtype: dtype of the weights; `auto`: as stored.

    Raises:
        DataError: files are missing or unreadable, or the weights lack tensors, which transformers would fill at
            random.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    load: Any = AutoModelForImageTextToText.from_pretrained
    try:
        processor: Any = load_files(path, lambda: AutoProcessor.from_pretrained(path, local_files_only=True))
        model, report = load_files(
            path, lambda: load(path, local_files_only=True, dtype=dtype, output_loading_info=True)
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{key}={path}: it cannot be loaded as a vision-language model with its processor ({reason})"
        ) from error
    if report["missing_keys"]:
        lacking = len(report["missing_keys"])
        raise DataError(f"{key}={path}: its weights are missing {lacking} tensors; fetch the model again")
    processor.tokenizer.padding_side = "left"
    return model.eval().requires_grad_(False), processor
