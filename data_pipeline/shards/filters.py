"""Decides which samples to use from the index alone, before any sample is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_pipeline.config import FilterConfig
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.samples import SCORES, UNKNOWN

FILTERS_VERSION = 2
"""Version of the rules' meaning: which rows the same index and settings keep."""

# setting -> (index column, reason, whether a value fails); a sample without the value fails as unknown_COLUMN
_Rule = tuple[str, str, Callable[[np.ndarray, float], np.ndarray]]
_RULES: dict[str, _Rule] = {
    "min_side": ("side", "too_small", lambda value, limit: value < limit),
    "max_aspect": ("aspect", "aspect_ratio", lambda value, limit: value > limit),
    "min_aesthetic": ("aesthetic", "low_aesthetic", lambda value, limit: value < limit),
    "max_watermark": ("watermark", "watermark", lambda value, limit: value > limit),
    "max_unsafe": ("unsafe", "unsafe", lambda value, limit: value > limit),
    "min_similarity": ("similarity", "low_similarity", lambda value, limit: value < limit),
    "min_ratio": ("ratio", "narrow", lambda value, limit: value < limit),
    "below_ratio": ("ratio", "wide", lambda value, limit: value >= limit),
    "min_caption": ("caption_length", "short_caption", lambda value, limit: value < limit),
    "max_caption": ("caption_length", "long_caption", lambda value, limit: value > limit),
}


def keep_rows(index: ShardIndex, rules: FilterConfig) -> tuple[np.ndarray, Counter[str]]:
    """Apply the filters to a shard.

    Returns:
        The rows that are kept, int64 (k,) ascending; and reason -> number of samples dropped, each counted under the
        first rule it violates, so that the counts sum to len(index) - k.
    """
    keep = np.ones(len(index), bool)
    dropped: Counter[str] = Counter()
    for failing, reason in _failures(index, rules):
        out = keep & failing
        if out.any():
            dropped[reason] += int(out.sum())
            keep &= ~out
    return np.flatnonzero(keep), dropped


def _failures(index: ShardIndex, rules: FilterConfig) -> Iterator[tuple[np.ndarray, str]]:
    """Yield which samples violate a rule, bool (n,), and the reason, rule by rule."""
    problems = np.array([problem or "" for problem in index.column("problem").to_pylist()], dtype=str)
    for problem in dict.fromkeys(problems.tolist()):
        if problem:
            yield problems == problem, problem
    for setting, (column, reason, fails) in _RULES.items():
        limit = getattr(rules, setting)
        if limit is None:
            continue
        values = _values(index, column)
        if column in SCORES:
            limit = float(np.float32(limit))  # scores are stored as float32; a score of 0.3 must not exceed 0.3
        yield np.isnan(values), f"unknown_{column}"
        yield fails(values, limit), reason
    if rules.licences:
        found = licences_of(index)
        refused = ~np.isin(found, [one for one in np.unique(found) if _is_allowed(one, rules.licences)])
        yield refused & (found == UNKNOWN), "unknown_licence"
        yield refused, "licence"


def score_advice(reason: str) -> str:
    """Say where a score is searched for, if samples were dropped for the lack of one; empty for other reasons."""
    names = SCORES.get(reason.removeprefix("unknown_"))
    if not names:
        return ""
    return (
        f"no field of their .json called {', '.join(names)}, in any case, holds a number; indexes of earlier versions "
        "ignored numbers written as text: `cascade index rebuild=true` reads them"
    )


def licences_of(index: ShardIndex) -> np.ndarray:
    """Return the licence of each sample, str (n,); `UNKNOWN` if its .json states none."""
    return np.array([licence or UNKNOWN for licence in index.column("licence").to_pylist()], dtype=str)


def _is_allowed(licence: str, patterns: Sequence[str]) -> bool:
    return any(
        re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), licence, re.IGNORECASE) for pattern in patterns
    )


def _values(index: ShardIndex, name: str) -> np.ndarray:
    """Return a column as float64, NaN for unknown values; pictures of unknown size have ratio 1."""
    if name in ("side", "aspect", "ratio"):
        width, height = _values(index, "width"), _values(index, "height")
        if name == "ratio":
            return np.where(np.isnan(width) | np.isnan(height), 1.0, width / np.maximum(height, 1))
        short, long = np.minimum(width, height), np.maximum(width, height)
        return short if name == "side" else long / np.maximum(short, 1)
    return index.column(name).to_numpy().astype(np.float64)
