"""Where metrics go besides metrics.jsonl and W&B: TensorBoard's files and a table for spreadsheets, side by side."""

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
    """What takes metrics. A method that fails costs that tracker, never the training."""

    name: str

    def log(self, step: int, record: dict[str, Any]) -> None:
        """The values of one record; null where a number is not finite."""

    def image(self, step: int, path: Path) -> None:
        """A picture file."""

    def checkpoint(self, step: int, place: object) -> None:
        """A checkpoint is committed."""

    def close(self) -> None:
        """Nothing more comes."""


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
        """Numbers as scalars."""
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, path: Path) -> None:
        """The sample grid."""
        import numpy as np
        from PIL import Image

        self._writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def checkpoint(self, step: int, place: object) -> None:
        """What is logged so far reaches the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self._writer.close()


class Table:
    """RUN_DIR/metrics.csv: metrics.jsonl as a table with a column per name, made anew at each checkpoint and at the
    end."""

    name = "metrics.csv"

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics

    def log(self, step: int, record: dict[str, Any]) -> None:
        """metrics.jsonl has it already."""

    def image(self, step: int, path: Path) -> None:
        """A table has no pictures."""

    def checkpoint(self, step: int, place: object) -> None:
        """The table as of now."""
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
        """The whole table."""
        self.checkpoint(0, None)


class Sinks:
    """All that are switched on."""

    def __init__(self, settings: TrackersConfig, run: Path, metrics: Path, step: int) -> None:
        self._sinks: list[Sink] = []
        if settings.tensorboard:
            self._sinks.append(TensorBoard(run, step))
        if settings.csv:
            self._sinks.append(Table(metrics))

    def each(self, call: Callable[[Sink], None]) -> None:
        """Lets every one take it; one that fails is dropped, and said."""
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                log.warning(
                    "%s failed (%r): training continues without it, metrics.jsonl has everything", sink.name, error
                )
                self._sinks.remove(sink)
