"""Bundles, runs, files of prompts, text encoders, extractors and results of evaluations on a server that fails for a
moment, or for good."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
from PIL import Image

from tests.data_pipeline.storage.failing_files import outcomes
from tests.training.evaluation.extractors.tiny_weights import dinov2_folder
from tests.training.saved_runs import make_run
from tests.training.text.tiny_t5 import tiny_t5
from tests.training.tiny import stage_config
from training.cascade import bundle
from training.evaluation.comparison import FORMAT, INFLUENCES, RESULT
from training.evaluation.parts import Parts
from training.evaluation.references import ReferenceFile

CALLS = ("open", "read", "stat")
WAYS = [(way, call) for way in ("bundle", "run", "prompts", "table") for call in CALLS]
WAYS += [("weights", "open"), ("weights", "read"), ("start", "stat")]
WAYS += [(way, call) for way in ("encoder", "extractor", "figures") for call in CALLS]
WAYS += [(way, call) for way in ("reference", "parts", "picture") for call in ("open", "read")]
PASSING = [(*way, number, 2) for way in WAYS for number in (errno.ESTALE, errno.EIO)]
BETWEEN = [("weights", "open", errno.ESTALE, 1, after) for after in (1, 2)]
"""Between the check of a file and its reading: the safetensors library reports any file that it cannot open as
missing."""
LASTING = [(*way, errno.ESTALE, 10_000) for way in WAYS]
DENIED = [(way, "open", errno.EACCES, 10_000) for way in ("bundle", "weights", "prompts")]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Maps each case to its outcome: "same" (as without faults), or the type and the message of the error."""
    folder = tmp_path_factory.mktemp("failing")
    run = make_run(folder / "some files/run", stage_config("base", 16))
    bundle.write(str(folder / "some files/made"), bundle.collect([run]))
    (folder / "some files/made/p.txt").write_text("a circle\na square\n")
    (folder / "some files/made/p.csv").write_text("Prompt,Category\na circle,shapes\n")
    tiny_t5(folder / "some files/t5")
    (folder / "some files/dino").mkdir()
    dinov2_folder(folder / "some files/dino")
    evaluated, features = folder / "some files/evaluated", np.arange(6, dtype=np.float32).reshape(2, 3)
    Parts(evaluated, {}, 1).write(0, {"x/f": features})
    ReferenceFile({"f": Parts(evaluated, {}, 1).read()["x/f"]}, ["a", "b"], {}).write(evaluated / "r.safetensors")
    (evaluated / RESULT).write_text(json.dumps({"format": FORMAT}))
    np.savez(evaluated / INFLUENCES, prompts=np.arange(2))
    Image.new("RGB", (1, 1)).save(evaluated / "p.png")
    cases = [list(case) for case in (*PASSING, *BETWEEN, *LASTING, *DENIED)]
    return outcomes("tests.training.cascade.reading_bundles", folder, cases)


@pytest.mark.parametrize("case", [*PASSING, *BETWEEN], ids=str)
def test_a_server_that_comes_back_costs_nothing(said: dict[str, list[str]], case: tuple[str | int, ...]) -> None:
    assert said[" ".join(map(str, case))] == ["same"]


@pytest.mark.parametrize("case", LASTING, ids=str)
def test_a_server_that_stays_away_ends_the_command_with_the_file_named(
    said: dict[str, list[str]], case: tuple[str | int, ...]
) -> None:
    kind, message = said[" ".join(map(str, case))]
    assert kind == "StoreError" and "Stale file handle" in message and "some files" in message
    assert "giving up" in message and message.endswith("check the disk, or the mount of the file server")


@pytest.mark.parametrize("case", DENIED, ids=str)
def test_a_file_that_may_not_be_read_is_no_fault_that_passes(
    said: dict[str, list[str]], case: tuple[str | int, ...]
) -> None:
    kind, message = said[" ".join(map(str, case))]
    assert kind in ("DataError", "PermissionError") and "Permission denied" in message and "some files" in message
