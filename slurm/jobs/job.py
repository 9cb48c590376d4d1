"""One command to run somewhere: what it is, and where its files are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm.jobs.graph import SUCCEEDED
from training.config.commands import COMMANDS
from training.config.experiment import Experiment

ON_GPU = ("train", "distill", "embed", "caption", "sample", "evaluate")
"""Commands that use GPUs, one per process."""
WHOLE_NODE = ("embed", "caption", "verify", "prepare")
"""Commands of one task that divide their work among `cluster.processes` processes themselves."""
SHARED_BY_ARRAY = ("embed", "caption")
"""Commands whose work can be divided among the tasks of an array."""


@dataclass
class Job:
    """A node of the graph, with its settings.

    Attributes:
        name, verb: its unique name, and the command.
        words: the `key=value` overrides of its command line.
        config: the settings composed from them.
        script: the script for the scheduler.
        settings: the frozen configuration next to it.
        code: directory of the frozen code that it imports.
        title: its command line.
        frozen: the text of `settings`.
        home: directory of its script, log and records.
        after: names of the jobs that must have succeeded (or, depending on `when`, begun) before this one starts.
        job_id: its number, once submitted.
    """

    name: str
    verb: str
    words: list[str]
    config: Experiment
    script: Path
    settings: Path
    code: Path
    title: str
    frozen: str
    home: Path
    after: list[str] = field(default_factory=list)
    when: str = SUCCEEDED
    job_id: int | None = None

    @property
    def is_distributed(self) -> bool:
        """Whether the tasks of the job are the ranks of one program."""
        return COMMANDS[self.verb].distributed

    @property
    def processes(self) -> int:
        """Processes per node."""
        return max(1, self.config.cluster.processes) if self.is_distributed else 1

    @property
    def gpus(self) -> int:
        """GPUs per node."""
        return self._width if self.config.cluster.gpus and self.verb in ON_GPU else 0

    @property
    def cpus(self) -> int:
        """CPU cores per task; 0: the scheduler's default."""
        return self.config.cluster.cpus_per_task * (1 if self.is_distributed else self._width)

    @property
    def _width(self) -> int:
        """Processes per node, whether started by the scheduler or by the command itself."""
        return max(1, self.config.cluster.processes) if self.is_distributed or self.verb in WHOLE_NODE else 1

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir).absolute()

    @property
    def arguments(self) -> list[str]:
        """Arguments of the Python interpreter."""
        command = ["-P", "-m", "training.cli", self.verb]
        return [*command, "--config-dir", str(self.settings.parent), "--config-name", self.settings.stem]

    def answer(self, log: str) -> dict[str, Any]:
        """Return the job as shown by json=true; `log` is its log file."""
        return {
            "name": self.name,
            "verb": self.verb,
            "after": self.after,
            "when": self.when,
            "script": str(self.script),
            "config": str(self.settings),
            "log": log,
            "job_id": self.job_id,
        }
