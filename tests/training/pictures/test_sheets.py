from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.pictures import sheets as grid
from training.pictures.sheets import Cell, heat_sheet, save, sheet, to_side

RED, BLUE = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (64, 64), "blue")


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == colour).all(axis=-1).sum())


def test_small_pictures_are_enlarged_pixel_by_pixel_and_large_ones_shrunk() -> None:
    checker = Image.fromarray((np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.array_equal(np.asarray(to_side(checker, 192)), np.kron(np.asarray(checker), np.ones((12, 12), np.uint8)))
    assert to_side(Image.new("RGB", (1024, 512)), 512).size == (512, 256)
    assert to_side(RED, 20).size == (16, 16)


def test_all_pictures_of_all_cells_are_there() -> None:
    paper = sheet([Cell([RED, BLUE], "a caption", ["16 px", "64 px"])] * 5, columns=2, title="five")
    assert count(paper, (255, 0, 0)) == count(paper, (0, 0, 255)) == 5 * 192 * 192


def test_neighbouring_pictures_are_equally_far_apart_and_pairs_further() -> None:
    def gaps(cells: list[Cell]) -> list[int]:
        row = (np.asarray(sheet(cells))[grid.MARGIN + 30] == (255, 0, 0)).all(axis=-1)
        starts, ends = np.flatnonzero(~row[:-1] & row[1:]), np.flatnonzero(row[:-1] & ~row[1:])
        return (starts[1:] - ends[:-1]).tolist()

    assert gaps([Cell([RED], "")] * 3) == [grid.GAP, grid.GAP]
    assert gaps([Cell([RED, RED], "")] * 2) == [grid.GAP, 2 * grid.GAP, grid.GAP]


@pytest.mark.parametrize("columns", [1, 2])
def test_a_sheet_of_too_many_rows_says_what_it_leaves_out(columns: int) -> None:
    cells = [Cell([RED], "")] * grid.capacity(columns)
    paper = sheet(cells + cells[:1], columns=columns)
    assert count(paper, (255, 0, 0)) == len(cells) * 192 * 192 == count(sheet(cells, columns=columns), (255, 0, 0))
    assert paper.height == sheet(cells, columns=columns, title=f"the first {len(cells)} of {len(cells) + 1}").height


def test_a_long_title_is_wrapped_within_the_sheet() -> None:
    short, long = (np.asarray(sheet([Cell([RED], "")], title=title)) for title in ("red", "attention to red " * 9))
    assert long.shape[0] > short.shape[0] and long.shape[1] == short.shape[1]
    assert (long[:, -grid.MARGIN :] == 255).all() and (long[: grid.MARGIN + grid.LINE_HEIGHT] < 128).any()


def test_super_resolution_is_not_shown_smaller_than_its_input() -> None:
    paper = sheet([Cell([RED.resize((32, 32)), BLUE.resize((128, 128))], "", ["32 px", "128 px"])])
    assert count(paper, (255, 0, 0)) == count(paper, (0, 0, 255)) == 256 * 256


def test_wrong_cells_have_a_red_frame_and_a_note() -> None:
    frame = (0xC6, 0x28, 0x28)
    assert count(sheet([Cell([BLUE], "c")]), frame) == 0
    assert count(sheet([Cell([BLUE], "c", wrong=True)]), frame) >= 4 * 4 * 180
    assert sheet([Cell([BLUE], "c", note="saw green")]).height > sheet([Cell([BLUE], "c")]).height


def test_long_captions_are_wrapped_within_the_cell() -> None:
    for text in ("a very long caption that goes on " * 20, "x" * 500, "蓝天白云下的沙滩" * 30):
        lines = grid._wrapped(text, 192)
        font = grid._font(text)
        assert 1 < len(lines) <= 4 and all(font.getlength(line) <= 192 for line in lines)


def test_short_captions_are_kept_whole() -> None:
    assert grid._wrapped("a red circle", 192) == ["a red circle"]
    assert " ".join(grid._wrapped("a large red circle on a white background", 192)) == (
        "a large red circle on a white background"
    )


def test_heat_sheet_is_bright_where_the_word_was_looked_at() -> None:
    heat = np.zeros((4, 4), np.float32)
    heat[:2] = 0.2
    paper = np.asarray(heat_sheet(Image.new("RGB", (64, 64), (200, 40, 40)), [("red", heat)], "a red square"))
    bright = (np.abs(paper.astype(int) - (200, 40, 40)).max(axis=-1) < 12).sum()
    whole = 192 * 192
    assert whole * 1.3 < bright < whole * 1.7  # the picture itself, and the upper half of the word's copy


def test_an_empty_sheet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        sheet([])


def test_save_makes_directories_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    save(RED, tmp_path / "a" / "b.png")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.png"]


def test_letters_that_no_font_has_are_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(grid, "FONTS", ())
    grid._font.cache_clear()
    monkeypatch.setattr(grid, "_boxes_said", set())
    for caption in ("a 蓝天 sky", "a 猫 cat", "a 蓝天 sky", "a 蓝天 sky again"):
        grid.sheet([Cell([Image.new("RGB", (16, 16))], caption)])
    assert (
        len(caplog.records) == 1
        and "no installed font has it (on Debian: apt-get install fonts-noto-cjk)" in caplog.text
    )
    grid.sheet([Cell([Image.new("RGB", (16, 16))], "a \N{FOX FACE}")])
    assert caplog.messages[1].endswith("no installed font has it"), "that font has no emoji"
    grid._font.cache_clear()
