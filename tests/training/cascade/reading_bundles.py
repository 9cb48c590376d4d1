"""Reads bundles, the runs that they are made from, files of prompts, models of others and what an evaluation left while
failing_files.c makes calls fail."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.data_pipeline.storage.failing_files import tried
from tests.training.evaluation.extractors.tiny_weights import stated
from training.cascade import bundle
from training.cascade.prompts import read_lines, read_prompts
from training.cascade.requests import stored
from training.config.experiment import ExtractorConfig, TextConfig
from training.evaluation.comparison import read_result
from training.evaluation.extractors.base import open_extractors
from training.evaluation.parts import Parts
from training.evaluation.references import ReferenceFile
from training.text.encoder import build_text_encoder
from training.text.identity import pinned


def main(place: str, cases: list[list[Any]]) -> dict[str, list[str]]:
    folder = f"{place}/some files"
    parts = Parts(Path(f"{folder}/evaluated"), {}, 1)
    opened, dino = bundle.read(f"{folder}/made"), stated("dinov2", Path(f"{folder}/dino"))
    ways: dict[str, Callable[[], Any]] = {
        "bundle": lambda: weights(bundle.read(f"{folder}/made")),
        "weights": lambda: weights(opened),
        "start": lambda: weights_of(bundle.stage_weights(f"{folder}/made", "base")),
        "run": lambda: weights(bundle.collect([f"{folder}/run"])),
        "prompts": lambda: read_prompts(f"{folder}/made/p.txt"),
        "encoder": lambda: encoded(TextConfig("t5", f"{folder}/t5", max_tokens=8, dim=16)),
        "extractor": lambda: features(dino),
        "table": lambda: read_lines(f"{folder}/made/p.csv"),
        "figures": lambda: read_result(f"{folder}/evaluated").result,
        "reference": lambda: ReferenceFile.read(f"{folder}/evaluated/r.safetensors").features["f"][:].tolist(),
        "parts": lambda: [parts.done(0), parts.read()["x/f"][:].tolist()],
        "picture": lambda: stored(Path(f"{folder}/evaluated/p.png")).getpixel((0, 0)),
    }
    logging.disable()
    return tried(ways, "some files", cases)


def encoded(config: TextConfig) -> list[Any]:
    encoder = build_text_encoder(config)
    return [pinned(config).sha, encoder.encode(["a red circle"])[0].tolist()]


def features(config: ExtractorConfig) -> list[Any]:
    return open_extractors({"dino": config})[-1].pictures(np.zeros((1, 32, 32, 3), np.uint8)).tolist()


def weights_of(stage: bundle.StageWeights) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in stage.tensors().items()}


def weights(opened: bundle.Bundle) -> list[Any]:
    return [weights_of(stage) for stage in opened.stages]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
