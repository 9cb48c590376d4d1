"""Imports without garbage collection."""

from __future__ import annotations

import gc
import importlib
from pathlib import Path

import pytest

from data_pipeline.common.python import importing


def test_an_import_collects_nothing_and_is_left_out_of_later_collections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first_of_two", "second_of_two"):
        (tmp_path / f"{name}.py").write_text("import gc\nwas_on = gc.isenabled()\nstays = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    left_out = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError), importing():
        with importing():
            first = importlib.import_module("first_of_two")
        second = importlib.import_module("second_of_two")
        1 / 0  # noqa: B018
    assert gc.isenabled() and not first.was_on and not second.was_on
    assert gc.get_freeze_count() > left_out + 2000
    left_out = gc.get_freeze_count()
    with importing():
        importlib.import_module("first_of_two")
    assert gc.get_freeze_count() <= left_out, "nothing was new"
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled(), "as the program wants it"
    finally:
        gc.enable()
