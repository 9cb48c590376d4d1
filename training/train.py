"""`cascade train`: trains one stage; repeating the command resumes.

The loop is in `train`, from top to bottom: next batch -> loss -> step (and averages) -> log -> sample grid -> save ->
stop? Its parts are assembled in session.py; all ranks take every decision together at the step boundary.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.errors import CascadeError
from data_pipeline.common.python import importing
from training.checkpoint.store import CheckpointError, CheckpointStore
from training.cli.typed import command_for
from training.config.experiment import Experiment
from training.plan.checks import check_named
from training.processes.endings import Signals, from_where, run_program, stop_error
from training.processes.exit_codes import EXIT_CRASH, EXIT_DEVICE_LOST, EXIT_DONE
from training.processes.launcher import launch, meeting_here
from training.processes.meeting import meeting_place
from training.processes.ranks import Ranks, is_sweep, process_count, read_ranks, thread_count
from training.run.directory import STOP, RunDir, json_lines
from training.run.watchdog import Watchdog

if TYPE_CHECKING:
    from training.run.session import Session

log = logging.getLogger("cascade")
HANDLES_SIGNALS = True
"""`main` unblocks the signals that the launcher has blocked."""


def main(config: Experiment) -> dict[str, Any]:
    """Train up to `train.steps`, in the processes of a launcher or in `cluster.processes` processes of this machine.

    Returns:
        `step`, `run_dir`, `complete`, with `stopped` (the reason) if the run was asked to end early and, if it trained,
        `position`, `loss` of the last step, `skipped`, `rollbacks`, `device_hours` and `checkpoint`.

    Raises:
        Preempted, Interrupted: stopped by a signal, after saving.
        CheckpointError: all steps are done, but the last checkpoint could not be written.
        NotFinite: `train.max_skipped` consecutive steps were skipped, even after rolling back to a checkpoint.
        RankLost: another process died, or did not respond within the time-outs.
        DeviceLost: a GPU has failed, or is not there.
    """
    check_named("train", config)
    ranks = read_ranks()
    if ranks is None:
        if ended := _ended(config):
            return ended
        if process_count(config.cluster) > 1 or is_sweep():  # DeepSpeed cannot start twice in one process
            return launch("training.train", config)
        thread_count(config.cluster)  # before torch is imported, whose own message names no remedy
        os.environ.update(meeting_here())
        ranks = Ranks()
    with Signals() as signals, closing(Watchdog(ranks, None, *Watchdog.limits(config.train))) as watchdog:
        return train(config, ranks, signals, watchdog)


def _ended(config: Experiment) -> dict[str, Any] | None:
    """Return the result of a run in which nothing is left to train, after saying so; None for any other."""
    run = RunDir(config)
    store = CheckpointStore(run.checkpoints)
    done, steps = store.newest_whole(), config.train.steps
    if 0 <= done < steps and (reason := run.asked_to_stop()):
        print(f"{run.path}: stopped early at step {done}: {reason}; delete {run.path / STOP} to continue")
        return {"step": done, "run_dir": str(run.path), "complete": False, "stopped": reason}
    if done < steps:
        return None
    saved = store.open(done).meta.get("config", {})
    run.check_own(saved)
    changes = run.changes(config, saved)
    beyond = f" above {done}" if done > steps else ""
    print(f"{run.path}: complete, all {done} steps are done; raise train.steps{beyond} to continue")
    for change in changes:
        print(f"changed since, with no effect on training: {change}")
    for line in _what_is_there(config, done):
        print(line)
    return {"step": done, "run_dir": str(run.path), "complete": True}


def objective(result: dict[str, Any]) -> float | None:
    """Return the value for a sweeper (Optuna, ...) to minimise: the last validation loss or, without validation, the
    mean loss over the last tenth of the records in metrics.jsonl.

    Args:
        result: the result of `main`.
    """
    rows = json_lines(Path(result["run_dir"], "metrics.jsonl"))
    validated = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    last = validated[-1:] or losses[-max(len(losses) // 10, 1) :]
    return sum(last) / len(last) if last else None


def train(config: Experiment, ranks: Ranks, signals: Signals, watchdog: Watchdog) -> dict[str, Any]:
    """Train as one process of a run; return its summary."""
    with importing():
        from training.engine.start import init_distributed, shut_down
        from training.run.session import Session

    try:
        watchdog.phase(meeting_place())
        ranks = init_distributed(ranks, config)
        if ranks.store is not None:
            watchdog.join(ranks.store.clone)
        session = Session(config, ranks, watchdog)
    except RuntimeError as error:
        if end := watchdog.explain(error, ranks):
            raise end from error
        raise
    engine, guard, settings = session.state.engine, session.guard, config.train
    exit_code, loss = EXIT_CRASH, math.nan
    try:
        session.begin()
        done, early = session.step, session.told_to_stop
        if session.unmeasured and not early:
            session.log_late(done, _measure(session, done))
            if _is_due(settings.sample_every, done):
                session.sample_grid(done)
        for step in range(session.step, session.step if early else settings.steps):
            # ------------------------------------------------------------------------------------- next batch
            session.profile.before(step + 1)
            with session.phase("data", step):
                micro_batches = session.next_batch(healthy=not guard.refused)

            # ------------------------------------------------------------------------------------------- loss
            share: Any = 0.0
            for batch in micro_batches:
                with session.phase("forward", step):
                    mean = session.loss(batch)
                with session.phase("backward", step):
                    engine.backward(mean)
                share = share + mean.detach() / len(micro_batches)

            # -------------- step, which also updates the averages and collects the ranks' common decisions
            with session.phase("step", step):
                info = engine.step(step, share, session.votes(signals.received), session.judge)
            signal_number = session.hear(info.votes, healthy=not guard.refused)
            done, loss = step + 1, info.loss
            session.profile.after(done)
            if info.skipped:
                guard.refuse()
                session.report_skip(done, loss, info.problem or "its gradient is not finite", micro_batches)
            else:
                guard.accept(loss)
            session.skipped += info.skipped
            if step == session.step:
                engine.set_timeout(settings.timeout_s)
                watchdog.patient = False

            # ------------------------------------------------------ validation, evaluation, log, sample grid
            early = session.told_to_stop and done < settings.steps
            last = done == settings.steps or early
            hurry = bool(signal_number) and done < settings.steps  # saving comes first; the next start measures
            measured = {} if hurry else _measure(session, done, last)
            if _is_due(settings.log_every, done, last) or measured:
                session.log(done, {"loss": loss, "grad_norm": info.grad_norm, "lr": info.lr, **measured})
            else:
                session.report.tick(done, loss)
            if not hurry and _is_due(settings.sample_every, done, last):
                session.sample_grid(done)

            # -------------------------------------------------------------------------------------- save, stop
            if guard.refused >= settings.max_skipped:
                session.roll_back(done)
            if session.saving.is_due(done) or last or signal_number:
                session.save(done, healthy=not info.skipped, wait=bool(signal_number), unmeasured=hurry)
            if signal_number:
                raise stop_error(signal_number, done, session.saving.last_step)
            if early:
                break
        session.finish_saving()
        if early:
            log.info("stopped early after step %d: %s", done, session.run.asked_to_stop())
        if session.saving.last_step < done:
            raise CheckpointError(
                f"all {done} steps are done, but the last checkpoint was not written: free up space or fix the "
                f"store; the same command resumes {from_where(session.saving.last_step)}"
            )
        if ranks.is_main and not early:
            log.info("%s: complete, all %d steps are done; checkpoint %s", config.run.dir, done, session.saving.place)
            for line in _what_is_there(config, done):
                log.info(line)
        exit_code = EXIT_DONE
        return session.summary(loss, done)
    except (CascadeError, RuntimeError) as error:
        last_error = _finished(error, session, watchdog)
        exit_code = last_error.exit_code if isinstance(last_error, CascadeError) else EXIT_CRASH
        if last_error is error:
            raise
        raise last_error from error
    finally:
        watchdog.phase("end", session.data.step)
        session.close(exit_code)
        if exit_code != EXIT_DEVICE_LOST:  # NCCL would wait for the GPU
            shut_down()


def _is_due(every: int, step: int, last: bool = False) -> bool:
    """Return whether that which happens every `every` steps (0: never), and after the last one, is due after `step`."""
    return bool(every) and (step % every == 0 or last)


def _measure(session: Session, step: int, last: bool = False) -> dict[str, float]:
    """Return the losses on held-out pictures, and the figures, that are due after `step`."""
    config = session.config
    found = session.validate(step) if _is_due(config.validation.every, step, last) else {}
    return {**found, **session.evaluate(step)} if _is_due(config.evaluation.every, step, last) else found


def _what_is_there(config: Experiment, step: int) -> list[str]:
    """Return where the samples of a run are that is complete, and what to do next, as far as that is known."""
    sheet = RunDir(config).sample_file(step)
    lines = [f"samples: {sheet}"] if os.path.exists(sheet) else []
    stages = {os.path.basename(os.path.normpath(one)): one for one in config.bundle.runs}
    if stages.get(config.stage.name) == config.run.dir:
        to_do = [name for name, one in stages.items() if not os.path.exists(os.path.join(one, "config.yaml"))]
        further = command_for("train", config, stage=to_do[0]) if to_do else command_for("bundle", config)
        lines.append(f"next: {further}")
    return lines


def _finished(error: CascadeError | RuntimeError, session: Session, watchdog: Watchdog) -> CascadeError | RuntimeError:
    """Finish what can be finished after an error; return the error to end with: that one, or what has become of the
    other ranks or of this one's GPU since."""
    if isinstance(error, CascadeError):  # raised on all ranks, so a checkpoint in progress can still be finished
        try:
            session.finish_saving()
        except (CascadeError, RuntimeError) as later:
            error = later
    if isinstance(error, CascadeError):
        return error
    return watchdog.explain(error, session.ranks) or error


if __name__ == "__main__":
    from training.cli.main import main as command_line

    run_program(lambda: command_line(["train", *sys.argv[1:]]))
