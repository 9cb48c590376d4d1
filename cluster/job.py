"""One command that is to run somewhere: what it is, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.config.commands import COMMANDS
from training.config.experiment import Experiment

ON_GPU = ("train", "embed", "sample", "evaluate")
"""Commands that use a GPU."""
ONE_PER_GPU = ("train", "embed")
"""Those that use all GPUs of a node; the others one."""
SHARED_BY_ARRAY = ("embed",)
"""Commands of which the tasks of an array share the work among themselves."""


@dataclass
class Job:
    """A node of the graph.

    Attributes:
        words: the `key=value` words of its command line.
        config: what they compose to.
        script: what the scheduler gets; settings: the frozen configuration beside it.
        after: names of the jobs that must have succeeded before this one starts.
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
    after: list[str] = field(default_factory=list)
    job_id: int | None = None

    @property
    def is_distributed(self) -> bool:
        return COMMANDS[self.verb].distributed

    @property
    def processes(self) -> int:
        """Processes per node."""
        return max(1, self.config.cluster.processes) if self.is_distributed else 1

    @property
    def gpus(self) -> int:
        """GPUs per node."""
        if not self.config.cluster.gpus or self.verb not in ON_GPU:
            return 0
        return self.config.cluster.processes if self.verb in ONE_PER_GPU else 1

    @property
    def cpus(self) -> int:
        """CPU cores per process; 0: the scheduler's default. A command with a GPU of its own feeds it with the cores of
        a whole node; one without needs no more than a process of the training."""
        cluster = self.config.cluster
        alone_on_gpu = self.verb in ON_GPU and not self.is_distributed
        return cluster.cpus_per_task * (max(1, cluster.processes) if alone_on_gpu else 1)

    @property
    def run_dir(self) -> Path:
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
            "script": str(self.script),
            "config": str(self.settings),
            "log": log,
            "job_id": self.job_id,
        }
