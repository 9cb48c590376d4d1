"""Reads a bundle, the runs it was made from and files of prompts while failing_files.c makes calls fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from tests.data_pipeline.storage.failing_files import tried
from training.cascade import bundle
from training.cascade.prompts import read_lines, read_prompts


def main(place: str, cases: list[list[Any]]) -> dict[str, list[str]]:
    folder = f"{place}/some files"
    opened = bundle.read(f"{folder}/made")
    ways: dict[str, Callable[[], Any]] = {
        "bundle": lambda: weights(bundle.read(f"{folder}/made")),
        "weights": lambda: weights(opened),
        "start": lambda: weights_of(bundle.stage_weights(f"{folder}/made", "base")),
        "run": lambda: weights(bundle.collect([f"{folder}/run"])),
        "prompts": lambda: read_prompts(f"{folder}/made/p.txt"),
        "table": lambda: read_lines(f"{folder}/made/p.csv"),
    }
    return tried(ways, "some files", cases)


def weights_of(stage: bundle.StageWeights) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in stage.tensors().items()}


def weights(opened: bundle.Bundle) -> list[Any]:
    return [weights_of(stage) for stage in opened.stages]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
