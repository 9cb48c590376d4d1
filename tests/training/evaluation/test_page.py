"""The page of an evaluation, in a real browser at the widths of a desktop and of a phone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import CHROMIUM, command, measured
from tests.training.evaluation.example_result import RESULT
from training.evaluation.page import embedded, extremes, html, nearest_section, samples_section

CAPTIONS = ['a <script>alert("x")</script> cat', "蓝天 & a very" + "long" * 60 + " word", "a dog", "a fish"]


@pytest.fixture
def page() -> str:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    features = rng.normal(size=(4, 8))
    known = rng.normal(size=(200, 8))
    features[2] = known[77] + 1e-5
    sections = [
        samples_section(pictures, CAPTIONS),
        *extremes(pictures, CAPTIONS, np.array([0.1, 0.4, 0.2, 0.3]), "CLIP score"),
        nearest_section(pictures, CAPTIONS, features, known, {77: pictures[0]}, "colour_grid_4x4"),
    ]
    return html(RESULT, sections)


def test_the_page_shows_every_figure_and_needs_no_network(page: str) -> None:
    for text in ("50.0%", "31.23", "0.1234", "0.0234 to 0.2234", "a remark", "step 9", "KID on colour_grid"):
        assert text in page
    assert "<script>alert" not in page and "&lt;script&gt;" in page
    assert set(re.findall(r'(?:src|href)="(\w+):', page)) == {"data"} and "http" not in page


def test_a_planted_copy_is_framed_beside_its_original(page: str) -> None:
    assert page.count('class="copy"') == 1 and page.count(": a copy") == 1
    worst, best = (page.index(f"{name} of the shown prompts") for name in ("Worst", "Best"))
    assert worst < best and "CLIP score 0.1" in page[worst:best] and "CLIP score 0.4" in page[best:]


def test_large_pictures_are_embedded_small() -> None:
    assert len(embedded(np.zeros((1024, 1024, 3), np.uint8))) < 4000


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_all_pictures_and_nothing_overflows_the_page(page: str, width: int, tmp_path: Path) -> None:
    scroll, inner, loaded, images = measured(page, width, tmp_path)
    assert scroll <= inner == width and loaded == images == 12
    file, shot = tmp_path / "report.html", tmp_path / "shot.png"
    file.write_text(page)
    words = [*command(width, tmp_path), f"--screenshot={shot}", file.as_uri()]
    subprocess.run(words, capture_output=True, timeout=120, check=True)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (1600, width) and pixels.std() > 5
