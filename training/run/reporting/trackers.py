"""Trackers besides metrics.jsonl and W&B: TensorBoard files, and a CSV table for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.common.errors import ConfigError
from training.config.experiment import TrackersConfig
from training.run.directory import replace_file

log = logging.getLogger("cascade")


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

    Raises:
        ConfigError: the package is not installed.
    """

    name = "TensorBoard"

    def __init__(self, run: Path, step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            raise ConfigError("trackers.tensorboard=true: it needs `pip install cascade-t2i[tensorboard]`") from error
        self._writer = SummaryWriter(
            str(run / "tensorboard"), purge_step=step + 1 if step else None, filename_suffix=f".from-{step}"
        )

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Log numbers as scalars."""
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, path: Path) -> None:
        """Log the sample grid."""
        import numpy as np
        from PIL import Image

        self._writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def checkpoint(self, step: int, place: object) -> None:
        """Flush what has been logged so far to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


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
            self._sinks.append(TensorBoard(run, step))
        if settings.csv:
            self._sinks.append(Table(metrics))

    def each(self, call: Callable[[Sink], None]) -> None:
        """Call every tracker; one that fails is dropped with a warning."""
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                log.warning(
                    "%s failed (%r): training continues without it, metrics.jsonl has everything", sink.name, error
                )
                self._sinks.remove(sink)
