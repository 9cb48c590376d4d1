"""What `train.deterministic_reduction=true` costs.

    python -m benchmarks.same_bits          # demo_base, batch 32 in micro-batches of 4, 2 processes, ZeRO 1 and 3

Prints one line of JSON per ZeRO stage. Time: two engines in the same processes, with and without it, alternate step by
step, so that both see the same machine; `ratio` is the median over pairs of steps of the time with it over the time
without, `ratio_quartiles` the quartiles. Memory: peak resident memory of a process with only one of the engines, GB.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.config.experiment import Experiment
from training.processes.collectives import barrier, gather_objects
from training.processes.endings import run_program
from training.processes.launcher import run_processes
from training.processes.ranks import read_ranks

BATCH, MICRO, RANKS, SIZE, STEPS = 32, 4, 2, 32, 24
ENGINES = {"both": (False, True), "without": (False,), "with": (True,)}


def worker(result: Path, stage: int, which: str) -> None:
    import torch

    from training.config.unet import for_stage
    from training.engine.start import build_engine, init_distributed, shut_down
    from training.model.unet import UNet

    torch.set_num_threads(1)
    config = Experiment()
    config.zero.stage, config.data.global_batch, config.data.micro_batch = stage, BATCH, MICRO
    ranks = read_ranks()
    assert ranks is not None
    ranks = init_distributed(ranks, config)
    accumulate = BATCH // RANKS // MICRO
    unet = for_stage(replace(config.stage, image_size=SIZE), config.text.dim)
    engines: dict[bool, Any] = {}
    for same_bits in ENGINES[which]:
        torch.manual_seed(0)
        own = replace(config, train=replace(config.train, deterministic_reduction=same_bits))
        engines[same_bits] = build_engine(UNet(unet), own, ranks, accumulate)
    x, level = torch.randn(MICRO, 3, SIZE, SIZE), torch.randn(MICRO)
    text, mask = torch.randn(MICRO, 16, config.text.dim), torch.ones(MICRO, 16, dtype=torch.bool)
    seconds: dict[bool, list[float]] = {same_bits: [] for same_bits in engines}
    for step in range(STEPS):
        for same_bits in sorted(engines, reverse=bool(step % 2)):
            engine = engines[same_bits]
            barrier(ranks)
            began = time.perf_counter()
            for _ in range(accumulate):
                engine.backward(engine(x, level, text, mask).square().mean())
            engine.step(step, 0.0)
            seconds[same_bits].append(max(gather_objects(time.perf_counter() - began, ranks)))
    peak = max(gather_objects(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, ranks))
    if ranks.is_main:
        answer: dict[str, Any] = {"peak_gb": round(peak, 2)}
        if which == "both":  # the first steps allocate and record DeepSpeed's trace
            pairs = [b / a for a, b in zip(seconds[False][4:], seconds[True][4:], strict=True)]
            low, middle, high = statistics.quantiles(pairs, n=4)
            answer |= {"ratio": round(middle, 2), "ratio_quartiles": [round(low, 2), round(high, 2)]}
            answer |= {"step_s": {str(k).lower(): round(statistics.median(v[4:]), 2) for k, v in seconds.items()}}
        result.write_text(json.dumps(answer))
    shut_down()


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        for stage in (1, 3):
            found = {}
            for which in ENGINES:
                file = Path(scratch, f"{stage}-{which}.json")
                command = [sys.executable, "-m", "benchmarks.same_bits", "--worker", str(file), str(stage), which]
                code = run_processes(command, RANKS)
                if code:
                    return code
                found[which] = json.loads(file.read_text())
            peaks = {f"peak_gb_{which}": found[which]["peak_gb"] for which in ("without", "with")}
            times = {name: value for name, value in found["both"].items() if name != "peak_gb"}
            print(json.dumps({"benchmark": "same_bits", "zero": stage, **times, **peaks}), flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_program(lambda: worker(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
    else:
        sys.exit(main())
