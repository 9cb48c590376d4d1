"""The exit codes of a run: one table for its processes, their launcher and job scripts. Only the standard library."""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline.common.errors import EXIT_USER_ERROR

EXIT_DONE, EXIT_CRASH, EXIT_PREEMPTED, EXIT_NOT_FINITE, EXIT_SUPERSEDED, EXIT_HUNG = 0, 1, 75, 76, 77, 78
EXIT_SLOW_NODE, EXIT_DEVICE_LOST = 79, 80
EXIT_INTERRUPTED = 130


class Exit(NamedTuple):
    """The meaning of an exit code."""

    meaning: str
    agreed: bool = False
    """All ranks decided to stop together, so each exits by itself."""
    restart: bool = False
    """Repeating the command resumes the run; a job script may do so automatically."""
    final: bool = False
    """Repeating the command would fail in the same way, so a job script does not."""


EXIT_CODES = {
    EXIT_DONE: Exit("all steps are done"),
    EXIT_CRASH: Exit("a crash, an unreachable store, or a last checkpoint that was not written"),
    EXIT_USER_ERROR: Exit("a mistake in the configuration, the data or the credentials", final=True),
    EXIT_PREEMPTED: Exit("saved after SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP", agreed=True, restart=True),
    EXIT_NOT_FINITE: Exit("too many skipped steps, even after rolling back", agreed=True, final=True),
    EXIT_SUPERSEDED: Exit("a newer start of the run owns its checkpoints", agreed=True, final=True),
    EXIT_HUNG: Exit("a rank died, or made no progress within the time-outs", restart=True),
    EXIT_SLOW_NODE: Exit("the preflight found a slow node to exclude"),
    EXIT_DEVICE_LOST: Exit("a GPU has failed, or is not there", restart=True),
    EXIT_INTERRUPTED: Exit("saved after SIGINT (Ctrl-C)", agreed=True, final=True),
}
"""All exit codes of a training run, except 128 + n: killed by signal n."""
STOP_CODES = tuple(code for code, end in EXIT_CODES.items() if end.agreed)
FINAL_CODES = tuple(code for code, end in EXIT_CODES.items() if end.final)
