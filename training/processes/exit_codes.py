"""The exit codes of a run: one table for its processes, their launcher and job scripts. Only the standard library."""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline.common.errors import EXIT_USER_ERROR

EXIT_DONE, EXIT_CRASH, EXIT_PREEMPTED, EXIT_NOT_FINITE, EXIT_SUPERSEDED, EXIT_HUNG = 0, 1, 75, 76, 77, 78
EXIT_SLOW_NODE = 79
EXIT_INTERRUPTED = 130


class Exit(NamedTuple):
    """What an exit code means."""

    meaning: str
    agreed: bool = False
    """All ranks decided it together, so each ends by itself."""
    restart: bool = False
    """The same command continues the run; a job script may start it again by itself."""
    final: bool = False
    """The same command would end like this again: a job script does not repeat it."""


EXIT_CODES = {
    EXIT_DONE: Exit("all steps are done"),
    EXIT_CRASH: Exit("a crash, an unreachable store, or a last checkpoint that was not written"),
    EXIT_USER_ERROR: Exit("a mistake in the configuration, the data or the credentials", final=True),
    EXIT_PREEMPTED: Exit("saved after SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP", agreed=True, restart=True),
    EXIT_NOT_FINITE: Exit("too many skipped steps, even after rolling back", agreed=True, final=True),
    EXIT_SUPERSEDED: Exit("a newer start of the run owns its checkpoints", agreed=True, final=True),
    EXIT_HUNG: Exit("a rank died, or made no progress within the time-outs", restart=True),
    EXIT_SLOW_NODE: Exit("the preflight found a slow node to exclude"),
    EXIT_INTERRUPTED: Exit("saved after SIGINT (Ctrl-C)", agreed=True, final=True),
}
"""All exit codes of a training run, but for 128 + n: killed by signal n."""
STOP_CODES = tuple(code for code, end in EXIT_CODES.items() if end.agreed)
FINAL_CODES = tuple(code for code, end in EXIT_CODES.items() if end.final)
