"""Ownership of a run's checkpoints: every start of the run takes the next attempt number, and the highest number owns
the checkpoints.

    checkpoints/attempt-0002.json     created by one start and never rewritten: number, token, host, process, time

Only one process can create a name: by a hard link on disk, by `If-None-Match` in an object store. In a store that
ignores the condition, two starts may take the same number; the token tells them apart, and the one whose record was
overwritten stops at its next check. Nothing here depends on clocks.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid

from data_pipeline.storage.folder import Folder
from training.processes.endings import Superseded

NAME = re.compile(r"attempt-(\d{4,})\.json")
OLD = "attempt.json"
"""The single record of earlier versions of this project; if present, it is kept up to date for a start by such a
version that may still be running."""
TRIES = 3


def record_name(number: int) -> str:
    """Return the name of the file whose creation claims attempt `number`."""
    return f"attempt-{number:04d}.json"


class Attempts:
    """The attempt records in a folder, with this start's own `number` and `token` (0 and "" before `claim`)."""

    def __init__(self, folder: Folder, number: int = 0, token: str = "") -> None:
        self.folder, self.number, self.token = folder, number, token

    def claim(self) -> tuple[int, str]:
        """Take the next number, so that `check` fails for all earlier starts; return number and token."""
        names = self.folder.names()
        numbers = [int(match[1]) for match in map(NAME.fullmatch, names) if match]
        number = max([*numbers, self._record(OLD)[0] if OLD in names else 0]) + 1
        self.token = self.token or uuid.uuid4().hex
        while not self._take(number):
            number += 1
        self.number = number
        if OLD in names:
            self.folder.write(OLD, [self._own(number)])
        return self.number, self.token

    def _own(self, number: int) -> bytes:
        own = {"attempt": number, "token": self.token, "host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps({**own, "time": time.time()}).encode()

    def _take(self, number: int) -> bool:
        """Try to create the record of this number; return whether it is ours, even if the response to our request was
        lost."""
        for _ in range(TRIES):
            self.folder.create(record_name(number), self._own(number))
            token = self._record(record_name(number))[1]
            if token:
                return token == self.token
        return False

    def _record(self, name: str) -> tuple[int, str, str]:
        """Return number, token and host of a record; 0 and empty strings if it is missing or damaged."""
        try:
            record = json.loads(self.folder.read(name))
            return int(record["attempt"]), str(record["token"]), str(record["host"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return 0, "", ""

    def check(self) -> None:
        """Raise `Superseded` if a later start has claimed the checkpoints. If our own record has vanished (the folder
        was deleted, or another disk mounted in its place) and nobody has, write it again."""
        newest = max((int(match[1]) for match in map(NAME.fullmatch, self.folder.names()) if match), default=0)
        if newest < self.number and self._take(self.number):
            return
        newest = max(newest, self.number)
        _, token, host = self._record(record_name(newest)) if newest else (0, "", "")
        if newest == self.number and token in ("", self.token):
            return
        raise Superseded(
            f"{self.folder}: attempt {newest} of this run on {host or 'another host'} has taken over; attempt "
            f"{self.number} on {socket.gethostname()} stops without touching its checkpoints"
        )
