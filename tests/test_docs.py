"""Generated pages, and notebooks that run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.photos import jpegs
from tests.training.tiny import tiny_cascade

DOCS = Path(__file__).parents[1] / "docs"


def test_the_api_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("api", DOCS / "api.py")
    assert spec is not None and spec.loader is not None
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert api.PAGE.read_text() == api.page(), "run: python docs/api.py"


@pytest.mark.parametrize("name", ["sampling", "data"])
def test_a_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Cell by cell; the last line of a cell is what a notebook shows, so it must be an expression or a call."""
    tiny_cascade().save(str(tmp_path / "runs/demo/bundle"))
    with ShardWriter(str(tmp_path / "data/demo/train/train-00000.tar")) as shard:
        for number, picture in enumerate(jpegs()[:8]):
            shard.write(f"{number:04d}", {"png": picture, "txt": b"a picture", "json": b"{}"})
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((DOCS / f"notebooks/{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    scope: dict[str, object] = {}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec(compile(cell, name, "exec"), scope)
    assert len(cells) > 3 and all(not cell.get("outputs") for cell in notebook["cells"])
