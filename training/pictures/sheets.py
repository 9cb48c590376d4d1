"""Sheets of captioned pictures (Pillow only): samples with all stages side by side, marked mistakes, heat maps."""

from __future__ import annotations

import io
import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from data_pipeline.storage.atomic import replacing

log = logging.getLogger("cascade")

SHOWN = 192
"""The largest picture of a cell is enlarged to at least this width by a whole factor (nearest neighbour), the others to
its width; those above `LARGEST` are shrunk."""
LARGEST = 512
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
GAP, MARGIN, FONT_SIZE = 16, 24, 14
"""`GAP`: between neighbouring pictures; cells of several pictures are twice as far apart."""
MOST_ROWS = 32
"""Rows of a sheet; viewers, notebooks and trackers do not show a picture of hundreds of rows."""
LINE_HEIGHT = FONT_SIZE + 4
PAPER, INK, FAINT, GOOD, BAD = "white", "#202020", "#707070", "#2e8b57", "#c62828"
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "wqy-zenhei.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "PingFang.ttc",
)
"""Tried in this order for captions that Pillow's default font cannot render."""


@dataclass
class Cell:
    """One entry of a sheet: pictures side by side, with a label above each and a caption below."""

    pictures: list[Image.Image]
    caption: str
    labels: list[str] = field(default_factory=list)
    """Label above each picture, for example "16 px"."""
    note: str = ""
    """Text below the caption, grey, or red with `wrong`."""
    wrong: bool = False
    """Adds a red frame."""


def sheet(cells: Sequence[Cell], columns: int = 4, title: str = "") -> Image.Image:
    """Draw the cells in rows of `columns`; every cell is as wide as the widest one. If they need more than `MOST_ROWS`
    rows, the first are drawn, and the title says so. Raises ValueError without cells."""
    if not cells:
        raise ValueError("a sheet needs at least one cell")
    columns = max(1, min(columns, len(cells)))
    fitting = cells[: capacity(columns)]
    if len(fitting) < len(cells):
        title = f"{title}{title and ': '}the first {len(fitting)} of {len(cells)}"
    drawn = [_draw_cell(cell) for cell in fitting]
    width, height = max(d.width for d in drawn), max(d.height for d in drawn)
    between = GAP * (2 if any(len(cell.pictures) > 1 for cell in fitting) else 1)
    rows, across = -(-len(fitting) // columns), columns * (width + between) - between
    heading = _wrapped(title, across) if title else []
    top = MARGIN + (LINE_HEIGHT * len(heading) + GAP if heading else 0)
    paper = Image.new("RGB", (2 * MARGIN + across, top + rows * (height + GAP) - GAP + MARGIN), PAPER)
    for number, text in enumerate(heading):
        ImageDraw.Draw(paper).text((MARGIN, MARGIN + LINE_HEIGHT * number), text, fill=INK, font=_font(text))
    for index, picture in enumerate(drawn):
        x = MARGIN + index % columns * (width + between)
        paper.paste(picture, (x, top + index // columns * (height + GAP)))
    return paper


def capacity(columns: int) -> int:
    """Return how many cells a sheet of that many columns shows."""
    return columns * MOST_ROWS


def save(
    image: Image.Image,
    path: str | Path,
    pnginfo: PngImagePlugin.PngInfo | None = None,
    sign: Callable[[bytes], bytes] | None = None,
) -> None:
    """Write a PNG atomically, creating its directory if needed.

    Args:
        sign: converts the bytes of the plain PNG to those to write.
    """
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=pnginfo)
    with replacing(path, durable=False) as file:
        file.write(sign(data.getvalue()) if sign else data.getvalue())


def to_side(picture: Image.Image, side: int) -> Image.Image:
    """Resize the picture to a width of about `side` pixels: enlarged by a whole factor (nearest neighbour), or shrunk
    with Lanczos."""
    if picture.width <= side:
        factor = max(1, side // picture.width)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture.resize((side, round(side * picture.height / picture.width)), Image.Resampling.LANCZOS)


def heat_sheet(picture: Image.Image, heat: Sequence[tuple[str, np.ndarray]], caption: str) -> Image.Image:
    """Draw the picture, then for each word the picture dimmed except where pixels attended to the word.

    Args:
        heat: (word, attention (h, w) >= 0); each word is scaled to its own maximum, so compare places, not words.
    """
    cells = [Cell([picture], "(picture)")]
    for word, values in heat:
        strong = values / max(float(values.max()), 1e-12)
        glow = Image.fromarray((255 * strong).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
        dim = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "black"), 0.75)
        cells.append(Cell([Image.composite(picture, dim, glow)], word))
    return sheet(cells, columns=8, title=caption)


# ------------------------------------------------------------------------------------------------------ drawing


def _draw_cell(cell: Cell) -> Image.Image:
    largest = max(picture.width for picture in cell.pictures)
    side = min(largest * -(-SHOWN // largest), LARGEST)  # a multiple, so that it is not the smallest
    shown = [to_side(picture, side) for picture in cell.pictures]
    above = LINE_HEIGHT if cell.labels else 0
    width = sum(picture.width for picture in shown) + GAP * (len(shown) - 1)
    height = max(picture.height for picture in shown)
    caption, note = _wrapped(cell.caption, width), _wrapped(cell.note, width) if cell.note else []
    paper = Image.new("RGB", (width, above + height + 6 + LINE_HEIGHT * (len(caption) + len(note))), PAPER)
    pen = ImageDraw.Draw(paper)
    x = 0
    for number, picture in enumerate(shown):
        paper.paste(picture, (x, above))
        if number < len(cell.labels):
            pen.text((x, 0), cell.labels[number], fill=FAINT, font=_font(cell.labels[number]))
        x += picture.width + GAP
    if cell.wrong:
        pen.rectangle((0, above, width - 1, above + height - 1), outline=BAD, width=4)
    y = above + height + 4
    for text, colour in [*((t, INK) for t in caption), *((t, BAD if cell.wrong else FAINT) for t in note)]:
        pen.text((0, y), text, fill=colour, font=_font(text))
        y += LINE_HEIGHT
    return paper


def _wrapped(text: str, width: int, most: int = 4) -> list[str]:
    """Wrap text to at most `most` lines of `width` pixels, at spaces where possible."""
    font, lines, line = _font(text), [], ""
    for word in _pieces(text, width, font):
        if line and font.getlength(line + word.rstrip()) > width:
            lines.append(line.rstrip())
            line = word.lstrip()
        else:
            line += word
    lines.append(line.rstrip())
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + ELLIPSIS) > width:
        last = last[:-1].rstrip()
    return [*lines[: most - 1], last + ELLIPSIS]


def _pieces(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Split text into words with their trailing space; words too long for a line, such as text without spaces, into
    letters."""
    pieces: list[str] = []
    for word in " ".join(text.split()).split(" "):
        pieces += [*word, " "] if font.getlength(word) > width else [word + " "]
    return pieces


def default_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font at the size of captions."""
    return ImageFont.load_default(FONT_SIZE)


@lru_cache(maxsize=4096)
def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font if it has all letters of `text`, otherwise the installed font that has the most."""
    own = default_font()
    if not isinstance(own, ImageFont.FreeTypeFont) or not _missing(own, text):
        return own
    fonts = [own, *(font for name in FONTS if (font := _installed(name)))]
    best = min(fonts, key=lambda font: len(_missing(font, text)))
    if missing := _missing(best, text):
        _say_boxes(min(missing))
    return best


_boxes_said: set[bool] = set()
"""The kinds of letters, East Asian or not, whose boxes were warned about."""


def _say_boxes(letter: str) -> None:
    """Warn about a letter that no font has, once for East Asian letters and once for others."""
    east_asian = unicodedata.name(letter, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL"))
    if east_asian in _boxes_said:
        return
    _boxes_said.add(east_asian)
    remedy = " (on Debian: apt-get install fonts-noto-cjk)" if east_asian else ""
    log.warning("%s is shown as a box in picture sheets: no installed font has it%s", letter, remedy)


@lru_cache(maxsize=len(FONTS))
def _installed(name: str) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, FONT_SIZE)
    except OSError:
        return None


def _missing(font: ImageFont.FreeTypeFont, text: str) -> set[str]:
    """Return the letters that the font would draw as a box."""
    box = bytes(font.getmask("\uffff"))
    return {char for char in set(text) if not char.isspace() and bytes(font.getmask(char)) == box}
