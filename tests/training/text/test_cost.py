from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from training.config.experiment import TextConfig
from training.text.cost import V1_1, T5Shape, text_cost


def test_a_shape_counts_what_the_network_has_and_does() -> None:
    from transformers import AutoModelForTextEncoding, T5Config  # here, not for every process that collects the tests

    settings = T5Config(
        d_model=64, d_kv=8, num_heads=4, d_ff=96, num_layers=3, vocab_size=50, feed_forward_proj="gated-gelu"
    )
    shape = T5Shape(64, 32, 96, 4, 3, vocabulary=50)
    with torch.device("meta"):
        model = AutoModelForTextEncoding.from_config(settings)
        tokens = torch.zeros(1, 7, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=tokens)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.flops(7) == counter.get_total_flops()


def test_sizes_by_name() -> None:
    assert [round(V1_1[name].parameters / 1e6) for name in ("small", "xl", "xxl")] == [35, 1224, 4762]


def test_an_unknown_cost_is_reported() -> None:
    unknown = text_cost(TextConfig(kind="t5", path="/nowhere/encoder", dim=8))
    assert unknown.parameters == 0 and "not on this machine" in unknown.basis
    assert text_cost(TextConfig()).basis == "no network"
