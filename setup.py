"""Wheels: everything lies inside `cascade_t2i`, so that no other package of the name `training`, `slurm` or `conf` is
overwritten or shadowed. A checkout (`pip install -e .`) keeps the packages beside each other.

In a wheel `training.cascade` is therefore `cascade_t2i.training.cascade`; `from cascade_t2i import Cascade` is the
same in both.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

INSIDE = ("training", "data_pipeline", "slurm", "conf")
NAMES = "|".join(INSIDE)
FROM = re.compile(rf"^([ \t]*)from ({NAMES})(?=[. ])", re.MULTILINE)
IMPORT_MODULE = re.compile(rf"^([ \t]*)import ({NAMES})(\.[\w.]+)$", re.MULTILINE)
IMPORT = re.compile(rf"^([ \t]*)import ({NAMES})$", re.MULTILINE)
NAMED = re.compile(rf"(?<=[\"'])({NAMES})(?=(\.[a-z_]\w*)+\.?[\"'{{])")
"""Modules that are named in a string, because another process runs them or they are imported late."""


def moved(source: str) -> str:
    """Return a module's source with the names that its packages have inside `cascade_t2i`."""
    source = FROM.sub(r"\1from cascade_t2i.\2", source)
    source = IMPORT_MODULE.sub(r"\1import cascade_t2i.\2\3\n\1from cascade_t2i import \2", source)
    source = IMPORT.sub(r"\1from cascade_t2i import \2", source)
    return NAMED.sub(r"cascade_t2i.\1", source)


class Inside(build_py):
    """Copies the packages, then moves them into `cascade_t2i`."""

    def run(self) -> None:
        """For wheels; an editable install takes the sources where they are."""
        super().run()
        if self.editable_mode:
            return
        whole = Path(self.build_lib, "cascade_t2i")
        for name in INSIDE:
            shutil.rmtree(whole / name, ignore_errors=True)
            shutil.move(Path(self.build_lib, name), whole / name)
        (whole / "docs").mkdir(exist_ok=True)  # `cascade status` looks errors up there
        shutil.copy(Path(__file__).with_name("docs") / "training.md", whole / "docs")
        for path in whole.rglob("*.py"):
            path.write_text(moved(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    setup(cmdclass={"build_py": Inside})
