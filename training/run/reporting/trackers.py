"""Trackers besides metrics.jsonl and W&B: TensorBoard files, and a CSV table for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.common.errors import ConfigError
from training.config.experiment import TrackersConfig
from training.run.directory import replace_file

log = logging.getLogger("cascade")

FLUSH_S = 30.0
"""Seconds between writes of TensorBoard's files to disk."""
_DROPPED = "%s failed (%r): training continues without it, metrics.jsonl has everything"


class Sink(Protocol):
    """Receives metrics. If a method raises, this tracker is dropped, and training continues."""

    name: str

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Log one record; values that are not finite are None."""

    def image(self, step: int, path: Path) -> None:
        """Log a picture file."""

    def checkpoint(self, step: int, place: object) -> None:
        """Handle a committed checkpoint."""

    def close(self) -> None:
        """Finish; nothing follows."""


class TensorBoard:
    """Event files in RUN_DIR/tensorboard: `tensorboard --logdir RUN_DIR/tensorboard`. A restart purges the steps that
    run again.

    Not tensorboardX's `SummaryWriter`: a full disk ends its thread, and the training then waits for it forever.

    Raises:
        ConfigError: the package is not installed.
        OSError: the directory cannot be written.
    """

    name = "TensorBoard"

    def __init__(self, run: Path, step: int) -> None:
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import SessionLog
        except ModuleNotFoundError as error:
            raise ConfigError("trackers.tensorboard=true: it needs `pip install cascade-t2i[tensorboard]`") from error
        folder = run / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), f".from-{step}")
        self._flushed = time.monotonic()
        if step:
            self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Log numbers as scalars."""
        from tensorboardX.summary import scalar

        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self._write(step, summary=scalar(name, value))
        if time.monotonic() - self._flushed >= FLUSH_S:
            self._events.flush()
            self._flushed = time.monotonic()

    def image(self, step: int, path: Path) -> None:
        """Log the sample grid."""
        import numpy as np
        from PIL import Image
        from tensorboardX.summary import image

        self._write(step, summary=image("samples", np.asarray(Image.open(path).convert("RGB")), dataformats="HWC"))

    def checkpoint(self, step: int, place: object) -> None:
        """Flush what has been logged so far to disk."""
        self._events.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self._events.close()


class Table:
    """RUN_DIR/metrics.csv: metrics.jsonl as a table with a column per name, rewritten at each checkpoint and at the
    end."""

    name = "metrics.csv"

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Do nothing; metrics.jsonl already has the record."""

    def image(self, step: int, path: Path) -> None:
        """Do nothing; a table has no pictures."""

    def checkpoint(self, step: int, place: object) -> None:
        """Rewrite the table."""
        records = []
        for line in self._metrics.read_text().splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
        columns = list(dict.fromkeys(name for record in records for name in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        replace_file(self._metrics.with_suffix(".csv"), text.getvalue())

    def close(self) -> None:
        """Write the complete table."""
        self.checkpoint(0, None)


class Sinks:
    """All enabled trackers."""

    def __init__(self, settings: TrackersConfig, run: Path, metrics: Path, step: int) -> None:
        self._sinks: list[Sink] = []
        if settings.tensorboard:
            try:
                self._sinks.append(TensorBoard(run, step))
            except OSError as error:
                log.warning(_DROPPED, TensorBoard.name, error)
        if settings.csv:
            self._sinks.append(Table(metrics))

    def each(self, call: Callable[[Sink], None]) -> None:
        """Call every tracker; one that fails is dropped with a warning."""
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                log.warning(_DROPPED, sink.name, error)
                self._sinks.remove(sink)
