"""Where pictures and captions come from: a folder, a table, or existing shards. Each is a numbered list of samples."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_pipeline.common.errors import BadSample, DataError
from data_pipeline.config import DataConfig
from data_pipeline.content.captions import read_json
from data_pipeline.reading.rows import runs_of
from data_pipeline.shards.index import IMAGE_EXTENSIONS, ShardIndex

if TYPE_CHECKING:
    from data_pipeline.reading.rows import RowReader
    from data_pipeline.shards.dataset import Dataset

logger = logging.getLogger(__name__)

PATH_COLUMNS = ("path", "image_path", "file_path", "filepath", "file_name", "filename", "file", "image")
_BLOCK, _COMPRESSED_BLOCK, _BLOCKS_KEPT = 8 << 20, 128 << 20, 4
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt", "description")


@dataclass
class Item:
    """One sample as found."""

    name: str
    """What reports call it: a path, or shard and key."""
    key: str
    extension: str
    """Of the picture."""
    image: bytes
    caption: bytes | None
    """The .txt, as bytes."""
    meta: dict[str, Any]


class Source(Protocol):
    identity: str
    """Changes when the content of the source does."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str: ...

    def read(self, number: int) -> Item:
        """Raises `BadSample` where the sample is damaged."""


class FolderSource:
    """Every picture below a folder, in the order of their paths, with the .txt and .json of the same name beside it."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(os.path.expanduser(folder))
        if not self.folder.is_dir():
            raise DataError(f"prepare.source={folder}: there is no such directory")
        self.files = sorted(
            (path for path in self.folder.rglob("*") if _is_picture(path) and path.is_file()),
            key=lambda path: path.relative_to(self.folder).parts,
        )
        if not self.files:
            raise DataError(f"prepare.source={folder}: no pictures ({', '.join(IMAGE_EXTENSIONS)}) lie below it")
        self.identity = _hash(f"{self.name(i)} {_look(path)}" for i, path in enumerate(self.files))

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        return self.files[number].relative_to(self.folder).as_posix()

    def read(self, number: int) -> Item:
        path = self.files[number]
        meta = _json(_bytes_or_none(path.with_suffix(".json")))
        meta.setdefault("source", self.name(number))
        caption = _bytes_or_none(path.with_suffix(".txt"))
        return Item(self.name(number), f"{number:09d}", path.suffix[1:].lower(), _read(path), caption, meta)


class TableSource:
    """One row per picture: a column of paths (relative to the table), a column of captions, more for the .json."""

    def __init__(self, table: str) -> None:
        self.path = Path(os.path.expanduser(table))
        if not self.path.is_file():
            raise DataError(f"prepare.source={table}: there is no such file")
        self.table = _read_table(self.path, (*PATH_COLUMNS, *CAPTION_COLUMNS))
        names = {str(name).lower(): str(name) for name in reversed(self.table.column_names)}
        self.path_column = next((names[name] for name in PATH_COLUMNS if name in names), None)
        self.caption_column = next((names[name] for name in CAPTION_COLUMNS if name in names), None)
        if self.path_column is None or self.caption_column is None:
            raise DataError(
                f"prepare.source={table}: it needs a column of paths ({', '.join(PATH_COLUMNS)}) and one of captions "
                f"({', '.join(CAPTION_COLUMNS)}); it has {', '.join(map(str, self.table.column_names))}"
            )

        whole = hashlib.blake2b(self.path.read_bytes(), digest_size=8).hexdigest()
        places = (self.path.parent / self.name(number) for number in range(len(self)))
        self.identity = _hash([whole, *(_size(place) for place in places)])

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def name(self, number: int) -> str:
        given = self.table.column(self.path_column)[number].as_py()
        return os.fsdecode(given) if isinstance(given, bytes) else str(given)

    def read(self, number: int) -> Item:
        row = {str(name): self.table.column(name)[number].as_py() for name in self.table.column_names}
        given, caption = row.pop(str(self.path_column)), row.pop(str(self.caption_column))
        given = os.fsdecode(given) if isinstance(given, bytes) else given
        if not given:
            raise BadSample("missing_image", "the row has no path")
        if "://" in str(given):
            raise BadSample("missing_image", "only local paths are read; download URLs with img2dataset first")
        path = self.path.parent / str(given)
        meta = {"source": str(given), **{name: _plain(value) for name, value in row.items()}}
        text = caption if caption is None or isinstance(caption, bytes) else str(caption).encode("utf-8", "ignore")
        extension = path.suffix[1:].lower()
        extension = extension if extension in IMAGE_EXTENSIONS else "jpg"  # readers look at the content
        return Item(str(given), f"{number:09d}", extension, _read(path), text, meta)


class ShardSource:
    """The samples of existing shards that pass `data.filter`, in the order of the shards."""

    def __init__(self, shards: str, config: DataConfig) -> None:
        import numpy as np

        from data_pipeline.reading.rows import RowReader
        from data_pipeline.shards.dataset import load_or_build, patience_of
        from data_pipeline.storage import store

        self.dataset = load_or_build(store.expand(shards, patience_of(config)), config)
        self.reader = RowReader(self.dataset, config)
        self._blocks = _Blocks(self.dataset, self.reader)
        self.identity = self.dataset.fingerprint
        self._left_out: set[str] = set()
        self._ends = np.cumsum(self.dataset.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(self._ends.searchsorted(number, side="right"))
        return shard, number - int(self._ends[shard] - self.dataset.counts[shard])

    def name(self, number: int) -> str:
        shard, row = self._place(number)
        return f"{self.dataset.urls[shard]}#{self.dataset.key(shard, row)}"

    def read(self, number: int) -> Item:
        shard, row = self._place(number)
        if self.reader.is_direct(shard) or self._is_scattered(shard, row):
            sample = self.reader.read(shard, row)
        else:
            sample = self.reader.sample_from(shard, row, *self._blocks.read(shard, row))
        extension = next((name for name in IMAGE_EXTENSIONS if name in sample), None)
        if extension is None:
            raise BadSample("missing_image", "no member is a picture")
        for other in {*sample} - {extension, "txt", "json"} - self._left_out:
            if not other.startswith("__"):
                self._left_out.add(other)
                logger.warning("members .%s are left out: a picture, its caption and its .json are written", other)
        key = str(sample["__key__"]).rpartition("/")[2].replace(".", "_")
        return Item(self.name(number), key, extension, sample[extension], sample.get("txt"), _json(sample.get("json")))

    def _is_scattered(self, shard: int, row: int) -> bool:
        """Whether blocks would bring far more than the sample; a compressed shard has no choice."""
        index, rows = self.dataset.index(shard)
        return not index.compressed and len(runs_of(self.reader.places(index, int(rows[row])))) > 1


class _Blocks:
    """Bytes of remote or compressed shards, read in large blocks because neighbours are asked for one after another."""

    def __init__(self, dataset: Dataset, reader: RowReader) -> None:
        self._dataset, self._reader = dataset, reader
        self._kept: OrderedDict[tuple[int, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, row: int) -> tuple[int, bytes]:
        """(first byte, bytes of the shard from there on) that hold a sample."""
        index, rows = self._dataset.index(shard)
        parts = index.parts(int(rows[row]))
        begin, end = parts[0].offset, max(part.offset + part.size for part in parts)
        # a compressed shard is unpacked from its first byte for every block
        size = _COMPRESSED_BLOCK if index.compressed else _BLOCK
        blocks = [self._block(shard, number, size, index) for number in range(begin // size, -(-end // size))]
        return begin // size * size, b"".join(blocks)

    def _block(self, shard: int, number: int, size: int, index: ShardIndex) -> bytes:
        with self._lock:
            future = self._kept.get((shard, number))
            mine = future is None
            if future is None:
                future = self._kept[shard, number] = Future()
                while len(self._kept) > _BLOCKS_KEPT:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end((shard, number))
        if mine:
            try:
                end = int(index.spans()[1].max())
                future.set_result(self._reader.read_range(shard, number * size, min((number + 1) * size, end)))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def open_source(kind: str, source: str, config: DataConfig) -> Source:
    """The source that prepare.kind and prepare.source name. Raises `DataError` when there is none."""
    if kind == "folder":
        return FolderSource(source)
    return TableSource(source) if kind == "table" else ShardSource(source, config)


def _json(member: bytes | None) -> dict[str, Any]:
    try:
        return read_json(member)
    except BadSample:
        return {}  # the picture and its .txt are good without it


def _is_picture(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample("missing_image", f"{path}: {error.strerror}") from error


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def _look(picture: Path) -> str:
    """What shows that a picture, its .txt or its .json is another one: a corrected caption may be as long as before."""
    texts = (picture.with_suffix(ending) for ending in (".txt", ".json"))
    return " ".join(
        [str(_size(picture)), *(f"{_size(text)} {text.stat().st_mtime_ns}" for text in texts if text.is_file())]
    )


def _bytes_or_none(path: Path) -> bytes | None:
    return _read(path) if path.is_file() else None


def _read_table(path: Path, texts: tuple[str, ...]) -> Any:
    """The whole table; columns of a text file with these names (in any case) are text, whatever they look like."""
    import pyarrow as pa

    try:
        if path.suffix.lower() in (".csv", ".tsv"):
            from pyarrow import csv

            tabs = csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True)
            with csv.open_csv(path, parse_options=tabs) as opened:
                names = opened.schema.names
            plain = dict.fromkeys((name for name in names if name.lower() in texts), pa.binary())
            return csv.read_csv(path, parse_options=tabs, convert_options=csv.ConvertOptions(column_types=plain))
        from pyarrow import parquet

        return parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"prepare.source={path}: it is no table that can be read ({error})") from error


def _plain(value: Any) -> Any:
    """A value of a table as JSON has it."""
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return str(value)


def dump_json(meta: Mapping[str, Any]) -> bytes:
    """The .json member: ASCII, the same bytes for the same values."""
    return json.dumps(dict(meta), ensure_ascii=True).encode()


def _hash(lines: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
