"""One command that is to run somewhere: what it is, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm.jobs.graph import SUCCEEDED
from training.config.commands import COMMANDS
from training.config.experiment import Experiment

ON_GPU = ("train", "distill", "embed", "caption", "sample", "evaluate")
"""Commands that use GPUs: one per process."""
WHOLE_NODE = ("embed", "caption", "verify", "prepare")
"""Commands of one task that share their work among as many processes as a node has."""
SHARED_BY_ARRAY = ("embed", "caption")
"""Commands of which the tasks of an array share the work among themselves."""


@dataclass
class Job:
    """A node of the graph.

    Attributes:
        words: the `key=value` words of its command line.
        config: what they compose to.
        script: what the scheduler gets; settings: the frozen configuration beside it.
        after: names of the jobs that must have succeeded (or, with `when`, begun) before this one starts.
        home: directory of its script, log and records.
        code: the frozen code that it imports.
        title, frozen: its command line, and the text of `settings`.
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
        """Whether every task of the job takes part in one program."""
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
        """Processes that work on a node, started by the scheduler or by the command itself."""
        return max(1, self.config.cluster.processes) if self.is_distributed or self.verb in WHOLE_NODE else 1

    @property
    def run_dir(self) -> Path:
        """Where the command writes."""
        return Path(self.config.run.dir).absolute()

    @property
    def arguments(self) -> list[str]:
        """The command line after the interpreter."""
        command = ["-P", "-m", "training.cli", self.verb]
        return [*command, "--config-dir", str(self.settings.parent), "--config-name", self.settings.stem]

    def answer(self, log: str) -> dict[str, Any]:
        """For json=true."""
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
