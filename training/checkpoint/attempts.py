"""Which start of a run may write its checkpoints: every start takes the next attempt number, and the highest one owns
them.

    checkpoints/attempt-0002.json     made by one start and never written again: number, token, host, process, time

A name is taken by one process only: by a hard link on disk, by `If-None-Match` in an object store. In a store that
ignores the condition two starts may take one number; the token tells them apart, and the earlier one stops at its next
look. Nothing here rests on clocks.
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
"""The one record of earlier versions; where there is one it is kept up to date, for a start of theirs that still
lives."""
TRIES = 3


def record_name(number: int) -> str:
    """The file whose creation claims attempt `number`."""
    return f"attempt-{number:04d}.json"


class Attempts:
    """The records in a folder, and this start's own `number` and `token` (0 and "" before `claim`)."""

    def __init__(self, folder: Folder, number: int = 0, token: str = "") -> None:
        self.folder, self.number, self.token = folder, number, token

    def claim(self) -> tuple[int, str]:
        """Takes the next number: from now on `check` fails for all earlier starts. Returns number and token."""
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
        """Whether the record of this number is ours now; also where the answer to our own request was lost."""
        for _ in range(TRIES):
            self.folder.create(record_name(number), self._own(number))
            token = self._record(record_name(number))[1]
            if token:
                return token == self.token
        return False

    def _record(self, name: str) -> tuple[int, str, str]:
        """Number, token and host; 0 and empty where it is missing or damaged."""
        try:
            record = json.loads(self.folder.read(name))
            return int(record["attempt"]), str(record["token"]), str(record["host"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return 0, "", ""

    def check(self) -> None:
        """Raises `Superseded` when a later start has claimed the checkpoints. Where our own record is gone (a folder
        that was deleted, another disk in its place) nobody has: it is written again."""
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
