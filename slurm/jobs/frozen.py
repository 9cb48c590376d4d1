"""Copies the code that a job imports next to its settings: a job that waits in the queue, or is requeued a month later,
runs what was submitted, whatever has happened to the checkout since."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

from data_pipeline.common.errors import UserError
from training.checkpoint.provenance import FROZEN, code_version

TOP = __name__.partition(".")[0]
PACKAGES = ("training", "data_pipeline", "slurm", "conf") if TOP == "slurm" else (TOP,)
"""An installed wheel has everything in one package (setup.py)."""
MOST_BYTES = 200 << 20
"""Largest code to copy; the packages take a hundredth of this."""
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
DIFF = "changes.diff"
"""Name of the file with the uncommitted changes of the working tree."""


def freeze(folder: Path) -> Path:
    """Copy the packages to `folder`/HASH (once per content); return that directory, which belongs on PYTHONPATH.

    Untracked files are copied, too. Next to the packages are the commit (`frozen.json`) and the uncommitted changes
    (`changes.diff`).

    Raises:
        UserError: the code contains large files, or cannot be copied: the disk is full, or a file cannot be read.
    """
    sources = {name: _place(name) for name in PACKAGES}
    files = {name: _files(source) for name, source in sources.items()}
    _check_size([path for paths in files.values() for path in paths])
    target = folder / _digest(sources, files)
    if target.exists():
        return target
    scratch = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for name, source in sources.items():
            shutil.copytree(source, scratch / name, ignore=LEFT_OUT, ignore_dangling_symlinks=True)
    except shutil.Error as error:
        shutil.rmtree(scratch, ignore_errors=True)
        failed, _, why = error.args[0][0]
        raise UserError(f"{folder}: the code of the job could not be copied there: {failed}: {why}") from error
    version = code_version()
    (scratch / FROZEN).write_text(json.dumps({key: version[key] for key in ("commit", "dirty")}))
    if version["dirty"]:
        root = sources[PACKAGES[0]].parent
        done = subprocess.run(["git", "-C", str(root), "diff", "--binary", "HEAD"], capture_output=True)
        (scratch / DIFF).write_bytes(done.stdout)
    try:
        scratch.rename(target)
    except OSError:  # another launch was faster
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _files(source: Path) -> list[Path]:
    """Return the files of a package that are copied, sorted."""
    paths = sorted(source.rglob("*"))
    return [
        path
        for path in paths
        if path.is_file()
        and not any(part == "__pycache__" or part[0] == "." for part in path.relative_to(source).parts)
    ]


def _check_size(files: list[Path]) -> None:
    sizes = {path: path.stat().st_size for path in files}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"{largest}: {sizes[largest] / 1e6:.0f} MB among the code, of which every launch keeps a copy "
            f"({sum(sizes.values()) / 1e6:.0f} MB in total); keep data and weights elsewhere"
        )


def _place(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _digest(sources: dict[str, Path], files: dict[str, list[Path]]) -> str:
    digest = hashlib.sha256()
    for name, source in sources.items():
        for path in files[name]:
            digest.update(f"{name}/{path.relative_to(source)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
