import sys

import pytest

from data_pipeline.common import progress as module
from data_pipeline.common.progress import progress


def test_in_a_log_file_every_state_is_a_line_and_the_last_one_is_present(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress(total=3, desc="drawing", unit="sample") as bar:
        for _ in range(3):
            bar.update()
    print("next", file=sys.stderr)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("drawing:   0%") and lines[-2].startswith("drawing: 100%") and lines[-1] == "next"
    assert not any("\r" in line for line in lines)


def test_no_bar_is_shown_when_there_is_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([], desc="drawing")) == []
    progress(total=0, desc="drawing").close()
    assert capsys.readouterr().err == ""


def test_a_log_file_gets_few_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_INTERVAL_S", 3600.0)
    assert list(progress(range(1000), desc="reading")) == list(range(1000))
    assert len(capsys.readouterr().err.splitlines()) == 2
