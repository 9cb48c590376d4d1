"""A real browser for the tests of pages: Chromium without a window."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = (
    "<script>document.title=[document.documentElement.scrollWidth,innerWidth,"
    "[...document.images].filter(i=>i.complete&&i.naturalWidth>0).length,document.images.length].join(' ')</script>"
)


def command(width: int, folder: Path) -> list[str]:
    """Chromium with a window of this width, its profile in `folder`."""
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    return [*words, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1600"]


def measured(page: str, width: int, folder: Path) -> tuple[int, int, int, int]:
    """The width of the content and of the window, the number of pictures shown, and the number of all pictures."""
    file = folder / "measured.html"
    file.write_text(page.replace("</body>", f"{MEASURE}</body>"))
    words = [*command(width, folder), "--dump-dom", file.as_uri()]
    dumped = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    scroll, inner, loaded, images = map(int, re.findall(r"<title>([\d ]+)</title>", dumped)[0].split())
    return scroll, inner, loaded, images
