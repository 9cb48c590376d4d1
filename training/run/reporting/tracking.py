"""Output of a run: metrics.jsonl first, then W&B, and a progress line on the terminal. Only rank 0 writes these; every
rank has its own log file."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import data_pipeline
import training
from data_pipeline.common.errors import PASSING, DataError
from data_pipeline.common.terminal import VisibleFormatter, can_overwrite
from training.cli.overrides import ENVIRONMENT
from training.config.experiment import Experiment, WandbConfig
from training.evaluation.measure import flattened
from training.processes.failures import node_name
from training.processes.ranks import Ranks
from training.run.directory import RunDir, json_lines, read_json, read_text, replace_file, to_dict
from training.run.reporting.trackers import Sinks

log = logging.getLogger("cascade")

SILENT = logging.INFO - 1
"""Log level of messages for the rank's log file only, not the terminal."""
INIT_S = 60.0
"""Seconds that W&B may take to respond at the start."""
FINISH_S = 60.0
"""Seconds that W&B may take at the end to send what is left; without a limit, it waits for a server that is gone."""
REFER_S = 5.0
"""Seconds to wait at the end for a reference to a checkpoint."""
WHOLE = "wandb/whole.json"
"""File in RUN_DIR: the id of the W&B run, and the last step before the end of a start that W&B wrote completely."""
BAR = 20
"""Width of the progress bar in characters."""


# ----------------------------------------------------------------------------------------------- messages


def start_logging(run: RunDir, ranks: Ranks) -> None:
    """Send log messages to this rank's logs/rank-#.log, and those of rank 0 to the terminal as well.

    Raises:
        DataError: rank 0 has created the directory of the logs, and it is not there for this rank.
    """
    stop_logging()
    root = logging.getLogger()
    try:
        file = _RankFile(run.log_file(ranks.rank))
    except FileNotFoundError as error:
        raise DataError(
            f"run.dir={run.path}: rank {ranks.rank} on {node_name()} does not see the directory that rank 0 has "
            f"created; choose a run.dir on a file system that all nodes share"
        ) from error
    file.setFormatter(VisibleFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    if ranks.is_main:
        terminal = _Terminal()
        terminal.setFormatter(VisibleFormatter())
        terminal.setLevel(logging.INFO)
        root.addHandler(terminal)
    root.setLevel(logging.WARNING)
    for name in ("cascade", training.__name__, data_pipeline.__name__):
        logging.getLogger(name).setLevel(SILENT)


def stop_logging() -> None:
    """Close the handlers that `start_logging` opened."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, (_RankFile, _Terminal)):
            root.removeHandler(handler)
            handler.close()


class _RankFile(logging.FileHandler):
    """A file handler with its own type, to tell it apart from other handlers. Errors of a full disk are ignored."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Terminal(logging.Handler):
    """Prints messages without prefixes, after clearing the progress line."""

    def emit(self, record: logging.LogRecord) -> None:
        clear = "\r\033[K" if can_overwrite(sys.stdout) else ""
        with suppress(OSError):  # output redirected to a file on a full disk
            print(f"{clear}{self.format(record)}", flush=True)


# ------------------------------------------------------------------------------------------ the progress line


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    whole = int(max(0.0, seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress_line(
    stage: str, step: int, steps: int, record: Mapping[str, Any], seconds_left: float, width: int = 0
) -> str:
    """Return a line such as `demo_base  step 240/1200 [####----] 20%  loss 0.0831  312.0 images/s  2:41 left`, with the
    bar shortened or omitted and the rest truncated to fit `width` columns (0: no limit)."""
    done = step / steps
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    head = f"{stage}  step {step:>{len(str(steps))}}/{steps} "
    tail = f"{done:4.0%}  loss {loss}  {record['images_per_second']:.1f} images/s  {duration(seconds_left)} left"
    cells = min(BAR, width - len(head) - len(tail) - 3) if width else BAR
    filled = round(done * cells)
    bar = f"[{'#' * filled}{'-' * (cells - filled)}] " if cells >= 4 else ""
    line = head + bar + tail
    return line[:width] if width else line


# ------------------------------------------------------------------------------------------------ the tracker


class Lines:
    """Appends lines to a file. Those that cannot be written, as on a full disk, are kept and written with a later one;
    if a file server no longer knows the open file, it is opened again."""

    def __init__(self, path: Path) -> None:
        self._path, self._unwritten = path, b""
        self._file = self._open()

    def _open(self) -> FileIO:
        return open(self._path, "ab", buffering=0)

    def append(self, line: str) -> None:
        """Write a line, after those that are not written yet. Raises `OSError` if they still cannot be."""
        self._unwritten += f"{line}\n".encode()
        self._write()

    def _write(self) -> None:
        try:
            self._write_to_file()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            fresh = self._open()
            with suppress(OSError):
                self._file.close()
            self._file = fresh
            self._write_to_file()

    def _write_to_file(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        """Close the file, after the lines that are not written yet. Raises `OSError` if they still cannot be."""
        try:
            self._write()
        finally:
            with suppress(OSError):
                self._file.close()


class Tracker:
    """Writes metrics on rank 0; on other ranks every method does nothing."""

    def __init__(
        self,
        run: RunDir,
        config: Experiment,
        ranks: Ranks,
        step: int,
        wandb_id: str,
        code: dict[str, Any],
        out: TextIO | None = None,
    ) -> None:
        self.run, self.config, self.active = run, config, ranks.is_main
        self._out = out or sys.stdout
        self._wandb: Any = None
        self._wandb_failed = False
        self._lost: str | None = None
        self._referring: threading.Thread | None = None
        if not self.active:
            return
        kept = keep_lines(run.metrics, step)
        self._lines = Lines(run.metrics)
        if kept:
            log.info("metrics.jsonl: %d lines after step %d were removed; these steps run again", kept, step)
        self._sinks = Sinks(config.trackers, run.path, run.metrics, step)
        self._wandb_id, self._first, self._last = wandb_id, step, step
        self._start_wandb = lambda: start_wandb(run, config, wandb_id, code)
        self._wandb = self._start_wandb()
        if self._wandb is not None:
            self._catch_up(step)

    def log(self, step: int, record: dict[str, Any], seconds_left: float) -> None:
        """Log one record of metrics after `step` steps; `seconds_left` is shown in the progress line."""
        if not self.active:
            return
        record = {"step": step, **{key: finite(value) for key, value in record.items()}}
        try:
            self._lines.append(json.dumps(record))
        except OSError as error:
            if self._lost is None:
                self._lost = str(error)
                log.warning(
                    "metrics.jsonl cannot be written (%s): training continues, its lines are kept until they can be",
                    error,
                )
        self._last = step
        self._to_wandb(lambda: self._wandb.log({k: v for k, v in record.items() if v is not None}, step=step))
        self._sinks.each(lambda sink: sink.log(step, record))
        self.show(step, record, seconds_left)

    def add(self, step: int, figures: dict[str, Any]) -> None:
        """Add figures to the last record, that of `step`, in which the previous start could not measure them."""
        if not self.active or not figures:
            return
        figures = {key: finite(value) for key, value in figures.items()}
        records = json_lines(self.run.metrics)
        last = records.pop() if records and records[-1]["step"] == step else {"step": step}
        try:
            self._lines.close()
            replace_file(self.run.metrics, "".join(f"{json.dumps(one)}\n" for one in [*records, {**last, **figures}]))
        except OSError as error:
            log.warning("metrics.jsonl cannot be written (%s): it lacks %s of step %d", error, ", ".join(figures), step)
        self._lines = Lines(self.run.metrics)
        known = {key: value for key, value in figures.items() if value is not None}
        self._to_wandb(lambda: self._wandb.log(known, step=self._writable(step)))
        self._sinks.each(lambda sink: sink.log(step, figures))
        log.info("step %d: what was due when the last start was stopped has been measured", step)

    def _writable(self, step: int) -> int:
        """Return the first step from `step` on to which W&B can still add: not that from which this start continues."""
        return max(step, self._first + 1)

    @property
    def on_screen(self) -> bool:
        """Whether the progress line is shown on a terminal, which can replace it."""
        return self.active and can_overwrite(self._out)

    def show(self, step: int, record: Mapping[str, Any], seconds_left: float) -> None:
        """Show the progress line; on a terminal, it replaces the one before."""
        screen = self.on_screen
        width = shutil.get_terminal_size().columns - 1 if screen else 0
        line = progress_line(self.config.trained, step, self.config.train.steps, record, seconds_left, width)
        end = "\n" if not screen or step == self.config.train.steps else ""
        with suppress(OSError):
            self._out.write(f"\r\033[K{line}{end}" if screen else line + end)
            self._out.flush()

    def image(self, step: int, path: Path) -> None:
        """Log a picture file."""
        if not self.active:
            return
        self._sinks.each(lambda sink: sink.image(step, path))
        if self._wandb is not None:
            import wandb

            self._to_wandb(lambda: self._wandb.log({"samples": wandb.Image(str(path))}, step=self._writable(step)))

    def checkpoint(self, step: int, place: object) -> None:
        """Log a checkpoint as an artifact by reference: W&B stores its location, not a copy."""
        if not self.active:
            return
        self._sinks.each(lambda sink: sink.checkpoint(step, place))
        if self._wandb is None:
            return
        url, run = str(place) if "://" in str(place) else Path(str(place)).resolve().as_uri(), self._wandb

        def add() -> None:
            import wandb

            try:
                artifact = wandb.Artifact(f"checkpoint-{run.id}", type="checkpoint", metadata={"step": step})
                artifact.add_reference(url, checksum=False)
                run.log_artifact(artifact, aliases=[f"step-{step}"])
            except Exception as error:  # losing a reference does not affect the metrics
                refused((str(error).splitlines() or [repr(error)])[0])

        def refused(why: str) -> None:
            log.warning("W&B did not accept a reference to the checkpoint of step %d (%s)", step, why)

        if run.settings._offline:
            add()
        elif self._referring is not None and self._referring.is_alive():
            refused("its server has not answered about the last one")
        else:  # it asks its server; if that does not answer, all ranks would wait
            self._referring = threading.Thread(target=add, daemon=True)
            self._referring.start()

    def close(self, exit_code: int = 0) -> None:
        """Close the files and the W&B run."""
        if not self.active:
            return
        try:
            self._lines.close()
        except OSError as error:
            log.warning("metrics.jsonl still cannot be written (%s): its last lines are lost", error)
        self._sinks.each(lambda sink: sink.close())
        if self._wandb_failed and exit_code == 0:
            self._start_again()
        if self._referring is not None:
            self._referring.join(REFER_S)
        offline = self._wandb is not None and self._wandb.settings._offline
        self._to_wandb(lambda: self._wandb.finish(exit_code=exit_code))
        if self._wandb is not None:
            self._has_all(self._last)
        if self._wandb_failed:  # its exit handler would print a traceback
            with suppress(Exception):
                import wandb

                wandb.teardown(exit_code)
        if offline:
            log.info(
                "W&B: kept offline; upload it with: wandb sync %s",
                shlex.quote(f"{self.run.path}/wandb") + "/offline-run-*",
            )
        self._wandb = None

    def _to_wandb(self, call: Callable[[], None]) -> None:
        """Call W&B; if it fails, training continues without it. (Slurm's signals reach every process of a step, so a
        job that is asked to stop loses W&B's own process before it has saved; the next start catches up.)"""
        if self._wandb is None:
            return
        try:
            call()
        except Exception as error:
            log.warning("W&B failed (%r): training continues, metrics.jsonl has everything", error)
            self._wandb, self._wandb_failed = None, True

    def _start_again(self) -> None:
        """Start W&B once more at the end of a run, if it has failed before."""
        with suppress(Exception):
            import wandb

            wandb.teardown()  # of the service that has failed
        self._wandb = self._start_wandb()
        if self._wandb is not None:
            self._catch_up(self._last)

    def _catch_up(self, step: int) -> None:
        """Log again, up to `step`, what W&B has not written to the end: its process keeps the last records in memory,
        and loses them if it is killed, or if one of Slurm's signals reaches it."""
        whole = read_json(self.run.path / WHOLE)
        if whole.get("id") != self._wandb_id:  # a new run, or one of an earlier version
            self._has_all(step)
            return
        first = whole["step"]
        if not self._wandb.settings._offline:  # its server may have refused what W&B wrote, or no longer have it
            first = min(first, self._wandb.step - 1)
        lines = [line for line in json_lines(self.run.metrics) if first < line["step"] <= step]

        def add() -> None:
            import wandb

            for line in lines:
                if line["step"] < self._wandb.step:  # the server has it
                    continue
                self._wandb.log({key: value for key, value in line.items() if value is not None}, step=line["step"])
                picture = self.run.sample_file(line["step"])
                if picture.exists():
                    with suppress(OSError):  # it cannot be read
                        self._wandb.log({"samples": wandb.Image(str(picture))}, step=line["step"])

        self._to_wandb(add)
        if lines:
            log.info(
                "W&B: %d records after step %d, which it may have lost, were logged again", len(lines), max(first, 0)
            )

    def _has_all(self, step: int) -> None:
        """Record that W&B's files, or its server, have everything up to `step`."""
        with suppress(OSError):  # disk full: records are logged twice
            path = self.run.path / WHOLE
            path.parent.mkdir(exist_ok=True)
            replace_file(path, json.dumps({"id": self._wandb_id, "step": step}))


def finite(value: Any) -> Any:
    """Return the value, or None for a float that is not finite, which JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_lines(path: Path, step: int) -> int:
    """Remove the lines of metrics.jsonl beyond `step`, and a half-written last one; return their number.

    These steps run again, so that every step appears once. The file is always replaced by a new one, since an earlier
    start that is still alive may write to the old one. A file of which no line would remain is renamed instead.
    """
    if not path.exists():
        return 0
    lines = read_text(path).splitlines()
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    if lines and not kept:
        aside = next(p for n in count(1) if not (p := path.with_name(f"{path.stem}-{n}.jsonl")).exists())
        path.rename(aside)
        log.info("metrics.jsonl of an earlier start is now %s", aside.name)
        return 0
    try:
        replace_file(path, "".join(line + "\n" for line in kept))
    except OSError:  # disk full
        if len(kept) < len(lines):
            raise
    return len(lines) - len(kept)


# ------------------------------------------------------------------------------------------------------- W&B


def _prepare_wandb(run: RunDir) -> None:
    """Put W&B's caches and settings in the run directory if there is no writable home directory (for example for a user
    without an entry in passwd), and leave it no variable that the settings have already taken, as it would refuse the
    run for one that another setting has replaced."""
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # reports on W&B's own work, of no use to a run
    for name in (*ENVIRONMENT, "WANDB_DISABLED"):
        os.environ.pop(name, None)
    for variable, reason in () if _in_sweep() else OWN.items():
        if os.environ.pop(variable, None):
            log.info("%s is not used: %s", variable, reason)
    home = os.path.expanduser("~")
    places = (os.environ.get(name) or os.path.join(home, below) for name, below in HOMES.items())
    if os.environ.get("HOME") and all(_could_write(Path(place)) for place in places):
        return
    folder = (run.path / "wandb" / "home").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder))
    if not _could_write(Path(home)):
        os.environ["HOME"] = str(folder)
    for name in HOMES:  # W&B's own process reads them, too
        if not _could_write(Path(os.environ.get(name, "/"))):
            os.environ.pop(name, None)


HOMES = {"XDG_CACHE_HOME": ".cache", "XDG_CONFIG_HOME": ".config", "XDG_DATA_HOME": ".local/share"}
"""Variables that name the directories of caches, settings and data, and where they are in a home directory."""


def _could_write(folder: Path) -> bool:
    """Return whether this user can write to a directory, or create it."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError:
        return False
    return folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


OWN = {
    "WANDB_RUN_ID": "a run keeps the id in its file wandb_id",
    "WANDB_RESUME": "a run that starts again continues its W&B run",
    "WANDB_DIR": "W&B's files are in the run's directory",
}
"""W&B's variables that would set what a run decides itself, and what it decides."""


def _in_sweep() -> bool:
    """Return whether a W&B agent has started this run, and chosen its id."""
    return "WANDB_SWEEP_ID" in os.environ


def _settings(kind: Any) -> Any:
    """Return W&B's settings of a training, without those that the installed version does not have."""
    limits: dict[str, Any] = {"finish_timeout": FINISH_S, "finish_timeout_raises": True}
    known = {name: value for name, value in limits.items() if name in kind.model_fields}
    return kind(console="off", silent=True, init_timeout=INIT_S, **known)


def start_wandb(run: RunDir, config: Experiment, wandb_id: str, code: dict[str, Any]) -> Any:
    """Start the W&B run, with the same id after a restart; None if it is disabled. If W&B cannot be reached, run
    offline and log a warning."""
    settings = config.wandb
    if settings.mode == "disabled":
        return None
    _prepare_wandb(run)
    import wandb

    sys.argv[1:] = without_tokens(sys.argv[1:])  # W&B sends them

    def begin(mode: str) -> Any:
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=settings.project,
            entity=settings.entity,
            tags=list(settings.tags),
            name=settings.name or f"{config.run.name}/{config.trained}",
            group=settings.group,
            notes=settings.notes,
            id=os.environ.get("WANDB_RUN_ID", wandb_id) if _in_sweep() else wandb_id,
            resume="allow" if mode == "online" else None,
            dir=str(run.path),
            config=without_tokens({**to_dict(config), "code": code}),
            settings=_settings(wandb.Settings),
        )

    began = time.monotonic()
    try:
        return begin(settings.mode)
    except Exception as error:  # whatever W&B raises must not end a training run
        if settings.mode == "offline":
            log.warning("W&B is switched off: %s; metrics.jsonl has everything", error)
            return None
        said = " ".join(str(error).split())
        log.warning(
            "W&B could not be reached in %.0f s (%s): its files are written offline, and nothing is lost; "
            "upload them later with: wandb sync %s/offline-run-*%s",
            time.monotonic() - began,
            said,
            shlex.quote(f"{run.path}/wandb"),
            f"; for a new W&B run, write another id into {run.path}/wandb_id" if "deleted" in said else "",
        )
        try:
            wandb.teardown()  # its service still holds the run's id
            return begin("offline")
        except Exception as second:
            log.warning("W&B is switched off: %s; metrics.jsonl has everything", second)
            return None


_WEB = re.compile(r"(https?://)([^/@\s]*@)?([^\s?'\",\]}]*)(\?[^\s'\",\]}]*)?")


def without_tokens(settings: Any) -> Any:
    """Return the settings without what may be secret in web addresses: a name and password, and what follows a `?`."""
    if isinstance(settings, dict):
        return {name: without_tokens(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [without_tokens(value) for value in settings]
    if not isinstance(settings, str):
        return settings
    return _WEB.sub(lambda found: f"{found[1]}{found[3]}{'?...' if found[4] else ''}", settings)


CHECKPOINT_STEP = "checkpoint/step"
"""Axis of figures that are measured later: W&B's own step can only increase, and training may be far ahead."""


def log_checkpoints(run: RunDir, meta: Mapping[str, Any], results: Mapping[int, Mapping[str, Any]]) -> bool:
    """Log figures of checkpoints, measured outside the training, to the run's own W&B run.

    Args:
        meta: metadata of a checkpoint of the run, with its W&B settings and id.
        results: for each step, the content of its result.json; each figure becomes `checkpoint/METRIC/FEATURES`, with
            the ends of its interval as `.../low` and `.../high`.

    Returns:
        Whether they were logged; W&B may be disabled, or fail.
    """

    def add(opened: Any) -> None:
        opened.define_metric(CHECKPOINT_STEP)
        opened.define_metric("checkpoint/*", step_metric=CHECKPOINT_STEP)
        for step, result in results.items():
            record: dict[str, Any] = {CHECKPOINT_STEP: step}
            for name, entry in flattened(result):
                key, (low, high) = f"checkpoint/{name.replace('.', '/')}", entry["interval"]
                record |= {key: entry["value"], f"{key}/low": low, f"{key}/high": high}
            opened.log({key: value for key, value in record.items() if finite(value) is not None})

    return _log_later(run, meta, add)


def log_picture(run: RunDir, meta: Mapping[str, Any], name: str, path: Path) -> bool:
    """Log a picture file to the run's own W&B run, during or after the training; return whether it was logged."""

    def add(opened: Any) -> None:
        import wandb

        opened.log({name: wandb.Image(str(path))})

    return _log_later(run, meta, add)


def _log_later(run: RunDir, meta: Mapping[str, Any], add: Callable[[Any], None]) -> bool:
    settings = WandbConfig(**meta["config"]["wandb"])
    if settings.mode == "disabled":
        return False
    _prepare_wandb(run)
    try:
        import wandb

        with wandb.init(
            mode=settings.mode,  # type: ignore[arg-type]
            project=settings.project,
            entity=settings.entity,
            id=run.wandb_id(meta.get("wandb_id")),
            name=settings.name or f"{meta['config']['run']['name']}/{meta['config']['stage']['name']}",
            resume="allow" if settings.mode == "online" else None,
            dir=str(run.path),
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=INIT_S, x_update_finish_state=False
            ),  # the training decides when the run is finished
        ) as opened:
            add(opened)
    except Exception as error:  # whatever W&B raises, no figure is lost: they are in files
        log.warning("W&B did not accept the figures (%s); they are in the run directory", error)
        return False
    return True
