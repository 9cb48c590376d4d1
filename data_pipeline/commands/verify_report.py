"""The counts of `cascade verify`, and the HTML page that shows them: one file without scripts or external resources."""

from __future__ import annotations

import base64
import hashlib
import heapq
import html
import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from data_pipeline.common.errors import dropped_remark
from data_pipeline.content.captions import Caption
from data_pipeline.content.members import advice
from data_pipeline.shards.filters import score_advice
from data_pipeline.shards.index import SCORES, ShardIndex
from data_pipeline.storage import store

_SHEET = 48
THUMBNAIL = 112
_EXAMPLES = 200

SIDES = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
ASPECTS = (1, 1.1, 1.25, 1.4, 1.6, 1.8, 2, 2.5, 3, 5, 10)
LENGTHS = (0, 1, 10, 20, 40, 60, 80, 120, 160, 240, 500, 1000, 2000)


class Tally:
    """Counts, and a few examples of everything; its size does not grow with the data."""

    def __init__(self) -> None:
        self.delivered = 0
        self.dropped: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        """Sources of the captions of delivered samples."""
        self.layouts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Layouts of the samples dropped for each reason."""
        self.details: dict[str, str] = {}
        """The first detail of each reason."""
        self.histograms: dict[str, Counter[int]] = {"shorter side": Counter(), "aspect ratio": Counter()}
        self.histograms["caption length"] = Counter()
        self.scores: dict[str, Counter[float]] = {name: Counter() for name in SCORES}
        self.examples: list[dict[str, Any]] = []
        self._sheet: list[tuple[int, int, str, str, bytes]] = []

    def result(self) -> dict[str, Any]:
        """Return the counts as printed by the command."""
        return {
            "delivered": self.delivered,
            "dropped": dict(sorted((name, count) for name, count in self.dropped.items() if count)),
            "warnings": dict(sorted((name, count) for name, count in self.warnings.items() if count)),
            "captions.sources": dict(sorted(self.sources.items())),
        }

    def hint(self) -> str:
        """Return a remedy if most samples were dropped for one reason; empty otherwise."""

        def remedy(reason: str) -> str:
            return score_advice(reason) or advice(reason, self.layouts[reason]) or self.details.get(reason, "")

        return dropped_remark(self.dropped, self.delivered + self.dropped.total(), remedy)

    def describe(self, index: ShardIndex) -> None:
        """Add the sizes, aspect ratios, caption lengths and scores in a shard's index to the histograms."""
        columns = {name: index.column(name).to_numpy().astype(float) for name in ("width", "height", "caption_length")}
        short = np.minimum(columns["width"], columns["height"])
        long = np.maximum(columns["width"], columns["height"])
        _count(self.histograms["shorter side"], short, SIDES)
        _count(self.histograms["aspect ratio"], long / np.maximum(short, 1), ASPECTS)
        _count(self.histograms["caption length"], columns["caption_length"], LENGTHS)
        for name, counts in self.scores.items():
            values = index.column(name).to_numpy().astype(float)
            step = 0.5 if name == "aesthetic" else 0.05
            counts.update(
                (np.floor(values[np.isfinite(values)].clip(-1e6, 1e6) / step + 1e-6) * step).round(4).tolist()
            )

    def deliver(self, sample: dict[str, Any], caption: Caption, whole: Callable[[], np.ndarray]) -> None:
        """Count a good sample. A few, chosen by hash, are kept for the contact sheet, decoded by `whole`."""
        self.delivered += 1
        self.formats[sample["__extension__"]] += 1
        self.sources[caption.source] += 1
        name = f"{sample['__url__']}#{sample['__key__']}"
        digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=6).digest()
        rank = -int.from_bytes(digest, "big")
        if len(self._sheet) == _SHEET and rank <= self._sheet[0][0]:
            return
        entry = (rank, self.delivered, str(sample["__key__"]), caption.text[:300], _thumbnail(whole()))
        (heapq.heappush if len(self._sheet) < _SHEET else heapq.heappushpop)(self._sheet, entry)

    def example(self, line: dict[str, Any]) -> None:
        """Keep a line of the quarantine file for the page, if it is one of the first."""
        self.details.setdefault(line["reason"], line["detail"])
        if len(self.examples) < _EXAMPLES:
            self.examples.append(line)

    def sheet(self) -> list[tuple[str, str, bytes]]:
        """Return (key, caption, JPEG) of the pictures kept, in the order they were read."""
        return [(key, caption, jpeg) for _, _, key, caption, jpeg in sorted(self._sheet, key=lambda entry: entry[1])]


def _count(counts: Counter[int], values: np.ndarray, edges: tuple[float, ...]) -> None:
    known = values[np.isfinite(values)]
    bins = np.searchsorted(np.array(edges), known, side="right") - 1
    counts.update(np.maximum(bins, 0).tolist())


def _thumbnail(picture: np.ndarray) -> bytes:
    from PIL import Image

    image = Image.fromarray(picture)
    scale = THUMBNAIL / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    encoded = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST).save(
        encoded, "JPEG", quality=85
    )
    return encoded.getvalue()


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a7bd0; --bad: #c8553d; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
.big { font-size: 2rem; font-weight: 600 } .row { display: flex; flex-wrap: wrap; gap: 2.5rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.5rem 2.5rem }
.charts table { width: 100% } td, th { padding: .1rem .5rem .1rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } td.w { width: 55% }
.bar { background: var(--bar); height: .8rem; margin-top: .35rem; min-width: 1px; border-radius: 2px }
.bad .bar { background: var(--bad) } .muted { opacity: .65 }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: .8rem }
figure { margin: 0 } figure img { display: block; max-width: 100%; border-radius: 3px }
figcaption { font-size: .75rem; line-height: 1.25; overflow: hidden; max-height: 3.8em; overflow-wrap: anywhere }
.list { width: 100%; border-collapse: collapse; font-size: .85rem; overflow-wrap: anywhere }
.list td, .list th { border-bottom: 1px solid var(--line) }
"""


def write_page(url: str, shards: Any, tally: Tally) -> None:
    """Write the page about the data in `shards` to a path or URL."""
    store.write_bytes(url, page(shards, tally).encode("utf-8", "xmlcharrefreplace"))


def page(shards: Any, tally: Tally) -> str:
    """Return the page as HTML."""
    lost = sum(tally.dropped.values())
    listed = shards if isinstance(shards, (list, tuple)) else [shards]
    where = ", ".join(f"{one['name']}: {one['shards']}" if isinstance(one, dict) else str(one) for one in listed)
    charts = [
        _chart("Dropped, by reason", tally.dropped.most_common(), "bad"),
        _chart("Problems that cost no sample", tally.warnings.most_common(), "bad"),
        _chart("Shorter side (pixels, as stored)", _binned(tally.histograms["shorter side"], SIDES)),
        _chart("Longer side / shorter side", _binned(tally.histograms["aspect ratio"], ASPECTS)),
        _chart("Caption length (characters)", _binned(tally.histograms["caption length"], LENGTHS)),
        _chart("Format of delivered samples", tally.formats.most_common()),
        _chart("Source of captions", tally.sources.most_common()),
        *(_chart(f"Score: {name}", sorted(counts.items())) for name, counts in tally.scores.items()),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Data: {_text(where)}</title><style>{_STYLE}</style></head><body>
<h1>What is in the data</h1><div class="muted">{_text(where)}</div>
<div class="row"><p><span class="big">{tally.delivered:,}</span><br>samples that training can use</p>
<p><span class="big">{lost:,}</span><br>dropped</p></div>
<div class="charts">{"".join(charts)}</div>
<h2>Examples</h2><div class="sheet">{"".join(map(_figure, tally.sheet()))}</div>
{_table(tally.examples)}
</body></html>
"""


def _text(value: Any) -> str:
    """Escape untrusted text for HTML; lone surrogates become visible escapes."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def _binned(counts: Counter[int], edges: tuple[float, ...]) -> list[tuple[str, int]]:
    if not counts:
        return []
    last = len(edges) - 1
    names = [f"{edges[i]:g} to {edges[i + 1]:g}" if i < last else f"{edges[i]:g} and more" for i in range(last + 1)]
    return [(names[i], counts[i]) for i in range(min(counts), max(counts) + 1)]


def _chart(title: str, bars: Iterable[tuple[Any, int]], kind: str = "") -> str:
    bars = list(bars)
    if not bars:
        return ""
    top = max(count for _, count in bars) or 1
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td class=w><div class=bar style='width:{math.ceil(100 * n / top)}%'></div></td>"
        f"<td class=n>{n:,}</td></tr>"
        for name, n in bars
    )
    return f"<section class='{kind}'><h2>{_text(title)}</h2><table>{rows}</table></section>"


def _figure(entry: tuple[str, str, bytes]) -> str:
    key, caption, jpeg = entry
    data = base64.b64encode(jpeg).decode()
    return (
        f"<figure title='{_text(key)}: {_text(caption)}'><img alt='' src='data:image/jpeg;base64,{data}'>"
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _table(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return ""
    names = ("shard", "key", "offset", "reason", "detail")
    rows = "".join(
        "<tr>" + "".join(f"<td>{_text(line[name] or '')}</td>" for name in names) + "</tr>" for line in lines
    )
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<h2>Broken (the first {len(lines)})</h2><table class=list><tr>{head}</tr>{rows}</table>"
