"""`cascade train`: train one stage; the same command again resumes.

The loop stands in `train`, from top to bottom: next batch -> loss -> step (and averages) -> log -> sample grid -> save
-> stop? What it calls is put together in session.py; every decision is taken by all ranks together at the step
boundary.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any

from data_pipeline.errors import CascadeError
from training.checkpoint import CheckpointStore
from training.config import Experiment
from training.distributed import Ranks, all_sum, free_port, launch, process_count, read_ranks
from training.resilience import NotFinite, Signals, stop_error
from training.run_dir import RunDir


def main(config: Experiment) -> dict[str, Any]:
    """Trains up to `train.steps`, in as many processes as a launcher or `cluster.processes` says.

    Returns:
        step, position, loss of the last step, run_dir, seconds, skipped.

    Raises:
        Preempted, Interrupted: stopped by a signal; everything is saved.
        NotFinite: `train.max_skipped` steps in a row could not be applied.
    """
    ranks = read_ranks()
    if ranks is None:
        run = RunDir(config)
        done = CheckpointStore(run.checkpoints).newest_committed()
        if done >= config.train.steps:
            print(
                f"{run.path}: complete, all {config.train.steps} steps are done; raise train.steps to go on", flush=True
            )
            return {"step": done, "run_dir": str(run.path), "complete": True}
        if process_count(config.cluster) > 1:
            return launch("training.train", config)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        ranks = Ranks()
    with Signals() as signals:
        return train(config, ranks, signals)


def train(config: Experiment, ranks: Ranks, signals: Signals) -> dict[str, Any]:
    """One process of a run."""
    from training.engine import init_distributed, shut_down
    from training.session import Session

    ranks = init_distributed(ranks, config)
    session = Session(config, ranks)
    exit_code, loss, skipped_in_a_row = 1, math.nan, 0
    try:
        for step in range(session.step, config.train.steps):
            # ------------------------------------------------------------------------------------- next batch
            with session.waiting():
                micro_batches = next(session.loader)

            # ------------------------------------------------------------------- loss, step, moving averages
            share: Any = 0.0
            for batch in micro_batches:
                mean = session.loss(batch)
                session.engine.backward(mean)
                share = share + mean.detach() / len(micro_batches)
            info = session.engine.step(step)
            session.position = session.loader.position
            done = step + 1
            if step == session.step:
                session.engine.set_timeout(config.train.timeout_s)

            # --------------------------------------------------------------------- what all ranks know together
            total, *asked = all_sum([float(share), *(float(signals.received == n) for n in signals.HANDLED)], ranks)
            loss = total / ranks.world_size
            signal_number = next((n for n, count in zip(signals.HANDLED, asked, strict=True) if count), 0)
            session.counters["skipped"] += info.skipped
            skipped_in_a_row = skipped_in_a_row + 1 if info.skipped else 0

            # -------------------------------------------------------------------------------------------- log
            if info.skipped:
                session.report_skip(done, loss, micro_batches)
            if done % config.train.log_every == 0 or done == config.train.steps:
                session.log(done, {"loss": loss, "grad_norm": info.grad_norm, "lr": info.lr})

            # ------------------------------------------------------------------------------------ sample grid
            every = config.train.sample_every
            if every and (done % every == 0 or done == config.train.steps):
                session.sample_grid(done)

            # ------------------------------------------------------------------------------------------- save
            if done % config.checkpoint.every == 0 or done == config.train.steps or signal_number:
                session.save(done, wait=bool(signal_number))

            # ------------------------------------------------------------------------------------------- stop
            if signal_number:
                raise stop_error(signal_number, done)
            if skipped_in_a_row >= config.train.max_skipped:
                raise NotFinite(
                    f"step {done}: the last {skipped_in_a_row} steps had no finite gradient and were skipped "
                    f"(train.max_skipped); the newest checkpoint is step {session.writer.last_step}; look at the "
                    f"skipped batches in {session.run.path}/logs, or lower optimizer.lr"
                )
        session.finish_saving()
        exit_code = 0
        return session.summary(loss)
    except CascadeError as error:  # decided together: a checkpoint under way can still be finished
        session.finish_saving()
        exit_code = error.exit_code
        raise
    finally:
        session.close(exit_code)
        shut_down()


if __name__ == "__main__":
    from training.cli import main as command_line

    command_line(["train", *sys.argv[1:]])
