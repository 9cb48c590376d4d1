"""`cascade status html=FILE`: one self-contained page about runs, without a server or network access."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from slurm.pages.curves import LEVELS, LINES, by_level, curves_of, drawn

GRIDS = 4
"""Most sample grids per run: the newest, and others spread over its steps."""
WIDEST = 900
"""Largest width of an embedded grid, pixels."""


def status_html(folder: str, rows: Sequence[Mapping[str, Any]], jobs: Sequence[Mapping[str, Any]]) -> str:
    """Return the page about the runs in a directory; all text is escaped.

    Args:
        folder: the directory, for the title.
        rows: the runs as returned by `cascade status`.
        jobs: the jobs that are not trainings: `name`, `state` and a `note` about it.
    """
    import jinja2

    template = resources.files("slurm").joinpath("templates/status.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        folder=folder,
        made=time.strftime("%Y-%m-%d %H:%M:%S"),
        runs=[{**row, "charts": _charts(Path(row["run"])), "grids": _grids(Path(row["run"]))} for row in rows],
        jobs=jobs,
        colours=LINES,
    )


def _charts(run: Path) -> list[dict[str, Any]]:
    curves = curves_of(run)
    prefix, levels = by_level(curves)
    what = "Held-out loss" if prefix == LEVELS[0] else "Training loss"
    wanted = [
        ("Training loss", {"loss": curves.get("loss", [])}),
        ("Validation loss", {name: curves.get(name, []) for name in ("validation_loss", "validation_loss_ema")}),
        (f"{what} by noise level", {f"t {level}": points for level, points in levels.items()}),
        ("Images per second", {"images_per_second": curves.get("images_per_second", [])}),
    ]
    return [{"title": title, **drawn(found)} for title, found in wanted if any(found.values())]


def _grids(run: Path) -> list[dict[str, Any]]:
    """Return the sample grids to show, newest first."""
    paths = sorted(run.glob("samples/step-*.png"))
    count = min(GRIDS, len(paths))
    places = sorted({round(i * (len(paths) - 1) / max(1, count - 1)) for i in range(count)})
    grids = []
    for place in reversed(places):
        source = _embedded(paths[place])
        if source:
            grids.append({"step": int(paths[place].stem.partition("-")[2]), "source": source})
    return grids


def _embedded(path: Path) -> str | None:
    """Return a picture as the source of an <img>, at most WIDEST wide; None if it is still being written."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError):
        return None
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
