"""The same graph of jobs for other schedulers: files for their own tools, to read and to submit.

`cluster.kind=NAME` selects the module NAME (training/config/cluster.py lists them in `EMITTED`). Each has what
`Emitter` states.
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
    """A module of this folder."""

    ENDING: str
    """Extension of the file of one job."""
    WHOLE: tuple[str, str]
    """Name and extension of the file of the whole launch."""

    def check_launch(self, config: LaunchCommand) -> None:
        """Raises ConfigError for a launch that the scheduler cannot run."""

    def manifest(self, job: Job) -> str:
        """The file of one job. Raises ConfigError for settings that the scheduler does not have."""

    def whole(self, name: str, jobs: Sequence[Job], path: Path) -> str:
        """The file of the whole launch, to be written to `path`; `name` is the experiment's."""

    def how(self, jobs: Sequence[Job], path: Path) -> str:
        """The command that submits it."""


def emitter(kind: str) -> Emitter:
    """The module for `cluster.kind`, one of `EMITTED`."""
    return cast(Emitter, importlib.import_module(f"slurm.emitters.{kind}"))
