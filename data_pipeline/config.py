"""Settings of the data pipeline, as typed dataclasses (no heavy imports: the command line validates with them)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.common.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def at_least(settings: Any, section: str, **bounds: float) -> None:
    """Raises `ConfigError` unless each named field is a number not below its bound."""
    for name, bound in bounds.items():
        value = getattr(settings, name)
        require(value >= bound, f"{section}.{name}={value}: it must be at least {bound}")


def positive(settings: Any, section: str, *names: str) -> None:
    """Raises `ConfigError` unless each named field is a number above 0."""
    for name in names:
        value = getattr(settings, name)
        require(value > 0, f"{section}.{name}={value}: it must be positive")


@dataclass
class FilterConfig:
    """Which samples take part, judged from the index before a byte is downloaded; null switches a rule off."""

    min_side: int | None = None
    """Shorter side of the stored picture, pixels."""
    max_aspect: float | None = None
    """Longer side / shorter side."""
    min_aesthetic: float | None = None
    max_watermark: float | None = None
    max_unsafe: float | None = None
    min_similarity: float | None = None
    min_caption: int | None = None
    """Caption length in characters."""
    max_caption: int | None = None


@dataclass
class CaptionConfig:
    """Which caption a sample is trained with, and how it is cleaned."""

    sources: dict[str, float] = field(default_factory=dict)
    """Weight per source: `txt` (the .txt member) or `json:FIELD` (a text or a list of texts in the .json member); those
    not named are not used. Empty: the .txt, and where that is missing or empty the .json's caption, text or prompt."""
    clean: bool = True
    """Strip HTML, URLs and control characters, collapse white space."""
    max_characters: int = 1000
    """Captions are cut to this many characters before the tokenizer sees them."""

    def __post_init__(self) -> None:
        for source, weight in self.sources.items():
            require(
                source == "txt" or (source.startswith("json:") and len(source) > len("json:")),
                f"data.captions.sources: {source!r} is neither txt nor json:FIELD",
            )
            require(weight >= 0, f"data.captions.sources: the weight of {source} is {weight}; it must not be negative")
        require(
            any(weight > 0 for weight in self.weights.values()),
            "data.captions.sources: give at least one source a positive weight",
        )
        at_least(self, "data.captions", max_characters=1)

    @property
    def weights(self) -> dict[str, float]:
        """The sources in force."""
        return self.sources or {"txt": 1.0}


@dataclass
class MembersConfig:
    """Which file of a sample is what, where the names do not say: `data.members={image: [input.jpg], caption: [cap]}`.

    A name is what follows the key: all of it (`image.jpg`), without its ending (`image`), its ending (`jpg`), or a glob
    (`*.jpg`); of several names the first that a sample has counts.
    """

    image: list[str] = field(default_factory=list)
    """Names of the picture. Empty: a known ending (jpg, png, ...); of named pictures image, img, picture or photo."""
    caption: list[str] = field(default_factory=list)
    """Names of the caption. Empty: txt, caption, captions, text, cap, prompt, tags, the first with text."""
    json: list[str] = field(default_factory=list)
    """Names of the JSON facts. Empty: json."""

    def __post_init__(self) -> None:
        for name in ("image", "caption", "json"):
            names = [str(one).removeprefix(".").lower() for one in getattr(self, name)]
            require(all(names), f"data.members.{name}: a name is empty")
            setattr(self, name, names)

    @property
    def tag(self) -> str:
        """Distinguishes indexes that were made with other names; empty for the default."""
        if not (self.image or self.caption or self.json):
            return ""
        names = json.dumps([self.image, self.caption, self.json])
        return hashlib.blake2b(names.encode(), digest_size=4).hexdigest()


@dataclass
class DataConfig:
    """Where the samples come from, how they are decoded, and how a batch is made of them."""

    shards: Any = None
    """A glob, brace pattern, directory, s3:// URL pattern, or a list of these."""
    global_batch: int = 64
    """Samples per optimizer step over all ranks."""
    lanes: int = 0
    """Fixed interleaved sub-streams; must divide `global_batch`; world sizes divide it. 0: `global_batch` up to 64,
    else its largest divisor not above 256."""
    window: int = 0
    """Samples shuffled together inside a lane; 0: a power of two up to 1,024, as many as 0.7 GB hold over all lanes (of
    a global batch above 256 samples, more in proportion)."""
    micro_batch: int = 0
    """Samples per forward pass and rank; 0: the whole share of the rank. Gradient accumulation follows from it."""
    threads: int = 2
    """Decoding threads per rank."""
    own_process: bool = True
    """They belong to a process of their own beside each rank, where they do not hold up the training's Python code."""
    prefetch_mb: int = 1024
    """Budget for raw and decoded samples held ahead of the trainer, per rank."""
    decode_margin: float = 2.0
    """JPEGs are decoded at the smallest DCT scale that is still this many times the target size."""
    max_pixels: int = 64_000_000
    """Pictures larger than this (judged from the header) are dropped as `too_large`."""
    crop: str = "random"
    """`random` or `center`: which square of the picture is used."""
    flip: float = 0.0
    """Probability of a horizontal flip. Off by default: captions may say left and right."""
    background: int = 255
    """Grey value that transparent pixels are composited over."""
    srgb: bool = True
    """Convert the colours of pictures with an ICC profile (Adobe RGB, Display P3) to sRGB; false: pixels as stored."""
    index_dir: str | None = None
    """Where indexes are kept when the shards' own directory cannot be written."""
    cache_dir: str | None = None
    """Disk cache for remote shards, shared by the processes of a node."""
    cache_gb: float = 50.0
    max_bad_share: float = 0.01
    """The run stops when more than this share of the consumed samples was broken (of the first 1,000: clearly more)."""
    deadline_s: float = 600.0
    """How long a broken store is retried without a byte of progress."""
    stall_s: float = 20.0
    """A read without a byte for this long is broken off and continued by a new connection."""
    embeddings: Any = None
    """Sidecar shards of precomputed text embeddings; null: encode online."""
    members: MembersConfig = field(default_factory=MembersConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)

    def __post_init__(self) -> None:
        at_least(
            self, "data", global_batch=1, window=0, micro_batch=0, threads=1, prefetch_mb=0, max_pixels=1, cache_gb=0
        )
        positive(self, "data", "decode_margin", "deadline_s", "stall_s")
        require(self.crop in ("random", "center"), f"data.crop={self.crop}: it must be random or center")
        require(0 <= self.flip <= 1, f"data.flip={self.flip}: it must be a probability from 0 to 1")
        require(
            0 <= self.background <= 255, f"data.background={self.background}: it must be a grey value from 0 to 255"
        )
        require(
            0 <= self.max_bad_share <= 1, f"data.max_bad_share={self.max_bad_share}: it must be a share from 0 to 1"
        )
        require(
            self.lanes >= 0 and (not self.lanes or self.global_batch % self.lanes == 0),
            f"data.lanes={self.lanes}: it must be 0 (automatic) or divide data.global_batch={self.global_batch}",
        )

    @property
    def lane_count(self) -> int:
        """The number of lanes in force."""
        if self.lanes:
            return self.lanes
        top = min(self.global_batch, 64 if self.global_batch <= 64 else 256)
        return next(n for n in range(top, 0, -1) if self.global_batch % n == 0)


@dataclass
class DrawConfig:
    """The captioned shapes that `cascade prepare` draws (see data_pipeline/content/synthetic.py)."""

    count: int = 6000
    """Training pictures."""
    heldout: int = 512
    """Pictures of caption combinations that training never sees."""
    size: int = 64
    """Side in pixels."""
    objects: int = 1
    """Objects per picture: 1, or 2 with their relation."""
    samples_per_shard: int = 1000

    def __post_init__(self) -> None:
        at_least(self, "prepare.draw", count=0, heldout=0, size=8, samples_per_shard=1)
        require(self.objects in (1, 2), f"prepare.draw.objects={self.objects}: it must be 1 or 2")


@dataclass
class PrepareConfig:
    """`cascade prepare`: what to draw, import or repack, and where to."""

    kind: str = "draw"
    """`draw` (captioned shapes), `folder` (pictures with captions beside them), `table` (csv, tsv, json, jsonl or
    parquet, with paths or the pictures themselves), `shards` (repack)."""
    source: str | None = None
    images: str | None = None
    """Folder that the paths of a table are relative to; null: the table's own folder, and the folders below it."""
    output: str = "data/demo"
    max_side: int | None = None
    """Larger pictures are shrunk to this longer side; null keeps the bytes as they are."""
    quality: int = 92
    """JPEG quality of re-encoded pictures."""
    samples_per_shard: int = 1000
    heldout: int = 0
    """Samples kept apart for evaluation, spread over the source: they go to OUTPUT/heldout and the others to
    OUTPUT/train; 0: all go to OUTPUT. (Drawings have prepare.draw.heldout.)"""
    deduplicate: str = "none"
    """`none`, `exact` (bytes) or `perceptual`."""
    draw: DrawConfig = field(default_factory=DrawConfig)

    def __post_init__(self) -> None:
        require(
            self.kind in ("draw", "folder", "table", "shards"),
            f"prepare.kind={self.kind}: it must be draw, folder, table or shards",
        )
        require(
            self.deduplicate in ("none", "exact", "perceptual"),
            f"prepare.deduplicate={self.deduplicate}: it must be none, exact or perceptual",
        )
        at_least(self, "prepare", samples_per_shard=1, heldout=0)
        require(
            self.heldout == 0 or self.kind != "draw",
            f"prepare.heldout={self.heldout}: for drawings set prepare.draw.heldout",
        )
        require(
            self.max_side is None or self.max_side >= 1,
            f"prepare.max_side={self.max_side}: it must be positive, or null to keep the pictures as they are",
        )
        require(1 <= self.quality <= 100, f"prepare.quality={self.quality}: it must lie between 1 and 100")
        require(self.kind == "draw" or bool(self.source), f"prepare.source: prepare.kind={self.kind} needs one")
        require(
            self.images is None or self.kind == "table",
            f"prepare.images={self.images}: only prepare.kind=table reads it",
        )
