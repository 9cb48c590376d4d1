"""The time from `cascade train` to the first step, for a fresh run and for resuming at a small and a large position.

    python -m benchmarks.start           # about a minute and a half on 2 cores

Prints one line of JSON: seconds from the start of the command until the first step is reported, for a fresh run of the
demo's base stage (ZeRO 1, one process, warm caches), for resuming after step 1, and for resuming at position 10^9 (the
same checkpoint, renumbered).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data_pipeline.commands import prepare
from training.config.experiment import Experiment

TURNS, BATCH = 3, 64
FAR = 10**9 // BATCH


def first_step(run: str, shards: str, steps: int) -> float:
    """Return the seconds from the start of the command until it reports a step."""
    words = [f"data.shards={shards}", f"data.global_batch={BATCH}", f"run.dir={run}", f"train.steps={steps}"]
    words += ["train.log_every=1", "train.sample_every=0", "tracking=disabled", "cluster.threads=1"]
    began = time.perf_counter()
    command = [sys.executable, "-m", "training.cli", "train", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        for line in started.stdout:
            if "  step " in line:
                seconds = time.perf_counter() - began
                started.stdout.read()
                break
        else:
            raise RuntimeError(f"{' '.join(command)} reported no step")
    return seconds


def renumber(run: str, step: int) -> None:
    """Turn the checkpoint of step 1 into one of `step`."""
    place = Path(run) / "checkpoints"
    manifest = json.loads((place / "step-00000001" / "manifest.json").read_text())
    manifest["step"] = manifest["meta"]["step"] = step
    manifest["sha256"] = ""  # the hash of the changed manifest is unknown
    manifest["meta"]["position"] = manifest["meta"]["data"]["position"] = step * BATCH
    (place / "step-00000001").rename(place / f"step-{step:08d}")
    (place / f"step-{step:08d}" / "manifest.json").write_text(json.dumps(manifest))


def main() -> dict[str, Any]:
    times: dict[str, list[float]] = {"fresh_s": [], "resumed_s": [], "resumed_far_s": []}
    with tempfile.TemporaryDirectory() as scratch:
        config = Experiment()
        config.prepare.output = f"{scratch}/data"
        config.prepare.draw.count, config.prepare.draw.heldout, config.prepare.draw.size = 4096, 8, 32
        prepare.main(config)
        shards = f"{scratch}/data/train"
        first_step(f"{scratch}/warm", shards, 1)
        for turn in range(TURNS):
            run, far = f"{scratch}/near-{turn}", f"{scratch}/far-{turn}"
            times["fresh_s"].append(first_step(run, shards, 1))
            shutil.copytree(run, far)
            renumber(far, FAR)
            times["resumed_s"].append(first_step(run, shards, 2))
            times["resumed_far_s"].append(first_step(far, shards, FAR + 1))
    best = {name: round(sorted(values)[len(values) // 2], 2) for name, values in times.items()}
    return {"benchmark": "start", **best, "far_position": FAR * BATCH}


if __name__ == "__main__":
    print(json.dumps(main()))
