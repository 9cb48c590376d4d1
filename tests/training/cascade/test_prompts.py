from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from training.cascade.prompts import read_prompts


def test_lists_and_single_prompts() -> None:
    assert read_prompts(None) == []
    assert read_prompts(" a cat ") == ["a cat"]
    assert read_prompts(["a cat", "", " a dog ", 7]) == ["a cat", "a dog", "7"]
    assert read_prompts(["a", "", "b"], keep_blank=True) == ["a", "", "b"]


def test_text_files(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa cat\r\n\r\n 蓝天 \r\na cat".encode())
    assert read_prompts(str(file)) == ["a cat", "蓝天", "a cat"]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def piped(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    piped("a cat\r\n\n 蓝天 \n".encode())
    assert read_prompts("-") == ["a cat", "蓝天"]
    piped(b"\nblurry\n")
    assert read_prompts("-", "negative_prompts", keep_blank=True) == ["", "blurry"]
    assert read_prompts(["-"]) == ["-"], "in a list it is a prompt"
    with pytest.raises(DataError, match="prompts=-: standard input is empty"):
        read_prompts("-")
    piped(b"a cat\n\xff\n")
    with pytest.raises(DataError, match="prompts=-: line 2 is not UTF-8"):
        read_prompts("-")


def test_parti_tables_keep_quotation_marks(tmp_path: Path) -> None:
    file = tmp_path / "parti.tsv"
    file.write_text('Prompt\tCategory\n"a sign that says "hello"\tArts\n a cat \tAnimals\n', encoding="utf-8")
    assert read_prompts(str(file)) == ['"a sign that says "hello"', "a cat"]
    table = tmp_path / "p.csv"
    table.write_text('id,prompt\n1,"a cat, a dog"\n', encoding="utf-8")
    assert read_prompts(str(table)) == ["a cat, a dog"]


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    strange = "one \u2028 \x0b \x85 prompt"
    file = tmp_path / "p.txt"
    file.write_bytes(f"{strange}\r\nanother\rthird".encode())
    assert read_prompts(str(file)) == [strange, "another", "third"]
    table = tmp_path / "p.csv"
    table.write_bytes(f'prompt\n{strange}\n"two\nlines"\n'.encode())
    assert read_prompts(str(table)) == [strange, "two\nlines"]


def test_the_end_of_the_last_line_does_not_begin_another(tmp_path: Path) -> None:
    negatives = tmp_path / "negatives.txt"
    for end in ("", "\n", "\r\n"):
        negatives.write_bytes(f"blurry{end}".encode())
        assert read_prompts(str(negatives), keep_blank=True) == ["blurry"]
    negatives.write_text("\nugly\n")
    assert read_prompts(str(negatives), keep_blank=True) == ["", "ugly"]


def test_a_list_without_quotation_marks_is_reported_to_be_one_prompt(capsys) -> None:
    assert read_prompts("[a cat, a dog]") == ["[a cat, a dog]"]
    assert "this is one prompt" in capsys.readouterr().out
    assert read_prompts("list.text") == ["list.text"]
    assert "list.text: this is one prompt; a file of prompts must end in .txt" in capsys.readouterr().out
    assert read_prompts("a cat.") == ["a cat."] and not capsys.readouterr().out


def test_skipped_blanks_are_reported(capsys) -> None:
    assert read_prompts(["", "a", " "]) == ["a"]
    assert "prompts: 2 of 3 are blank and skipped" in capsys.readouterr().out


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts=.*: this is a directory; give a file of prompts"):
        read_prompts(str(tmp_path))
    (tmp_path / "prompts.md").write_text("a cat")
    (tmp_path / "prompts.parquet").write_bytes(b"PAR1\x15\x04\x00")
    for name, remedy in (("prompts.md", "rename it"), ("prompts.parquet", r"write its prompts to a \.csv or")):
        with pytest.raises(ConfigError, match=rf"{name}: a file of prompts must end in \.txt, .*\.csv.*; {remedy}"):
            read_prompts(str(tmp_path / name))
    with pytest.raises(DataError, match=r"prompts=.*absent\.txt: no such file"):
        read_prompts(str(tmp_path / "absent.txt"))
    file = tmp_path / "latin.txt"
    file.write_bytes(b"a cat\r\ncaf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: line 2 is not UTF-8 text \(byte 0xe9\); save the file as UTF-8"):
        read_prompts(str(file))
    file = tmp_path / "t.tsv"
    file.write_text("a\tb\n")
    with pytest.raises(DataError, match="no column `Prompt`"):
        read_prompts(str(file))
    with pytest.raises(ConfigError, match="negative_prompts="):
        read_prompts({"a": 1}, "negative_prompts")


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", f"a cat\n{LONG}\n", r"line 2 has 100,000 characters; a prompt may have up to 10,000"),
        ("p.txt", "a cat\r\n\r\na\0dog", "line 3 contains a NUL character"),
        ("p.tsv", f"Prompt\tCategory\na cat\tx\n{LONG}\tx\n", "line 3 has 100,000 characters"),
        (
            "p.csv",
            f'prompt\n"{LONG}{LONG}"\n',
            r"line 2 (has 200,000 characters|cannot be read as a table \(field larger)",
        ),
        ("p.csv", "prompt\na cat\na \0 dog\n", "line 3 contains a NUL|line 3 cannot be read as a table .*NUL"),
        ("p.csv", "id,prompt\n1,a cat\n\n2\n", "line 4 has 1 of 2 columns and no prompt"),
        ("p.jsonl", f'{{"prompt": "a"}}\n\n{{"prompt": "{LONG}"}}', "line 3 has 100,000 characters"),
        ("p.jsonl", '{"prompt": "a\\u0000b"}', "line 1 contains a NUL character"),
    ],
)
def test_what_is_not_a_prompt_is_refused_by_line(tmp_path: Path, name: str, content: str, said: str) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8", newline="")
    with pytest.raises(DataError, match=rf"prompts=.*{name}: {said}"):
        read_prompts(str(file))


def test_prompts_of_a_list_are_refused_by_number() -> None:
    with pytest.raises(ConfigError, match="prompts: prompt 2 has 100,000 characters"):
        read_prompts(["a cat", LONG])
    with pytest.raises(ConfigError, match="prompts: prompt 1 contains a NUL character"):
        read_prompts("a\0cat")
    assert len(read_prompts(["y" * 10_000])[0]) == 10_000
