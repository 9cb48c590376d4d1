"""Splits text in any script into words, and maps each to a fixed vector by hashing; no vocabulary, no weights.

Shapes: D = width of the vectors, T = tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

# Scripts written without spaces, where every character is its own token.
_SPACELESS = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3100, 0x312F),  # Bopomofo
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),  # Han
    (0xA000, 0xA4CF),  # Yi
    (0xF900, 0xFAFF),  # Han
    (0xFF66, 0xFF9F),  # Katakana, half width
    (0x20000, 0x3FFFF),  # Han
)
_JOINERS = "'\u2019\u200c\u200d_"
_LONGEST_WORD = 64
"""Number of characters of a word used for its n-grams."""

WORD_SHARE, NGRAM_SHARE, NEIGHBOUR_SHARE, POSITION_SHARE = 0.4, 0.1, 0.38, 0.12
"""Shares of a token's variance: the word, its character trigrams ("circles" is near "circle"), the neighbouring words,
and its position."""
NEIGHBOURS = (-3, -2, -1, 1, 2, 3)
"""Relative positions of the words that contribute to a token's vector."""


def _spaceless(char: str) -> bool:
    code = ord(char)
    return any(low <= code <= high for low, high in _SPACELESS)


def split_words(text: str) -> list[tuple[int, int]]:
    """Return the (start, end) of every token of `text`: words between spaces, single characters of scripts without
    spaces, single symbols (emoji). Punctuation is dropped. Combining marks stay with their letter."""
    spans: list[tuple[int, int]] = []
    in_word = False
    for i, char in enumerate(text):
        kind = unicodedata.category(char)[0]
        letter = kind in "LN" and not _spaceless(char)
        follows = bool(spans) and spans[-1][1] == i
        if (in_word and (letter or char in _JOINERS)) or (follows and kind == "M"):
            spans[-1] = (spans[-1][0], i + 1)
        elif kind in "LNS":
            spans.append((i, i + 1))
            in_word = letter
        else:
            in_word = False
    return [(start, start + len(text[start:end].rstrip(_JOINERS))) for start, end in spans]


def normalise_word(word: str) -> str:
    """Normalise the spelling of a word: compatibility forms (NFKC), case folded."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())


def hash_vector(key: str, dim: int) -> np.ndarray:
    """Return the fixed fp32 vector (D,) of a string: uniform, mean 0, variance 1, the same on every machine.

    Philox4x64 (Salmon et al. 2011) keyed by BLAKE2b; only its raw integers are used, which numpy guarantees.
    """
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(digest, "little"))
    unit = (philox.random_raw(dim) >> np.uint64(11)).astype(np.float64) / 2.0**53
    return ((unit - 0.5) * 12.0**0.5).astype(np.float32)


def token_vectors(words: Sequence[str], dim: int) -> np.ndarray:
    """Return the token vectors of a caption, fp32 (T, D) with variance 1, from its normalised words: word, neighbours
    and position.

    Neighbours replace a contextual encoder: the token "circle" carries "large" and "red", so the network does not have
    to find out which of two colours belongs to which of two shapes.
    """
    rows = position_vectors(len(words), dim)
    for place, word in enumerate(words):
        rows[place] += word_vector(word, dim)
        for offset in NEIGHBOURS:
            if 0 <= place + offset < len(words):
                rows[place] += neighbour_vector(words[place + offset], offset, dim)
    return rows


@lru_cache(maxsize=65536)
def word_vector(word: str, dim: int) -> np.ndarray:
    """The vector (D,) of a normalised word: its own hash plus the mean of its character trigrams' hashes.

    Its variance is `WORD_SHARE + NGRAM_SHARE`, in expectation over words.
    """
    marked = f"<{word[:_LONGEST_WORD]}>"
    grams = [marked[i : i + 3] for i in range(len(marked) - 2)]
    ngrams = np.sum([hash_vector(f"gram {gram}", dim) for gram in grams], axis=0) / np.sqrt(np.float32(len(grams)))
    return _fixed(np.sqrt(WORD_SHARE) * hash_vector(f"word {word}", dim) + np.sqrt(NGRAM_SHARE) * ngrams)


@lru_cache(maxsize=65536)
def neighbour_vector(word: str, offset: int, dim: int) -> np.ndarray:
    """Contribution (D,) of the normalised `word`, `offset` positions away, to a token; a different hash per offset."""
    return _fixed(np.sqrt(NEIGHBOUR_SHARE / len(NEIGHBOURS)) * hash_vector(f"word {offset:+d} {word}", dim))


def _fixed(vector: np.ndarray) -> np.ndarray:
    vector = vector.astype(np.float32)
    vector.flags.writeable = False
    return vector


def position_vectors(count: int, dim: int) -> np.ndarray:
    """Sinusoids of the position in the caption, fp32 (T, D), mean square `POSITION_SHARE` (Vaswani et al. 2017, section
    3.5; wavelengths from 2 pi to 2000 pi, since captions are short)."""
    half = (dim + 1) // 2
    rates = 1000.0 ** (-np.arange(half) / max(half - 1, 1))
    angles = np.arange(count)[:, None] * rates[None, :]
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :dim]
    return (np.sqrt(2.0 * POSITION_SHARE) * waves).astype(np.float32)
