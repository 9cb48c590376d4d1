"""Low-rank adaptation (Hu et al. 2021): fine-tunes a stage by low-rank updates of frozen weights, W + alpha / rank B A.

The `peft` library injects the adapters; a checkpoint holds only the adapters with their moments and averages. A bundle
holds plain weights with the product merged in, so sampling needs neither `peft` nor the original weights.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from training.config.experiment import LoraConfig

log = logging.getLogger("cascade")

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""Suffixes of the parameter names that `peft` gives a layer's two factors."""


def add_adapters(model: nn.Module, config: LoraConfig) -> int:
    """Freeze the model and inject adapters, in place, into the layers named in `lora.targets`. They start as a no-op.

    Returns:
        The number of trainable parameters.

    Raises:
        ConfigError: the model has none of these layers, or `peft` is not installed.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"lora.rank={config.rank}: it needs the peft package: pip install 'cascade-t2i[lora]'"
        ) from error
    layers = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    unknown = [target for target in config.targets if target not in layers]
    if len(unknown) == len(config.targets):
        known = ", ".join(sorted(layers))
        raise ConfigError(f"lora.targets={config.targets}: this U-Net has no such layers, only {known}")
    if unknown:
        log.warning("lora.targets: this U-Net has no layers %s; only the others are adapted", ", ".join(unknown))
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.scale * config.rank,  # type: ignore[arg-type]
        target_modules=list(config.targets),
        bias="none",
    )
    inject_adapter_in_model(settings, model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def merged(base: dict[str, Tensor], adapters: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return plain weights by name: `base`, with scale B A added wherever there is an adapter.

    Raises:
        DataError: the adapters belong to a different network.
    """
    weights = dict(base)
    for name, down in adapters.items():
        if not name.endswith(DOWN):
            continue
        layer = name.removesuffix(DOWN)
        up, plain = adapters[layer + UP], base.get(f"{layer}.weight")
        product = torch.einsum("or,r...->o...", up.flatten(1), down)  # a convolution's B is 1x1
        if plain is None or plain.shape != product.shape:
            raise DataError(f"the adapter of {layer} does not fit the weights it would be added to")
        weights[f"{layer}.weight"] = plain + scale * product
    return weights


def weights_sha256(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named weights (names, dtypes, shapes and values), whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
