from __future__ import annotations

import logging

import pytest

from data_pipeline.common.terminal import VisibleFormatter, guard_messages, visible


def test_escape_sequences_become_visible_and_text_stays() -> None:
    assert visible("a\x1b[31mRED\x1b]0;pwn\x07\r\x9b1m") == "a\\x1b[31mRED\\x1b]0;pwn\\x07\\r\\x9b1m"
    assert visible("\u202egpj.exe \ud800") == "\\u202egpj.exe \\ud800"
    assert visible("東京 ü\n\tline") == "東京 ü\n\tline"


def test_messages_are_escaped_in_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    guard_messages()
    record = logging.LogRecord("x", logging.WARNING, "", 0, "key %s", ("\x1b[31m",), None)
    assert VisibleFormatter("%(levelname)s %(message)s").format(record) == "WARNING key \\x1b[31m"
    assert logging.lastResort is not None and logging.lastResort.format(record) == "key \\x1b[31m"
