"""The work of an evaluation in parts that are done once: preempted jobs continue, and any number of ranks share them.

A part holds the features of some samples and of as many reference pictures. It lies in a file whose directory is named
by a fingerprint of everything that the pictures depend on, so parts of another evaluation are never mixed in. Which
rank made a part changes nothing: noise belongs to (seed, prompt, number), and batches never cross parts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.storage.atomic import replacing

FOLDER = "parts"


class Parts:
    """The files of one evaluation in OUTPUT/parts/FINGERPRINT."""

    def __init__(self, output: Path, protocol: Mapping[str, Any], count: int) -> None:
        self.root = output / FOLDER
        self.folder = self.root / settings_sha256(protocol)
        self.count = count
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, number: int) -> Path:
        """Of one part."""
        return self.folder / f"{number:05d}.npz"

    def done(self, number: int) -> bool:
        """Whether a part is there, whole."""
        return self.file(number).exists()

    def all_done(self) -> bool:
        """Whether nothing is left to do."""
        return all(self.done(number) for number in range(self.count))

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Appears whole or not at all."""
        with replacing(self.file(number), durable=False) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def read(self) -> dict[str, np.ndarray]:
        """All parts' arrays, each put together in order.

        Raises:
            DataError: a damaged file.
        """
        found: dict[str, list[np.ndarray]] = {}
        for number in range(self.count):
            try:
                with np.load(self.file(number)) as stored:
                    for name in stored.files:
                        found.setdefault(name, []).append(stored[name])
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise DataError(f"{self.file(number)}: damaged ({error}); delete it and run the same again") from error
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    def forget_others(self) -> None:
        """Removes the parts of earlier evaluations in the same directory."""
        for folder in self.root.iterdir():
            if folder != self.folder:
                shutil.rmtree(folder, ignore_errors=True)


def settings_sha256(facts: Any) -> str:
    """16 hexadecimal digits of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
