"""The graph of jobs for other schedulers, as files to read and to submit with their own tools.

`cluster.kind=NAME` selects the module NAME (listed in `EMITTED` of training/config/cluster.py). Each implements
`Emitter`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from slurm.jobs.job import Job
    from training.config.commands import LaunchCommand


class Emitter(Protocol):
    """The interface of the modules in this folder."""

    ENDING: str
    """Extension of the file for one job."""
    WHOLE: tuple[str, str]
    """Name and extension of the file for the whole launch."""

    def check_launch(self, config: LaunchCommand) -> None:
        """Raise `ConfigError` for a launch that the scheduler cannot run."""

    def manifest(self, job: Job) -> str:
        """Return the file for one job. Raises `ConfigError` for settings that the scheduler does not support."""

    def whole(self, name: str, jobs: Sequence[Job], path: Path) -> str:
        """Return the file for the whole launch, which will be written to `path`; `name` is that of the experiment."""

    def how(self, jobs: Sequence[Job], path: Path) -> str:
        """Return the command that submits the launch."""


def emitter(kind: str) -> Emitter:
    """Return the module for `cluster.kind`, one of `EMITTED`."""
    return cast(Emitter, importlib.import_module(f"slurm.emitters.{kind}"))
