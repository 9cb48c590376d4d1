"""Checkpoints compared with DeepSpeed's own in the same run: how long the loop is blocked, and how long loading takes.

    python -m benchmarks.checkpoint [MILLIONS]      # millions of weights of the model (100); 2 processes, ZeRO 1

Prints one line of JSON. `blocked_s` is how long the loop waits: until the write is started, and before the next
optimizer step until everything is in host memory (it is copied during the forward and backward pass in between;
compare `pass_s` and `pass_while_copying_s`). `written_s` is the whole write in the background, with checksums and
fsync; DeepSpeed's save blocks all the time and does neither.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training.config.experiment import Experiment
from training.processes.collectives import barrier, gather_objects
from training.processes.launcher import run_processes
from training.processes.ranks import read_ranks

TURNS = 3


def worker(scratch: Path, millions: float) -> None:
    import torch

    from training.checkpoint.store import CheckpointStore
    from training.checkpoint.writer import CheckpointWriter
    from training.engine.start import build_engine, init_distributed, shut_down

    torch.set_num_threads(1)
    config = Experiment()
    config.data.global_batch, config.ema.decays = 2, [0.999]
    ranks = read_ranks()
    assert ranks is not None
    ranks = init_distributed(ranks, config)
    width = 512
    layers = max(1, round(millions * 1e6 / width**2))
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    engine: Any = build_engine(model, config, ranks)
    store = CheckpointStore(str(scratch / "ours"))
    store.claim(ranks)
    writer = CheckpointWriter(store, config.checkpoint, ranks)
    times: dict[str, list[float]] = {
        "blocked_s": [],
        "pass_s": [],
        "pass_while_copying_s": [],
        "written_s": [],
        "loaded_s": [],
        "deepspeed_s": [],
        "deepspeed_loaded_s": [],
    }

    def timed(name: str, call: Any) -> Any:
        barrier(ranks)
        began = time.perf_counter()
        result = call()
        mine = time.perf_counter() - began
        times[name].append(max(gather_objects(mine, ranks)))
        return result

    def start(step: int) -> None:
        writer.start(step, engine.snapshot(), {"updates": 0})

    def forward_backward() -> None:
        engine.backward(engine._engine(torch.ones(1, width)).square().mean())

    def load() -> None:
        checkpoint = store.newest(ranks)
        assert checkpoint is not None
        engine.import_tensors(checkpoint.read, {kind: kind for kind in ("exp_avg", "exp_avg_sq", "ema/0")}, 0)

    deepspeed = engine._engine
    native = str(scratch / "deepspeed")
    for turn in range(TURNS + 1):
        timed("deepspeed_s", lambda turn=turn: deepspeed.save_checkpoint(native, tag=f"t{turn}"))
        timed("pass_s", forward_backward)
        engine.step(turn)
        timed("blocked_s", lambda turn=turn: start(turn + 1))
        timed("pass_while_copying_s", forward_backward)
        timed("blocked_s", engine._settle)
        second = times["blocked_s"].pop()
        times["blocked_s"][-1] += second
        engine.step(turn)
        assert writer.wait() is None
        times["written_s"].append(writer.seconds)
        timed("deepspeed_loaded_s", lambda turn=turn: deepspeed.load_checkpoint(native, tag=f"t{turn}"))
        timed("loaded_s", load)
        if ranks.is_main:
            shutil.rmtree(f"{native}/t{turn}")
    if ranks.is_main:
        best = {name: round(sorted(values[1:])[len(values[1:]) // 2], 3) for name, values in times.items()}
        ratio = {"blocked_ratio": round(best["blocked_s"] / best["deepspeed_s"], 3)}
        ratio["load_ratio"] = round(best["loaded_s"] / best["deepspeed_loaded_s"], 3)
        (scratch / "result.json").write_text(
            json.dumps({"benchmark": "checkpoint", "millions": layers * width**2 / 1e6, **best, **ratio})
        )
    shut_down()


def main(millions: float = 100.0) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        code = run_processes([sys.executable, "-m", "benchmarks.checkpoint", "--worker", scratch, str(millions)], 2)
        if code == 0:
            print(Path(scratch, "result.json").read_text())
        return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        sys.exit(main(*(float(word) for word in sys.argv[1:2])))
