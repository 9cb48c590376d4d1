"""Settings of the data pipeline as typed dataclasses. No heavy imports: the command line validates with them."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from data_pipeline.common.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise `ConfigError` unless the value of `key` is one of at least two allowed ones."""
    *most, last = allowed
    require(value in allowed, f"{key}={value}: it must be {', '.join(map(str, most))} or {last}")


def at_least(settings: Any, section: str, **bounds: float) -> None:
    """Raise `ConfigError` unless each named field is at least its bound."""
    for name, bound in bounds.items():
        value = getattr(settings, name)
        require(value >= bound, f"{section}.{name}={value}: it must be at least {bound}")


def _is_encoding(name: str) -> bool:
    """Return whether Python can decode bytes to text with this encoding."""
    try:
        bytes(4).decode(codecs.lookup(name).name)  # of 4 bytes, UTF-32 makes one character
    except (LookupError, ValueError):
        return False
    return True


def positive(settings: Any, section: str, *names: str) -> None:
    """Raise `ConfigError` unless each named field is above 0."""
    for name in names:
        value = getattr(settings, name)
        require(value > 0, f"{section}.{name}={value}: it must be positive")


@dataclass
class FilterConfig:
    """Which samples to use, decided from the index before any sample is downloaded; null disables a filter."""

    min_side: int | None = None
    """Minimum of the shorter side of the stored picture, pixels."""
    max_aspect: float | None = None
    """Maximum of longer side / shorter side."""
    min_aesthetic: float | None = None
    """Minimum aesthetic score in the `.json`, in the unit of that score."""
    max_watermark: float | None = None
    """Maximum watermark probability in the `.json`, 0 to 1."""
    max_unsafe: float | None = None
    """Maximum probability of unsafe content in the `.json`, 0 to 1."""
    min_similarity: float | None = None
    """Minimum similarity of picture and caption in the `.json`, -1 to 1."""
    min_ratio: float | None = None
    """Minimum of width / height of the stored picture; pictures of unknown size count as squares."""
    below_ratio: float | None = None
    """Exclusive maximum of width / height."""
    min_caption: int | None = None
    """Minimum caption length, characters."""
    max_caption: int | None = None
    """Maximum caption length, characters."""
    licences: list[str] = field(default_factory=list)
    """Accepted licences, as written in the `.json` (case-insensitive); `*` matches any text: [CC0, "CC BY *"].
    `unknown` accepts samples that state none. Empty: any."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.licences, (list, tuple)), f"data.filter.licences={self.licences}: it must be a list: [CC0]"
        )
        self.licences = [" ".join(str(licence).split()) for licence in self.licences]
        require(all(self.licences), "data.filter.licences: a licence is empty; samples without one are `unknown`")

    def in_force(self) -> dict[str, Any]:
        """Return the filters that are not disabled, by name."""
        return {name: value for name, value in vars(self).items() if value is not None and value != []}


def member_of(source: str) -> str:
    """Return the name or glob of a source `member:NAME` of `data.captions.sources`; empty for other sources."""
    kind, _, name = source.partition(":")
    return name.lower().removeprefix(".") if kind == "member" else ""


@dataclass
class CaptionConfig:
    """Which caption to train a sample with, and how to clean it."""

    sources: dict[str, float] = field(default_factory=dict)
    """Weight of each source: `txt` (the .txt member), `txt:lines` (one caption per line of it), `json:FIELD` (a string
    or a list of strings in the .json member; `json:meta.caption` is a nested field), `member:NAME` (another member of
    text; NAME may be a glob: `member:*.txt` for K.1.txt, K.long.txt) or `file:NAME` (from `files`).
    Sources not listed are not used. Empty: the .txt or, if it is missing or empty, the caption, text or prompt in the
    .json."""
    files: dict[str, str] = field(default_factory=dict)
    """Directories (or s3:// prefixes) of captions written by `cascade caption`, each under a name of your choice."""
    encoding: str | None = None
    """Encoding of texts that are not UTF-8 and have no byte order mark: `cp1252`, `gb18030`, `shift_jis`, ...; null:
    such texts are dropped as `bad_text`."""
    clean: bool = True
    """Strip HTML, URLs and control characters, and collapse white space."""
    max_characters: int = 1000
    """Captions are truncated to this many characters before tokenization."""

    def __post_init__(self) -> None:
        for source, weight in self.sources.items():
            kind, _, name = source.partition(":")
            require(
                source in ("txt", "txt:lines") or (kind in ("json", "member", "file") and bool(name)),
                f"data.captions.sources: {source!r} is not a source; use txt, txt:lines, json:FIELD, member:NAME or "
                "file:NAME",
            )
            require(
                kind != "file" or name in self.files,
                f"data.captions.sources: {source}: data.captions.files has no {name!r}; give its directory with "
                f"data.captions.files={{{name}: DIR}}",
            )
            require(weight >= 0, f"data.captions.sources: the weight of {source} is {weight}; it must not be negative")
        require(
            any(weight > 0 for weight in self.weights.values()),
            "data.captions.sources: give at least one source a positive weight",
        )
        for name in self.files:
            require(
                f"file:{name}" in self.sources,
                f"data.captions.files: {name} is not used; add file:{name} to data.captions.sources",
            )
        at_least(self, "data.captions", max_characters=1)
        require(
            self.encoding is None or _is_encoding(self.encoding),
            f"data.captions.encoding={self.encoding}: Python knows no such encoding; try cp1252, latin-1, gb18030",
        )

    def of_members(self) -> CaptionConfig:
        """Return these settings without `files`, which belong to the training shards: for held-out shards."""
        sources = {name: weight for name, weight in self.sources.items() if not name.startswith("file:")}
        return replace(self, files={}, sources=sources if any(sources.values()) else {})

    @property
    def members(self) -> tuple[str, ...]:
        """Names and globs of the members that the sources `member:NAME` use."""
        used = (member_of(source) for source, weight in self.sources.items() if weight > 0)
        return tuple(name for name in used if name)

    @property
    def weights(self) -> dict[str, float]:
        """The effective sources and their weights."""
        return self.sources or {"txt": 1.0}


@dataclass
class MembersConfig:
    """Which member of a sample is which, for unusual names: `data.members={image: [input.jpg], caption: [cap]}`.

    An entry matches what follows the sample's key: all of it (`image.jpg`), the part before the extension (`image`),
    the extension (`jpg`), or a glob (`*.jpg`). The first entry that matches a member is used.
    """

    image: list[str] = field(default_factory=list)
    """The picture. Empty: a known extension (jpg, png, ...); among named pictures: image, img, picture or photo."""
    caption: list[str] = field(default_factory=list)
    """The caption. Empty: the first of txt, caption, captions, text, cap, prompt, tags that has text."""
    json: list[str] = field(default_factory=list)
    """The JSON metadata. Empty: json."""

    def __post_init__(self) -> None:
        for name in ("image", "caption", "json"):
            given = getattr(self, name)
            require(isinstance(given, (list, tuple)), f"data.members.{name}={given}: it must be a list: [{given}]")
            names = [str(one).removeprefix(".").lower() for one in given]
            require(all(names), f"data.members.{name}: a name is empty")
            setattr(self, name, names)

    @property
    def tag(self) -> str:
        """A hash that distinguishes indexes built with these names; empty for the default."""
        if not (self.image or self.caption or self.json):
            return ""
        names = json.dumps([self.image, self.caption, self.json])
        return hashlib.blake2b(names.encode(), digest_size=4).hexdigest()


@dataclass
class DatasetConfig:
    """One data set of a mixture, an entry of `data.shards`. Keys it does not set default to those of `data`."""

    name: str
    """A single word, used in metrics."""
    shards: Any
    """Like `data.shards`, but not a mixture."""
    weight: Any = 1.0
    """Its share of the samples, relative to the other weights; or a schedule by position: {0: 0.7, 640000: 0.3}."""
    start: int = 0
    """Position of the run (samples consumed since step 0) from which it is used."""
    end: int | None = None
    """Position from which it is no longer used; null: never."""
    window: int | None = None
    """Overrides `data.window`."""
    filter: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, Any] = field(default_factory=dict)
    members: dict[str, Any] = field(default_factory=dict)
    """Overrides of `data.filter`, `data.captions` and `data.members`."""

    def weight_at(self, position: int) -> Fraction:
        """Return the exact weight at a position; 0 before `start` and from `end` on."""
        if position < self.start or (self.end is not None and position >= self.end):
            return Fraction(0)
        if not isinstance(self.weight, Mapping):
            return Fraction(str(self.weight))
        known = [(int(since), value) for since, value in self.weight.items() if int(since) <= position]
        return Fraction(str(max(known)[1])) if known else Fraction(0)

    @property
    def changes(self) -> set[int]:
        """The positions at which the weight changes."""
        since = {int(position) for position in self.weight} if isinstance(self.weight, Mapping) else set()
        return {self.start, *since} | ({self.end} if self.end is not None else set())


def is_mixture(shards: Any) -> bool:
    """Return whether `data.shards` (or another key of shards) lists data sets."""
    return isinstance(shards, Mapping) or (
        isinstance(shards, (list, tuple)) and any(isinstance(one, Mapping) for one in shards)
    )


def _dataset_of(entry: Any) -> DatasetConfig:
    """Check and convert an entry of a mixture. Raises `ConfigError`."""
    example = "{name: a, shards: 'a/*.tar', weight: 0.7}"
    require(isinstance(entry, Mapping), f"data.shards: {entry!r}: each entry of a mixture must have the form {example}")
    known = [one.name for one in fields(DatasetConfig)]
    for key in entry:
        require(key in known, f"data.shards: unknown key {key!r} of a data set; the keys are {', '.join(known)}")
    name = entry.get("name")
    require(
        isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is not None,
        f"data.shards: name={name!r}: each data set needs a name of letters, digits, `_`, `-` and `.`",
    )
    where = f"data.shards: data set {name}:"
    require(
        bool(entry.get("shards")) and not is_mixture(entry["shards"]), f"{where} shards must be a pattern or a list"
    )
    dataset = DatasetConfig(**dict(entry))
    if isinstance(dataset.weight, Mapping):
        require(bool(dataset.weight), f"{where} weight is empty; give a number, or a number for each position")
        dataset.weight = {str(position): value for position, value in dataset.weight.items()}
        require(
            all(position.isdecimal() for position in dataset.weight),
            f"{where} weight={dataset.weight}: its keys must be positions, such as {{0: 0.7, 640000: 0.3}}",
        )
    weights = dataset.weight.values() if isinstance(dataset.weight, Mapping) else [dataset.weight]
    for weight in weights:
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        require(number and 0 <= weight < float("inf"), f"{where} weight={weight}: it must be a number of at least 0")
    for key in ("start", "end", "window"):
        value = getattr(dataset, key)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        require(whole or (value is None and key != "start"), f"{where} {key}={value}: it must be a whole number")
    require(
        dataset.end is None or dataset.end > dataset.start,
        f"{where} end={dataset.end}: it must be greater than start={dataset.start}",
    )
    for key in ("filter", "captions", "members"):
        require(isinstance(getattr(dataset, key), Mapping), f"{where} {key} must be a mapping, like data.{key}")
    return dataset


@dataclass
class DataConfig:
    """Where samples come from, and how they are decoded and batched."""

    shards: Any = None
    """A glob, brace pattern, directory, s3:// URL pattern, or a list of these; or a mixture of data sets: a list of
    {name: a, shards: PATTERN, weight: 0.7} (see `DatasetConfig`)."""
    global_batch: int = 64
    """Samples per optimizer step over all ranks."""
    lanes: int = 0
    """Number of fixed interleaved substreams. It must divide `global_batch`, and the number of processes must divide
    it. 0: `global_batch` if that is at most 64, otherwise its largest divisor up to 256."""
    window: int = 0
    """Samples shuffled together within a lane; 0: the largest power of two, up to 1,024, for which the windows of all
    lanes fit into 0.7 GB (proportionally more for a global batch above 256)."""
    micro_batch: int = 0
    """Samples per forward pass and rank; 0: the rank's whole share of the batch. Determines gradient accumulation."""
    threads: int = 2
    """Decoding threads per rank."""
    own_process: bool = True
    """Run the decoding threads in a separate process per rank, so that they do not slow down the training process."""
    prefetch_mb: int = 1024
    """Memory for prefetched samples, raw and decoded, per rank."""
    decode_margin: float = 2.0
    """JPEGs are decoded at the smallest DCT scale that gives at least this many times the target size."""
    max_pixels: int = 64_000_000
    """Pictures with more pixels (according to the header) are dropped as `too_large`."""
    crop: str = "random"
    """`random` or `center`: which square of the picture is used."""
    flip: float = 0.0
    """Probability of a horizontal flip. Off by default, because captions may mention left and right."""
    background: int = 255
    """Grey value placed behind transparent pixels."""
    srgb: bool = True
    """Convert the colours of pictures with an ICC profile (Adobe RGB, Display P3) to sRGB; false: pixels as stored."""
    index_dir: str | None = None
    """Directory for indexes when the shards' own directory is not writable."""
    cache_dir: str | None = None
    """Disk cache for remote shards, their indexes and embeddings, shared by the processes of a node."""
    cache_gb: float = 50.0
    """Maximum size of the disk cache per node, GB; the least recently used shards are evicted."""
    max_bad_share: float = 0.01
    """The run stops if more than this share of samples is bad (within the first 1,000: significantly more)."""
    deadline_s: float = 600.0
    """How long to keep retrying a store that fails without sending a byte, seconds."""
    stall_s: float = 20.0
    """A read that receives nothing for this many seconds is aborted and resumed on a new connection."""
    buckets: list[str] = field(default_factory=list)
    """Shapes of the training pictures, [1x1,4x3,3x4,16x9,9x16]: each picture is cropped to the nearest shape, with
    about as many pixels as the stage's square; all pictures of a step have the same shape. Empty: squares."""
    embeddings: Any = None
    """Directory of precomputed text embeddings (`cascade embed`); null: encode captions during training."""
    members: MembersConfig = field(default_factory=MembersConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)

    def __post_init__(self) -> None:
        at_least(
            self, "data", global_batch=1, window=0, micro_batch=0, threads=1, prefetch_mb=0, max_pixels=1, cache_gb=0
        )
        positive(self, "data", "decode_margin", "deadline_s", "stall_s")
        one_of("data.crop", self.crop, ("random", "center"))
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

        self.ratios()
        if is_mixture(self.shards):
            written = [self.shards] if isinstance(self.shards, Mapping) else self.shards
            pairs = zip(written, self.datasets(), strict=True)
            self.shards = [{**entry, "weight": one.weight} for entry, one in pairs]  # as JSON would write them
            self.parts()

    def datasets(self) -> list[DatasetConfig]:
        """Return the data sets of a mixture; an empty list if `shards` is not a mixture.

        Raises:
            ConfigError: an entry is invalid, two have the same name, or at some position none has a positive weight.
        """
        if not is_mixture(self.shards):
            return []
        entries = [self.shards] if isinstance(self.shards, Mapping) else self.shards
        found = [_dataset_of(entry) for entry in entries]
        names = [dataset.name for dataset in found]
        for name in names:
            require(names.count(name) == 1, f"data.shards: two data sets are called {name}; give them different names")
        for position, weights in _schedule(found):
            require(any(weights), f"data.shards: from position {position} on no data set has a weight above 0")
        return found

    def check_changes(self) -> None:
        """Raise `ConfigError` if the shares of a mixture would change in the middle of a step."""
        for dataset in self.datasets():
            for position in sorted(dataset.changes):
                below = position // self.global_batch * self.global_batch
                require(
                    position == below,
                    f"data.shards: data set {dataset.name}: position {position}: shares can only change between steps, "
                    f"at multiples of data.global_batch={self.global_batch}; the nearest are {below} and "
                    f"{below + self.global_batch}",
                )

    def schedule(self) -> list[tuple[int, list[Fraction]]]:
        """Return (position, share of each of the `datasets`) for each position from which the shares differ."""
        return _schedule(self.datasets())

    def ratios(self) -> dict[str, float]:
        """Return width / height of each of the `buckets` by name, ascending.

        Raises:
            ConfigError: a bucket is not WIDTHxHEIGHT, is too elongated, or is listed twice.
        """
        found: dict[str, float] = {}
        for name in self.buckets:
            match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", str(name))
            require(match is not None, f"data.buckets: {name!r} is not a shape; write WIDTHxHEIGHT, such as 4x3")
            assert match is not None
            ratio = int(match[1]) / int(match[2])
            require(ratio not in found.values(), f"data.buckets: {name} is listed twice")
            require(1 / 8 <= ratio <= 8, f"data.buckets: {name}: the longer side must be at most 8 times the shorter")
            found[str(name)] = ratio
        return dict(sorted(found.items(), key=lambda pair: pair[1]))

    def bucket_parts(self) -> dict[str, DataConfig]:
        """Return settings for each bucket by name, as if its pictures were a data set of their own.

        A picture belongs to the bucket whose ratio is nearest on a logarithmic scale.
        """
        ratios = self.ratios()
        names, values = list(ratios), list(ratios.values())
        bounds: list[float | None] = [None, *((a * b) ** 0.5 for a, b in pairwise(values)), None]
        found = {}
        for name, (low, high) in zip(names, pairwise(bounds), strict=True):
            low = max(low or 0, self.filter.min_ratio or 0) or None
            limits = [limit for limit in (high, self.filter.below_ratio) if limit is not None]
            rules = replace(self.filter, min_ratio=low, below_ratio=min(limits) if limits else None)
            found[name] = replace(self, buckets=[], filter=rules)
        return found

    def shares(self) -> list[tuple[int, dict[str, str]]]:
        """Return the `schedule` by name, as exact fractions, without data sets whose share is 0.

        Without a mixture, the share is {"": "1"} from position 0.
        """
        names = [dataset.name for dataset in self.datasets()] or [""]
        rows = self.schedule() if names != [""] else [(0, [Fraction(1)])]
        return [
            (position, {name: str(share) for name, share in zip(names, row, strict=True) if share})
            for position, row in rows
        ]

    def parts(self) -> dict[str, DataConfig]:
        """Return settings for each data set of a mixture by name, as if it were alone; without a mixture {"": self}.

        Raises:
            ConfigError: a data set overrides a filter, caption or member setting that does not exist or is invalid.
        """
        found = {}
        for dataset in self.datasets():
            own: dict[str, Any] = {"shards": dataset.shards}
            if dataset.window is not None:
                own["window"] = dataset.window
            for key in ("filter", "captions", "members"):
                try:
                    own[key] = replace(getattr(self, key), **getattr(dataset, key))
                except TypeError as error:
                    known = ", ".join(one.name for one in fields(getattr(self, key)))
                    raise ConfigError(
                        f"data.shards: data set {dataset.name}: {key}={getattr(dataset, key)}: its keys are {known}"
                    ) from error
            found[dataset.name] = replace(self, **own)
        return found or {"": self}

    @property
    def lane_count(self) -> int:
        """The effective number of lanes."""
        if self.lanes:
            return self.lanes
        top = min(self.global_batch, 64 if self.global_batch <= 64 else 256)
        return next(n for n in range(top, 0, -1) if self.global_batch % n == 0)

    def share_of(self, world_size: int) -> int:
        """Return the samples per optimizer step of each of `world_size` processes."""
        return self.global_batch // world_size

    def micro_batch_of(self, world_size: int) -> int:
        """Return the samples per forward pass of each of `world_size` processes."""
        return self.micro_batch or self.share_of(world_size)

    def accumulate_of(self, world_size: int) -> int:
        """Return the micro-batches per optimizer step of each of `world_size` processes."""
        return self.share_of(world_size) // self.micro_batch_of(world_size)


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, ascending: possible numbers of processes, or sizes of a micro-batch."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _schedule(datasets: list[DatasetConfig]) -> list[tuple[int, list[Fraction]]]:
    rows: list[tuple[int, list[Fraction]]] = []
    for position in sorted({0, *(change for dataset in datasets for change in dataset.changes)}):
        weights = [dataset.weight_at(position) for dataset in datasets]
        shares = [weight / (sum(weights) or 1) for weight in weights]
        if not rows or rows[-1][1] != shares:
            rows.append((position, shares))
    return rows


@dataclass
class DrawConfig:
    """The captioned shapes that `cascade prepare` draws; see data_pipeline/content/synthetic.py."""

    count: int = 6000
    """Number of training pictures."""
    heldout: int = 512
    """Number of pictures with caption combinations that training never sees."""
    size: int = 64
    """Side of the pictures, pixels."""
    objects: int = 1
    """Objects per picture: 1, or 2 and their relation."""
    samples_per_shard: int = 1000
    """Samples per shard."""

    def __post_init__(self) -> None:
        at_least(self, "prepare.draw", count=0, heldout=0, size=8, samples_per_shard=1)
        one_of("prepare.draw.objects", self.objects, (1, 2))


@dataclass
class PrepareConfig:
    """`cascade prepare`: what to draw, import or repack, and where to write it."""

    kind: str = "draw"
    """`draw` (captioned shapes), `folder` (pictures with caption files), `table` (csv, tsv, json, jsonl or parquet,
    with paths or the pictures themselves) or `shards` (repack)."""
    source: str | None = None
    """The folder, table or shards to read, depending on `kind`."""
    images: str | None = None
    """Folder that the paths in a table are relative to; null: the table's own folder and its subfolders."""
    captions: str = "files"
    """Captions of a folder's pictures that have no caption file: `files` (none, such pictures are dropped), `folder`
    (the name of the picture's folder, as a class) or `name` (the picture's file name)."""
    output: str = "data/demo"
    """Directory or s3:// prefix for the shards."""
    max_side: int | None = None
    """Shrink pictures whose longer side is larger than this, pixels; null: keep the files as they are."""
    quality: int = 92
    """JPEG quality of re-encoded pictures."""
    samples_per_shard: int = 1000
    """Samples per shard."""
    heldout: int = 0
    """Samples to hold out for evaluation, spread over the source. They go to OUTPUT/heldout, the rest to OUTPUT/train;
    0: everything goes to OUTPUT. (For drawings, use prepare.draw.heldout.)"""
    deduplicate: str = "none"
    """`none`, `exact` (bytes) or `perceptual`."""
    draw: DrawConfig = field(default_factory=DrawConfig)

    def __post_init__(self) -> None:
        one_of("prepare.kind", self.kind, ("draw", "folder", "table", "shards"))
        one_of("prepare.deduplicate", self.deduplicate, ("none", "exact", "perceptual"))
        at_least(self, "prepare", samples_per_shard=1, heldout=0)
        require(
            self.heldout == 0 or self.kind != "draw",
            f"prepare.heldout={self.heldout}: for prepare.kind=draw, use prepare.draw.heldout",
        )
        require(
            self.max_side is None or self.max_side >= 1,
            f"prepare.max_side={self.max_side}: it must be positive, or null to keep the pictures as they are",
        )
        require(1 <= self.quality <= 100, f"prepare.quality={self.quality}: it must lie between 1 and 100")
        require(
            self.kind == "draw" or bool(self.source),
            f"prepare.source: give the folder, table or shards that prepare.kind={self.kind} is to read",
        )
        require(
            self.images is None or self.kind == "table",
            f"prepare.images={self.images}: only prepare.kind=table uses it",
        )
        one_of("prepare.captions", self.captions, ("files", "folder", "name"))
        require(
            self.captions == "files" or self.kind == "folder",
            f"prepare.captions={self.captions}: only prepare.kind=folder reads it",
        )
