"""Sources of pictures and captions: a folder, a table or existing shards, each as a numbered list of samples."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from data_pipeline.commands.prepare_folder import FolderSource
from data_pipeline.commands.prepare_item import Item, Source, refuse_unsupported, several_captions
from data_pipeline.commands.prepare_table import TableSource
from data_pipeline.common.errors import BadSample, DataError, about
from data_pipeline.common.recent import Recent
from data_pipeline.config import DataConfig, PrepareConfig
from data_pipeline.content.captions import decode_text, no_caption, read_json_or_nothing
from data_pipeline.content.members import IMAGE_EXTENSIONS, ending, more_captions
from data_pipeline.reading.rows import Run, runs_of
from data_pipeline.shards.index import ShardIndex

if TYPE_CHECKING:
    from data_pipeline.reading.rows import RowReader
    from data_pipeline.shards.dataset import Dataset

__all__ = ["FolderSource", "ShardSource", "TableSource", "open_source"]

logger = logging.getLogger(__name__)

_BLOCK, _COMPRESSED_BLOCK, _BLOCKS_KEPT = 8 << 20, 128 << 20, 4


class ShardSource:
    """The samples of existing shards that pass `data.filter`, in order.

    Args:
        output: where they are written to.

    Raises:
        DataError: the shards are missing or not tar archives, some are in the output, or no sample is left.
    """

    def __init__(self, shards: str, config: DataConfig, output: str) -> None:
        import numpy as np

        from data_pipeline.reading.rows import RowReader
        from data_pipeline.shards.dataset import load_or_build, patience_of
        from data_pipeline.storage import store

        with about("prepare.source"):
            urls = store.expand(shards, patience_of(config))
            if own := _inside(urls, output):
                some = f"{len(own)} shard{'s' * (len(own) > 1)}"
                raise DataError(
                    f"{shards} also matches {some} in prepare.output={output}, such as {own[0]}; name only those to "
                    f"read, or choose another prepare.output"
                )
            self.dataset = load_or_build(urls, config, every_caption=True)
        self.reader = RowReader(self.dataset, config)
        self._blocks = _Blocks(self.dataset, self.reader)
        self.identity = self.dataset.fingerprint
        self._left_out: set[str] = set()
        self._names, self._encoding, self._several = config.members, config.captions.encoding, set[int]()
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
            sample = self.reader.sample_from(shard, row, self._blocks.read(shard, row))
        extension = next((name for name in IMAGE_EXTENSIONS if name in sample), None)
        if extension is None:
            raise BadSample("missing_image", "no member is a picture")
        refuse_unsupported(sample[extension])
        facts = read_json_or_nothing(sample.get("json"))
        others = more_captions(sorted(name for name in sample if not name.startswith("__")), ["*"])
        if others and "txt" in sample and "captions" not in facts and not self._names.caption:
            others = [name for name in others if ending(name) != "json"]
            texts = dict.fromkeys(text for name in ("txt", *others) if (text := sample[name]).strip())
            texts = {text: None for text in texts if not no_caption(text.decode("utf-8", "replace"))}
            if len(texts) > 1:
                facts["captions"] = [decode_text(text, self._encoding) for text in texts]
                self._several.add(number)
        else:
            others = []
        for other in {*sample} - {extension, "txt", "json", *others} - self._left_out:
            if not other.startswith("__"):
                self._left_out.add(other)
                logger.warning("members .%s are dropped: only a picture, its captions and its .json are written", other)
        key = str(sample["__key__"]).rpartition("/")[2].replace(".", "_")
        return Item(self.name(number), key, extension, sample[extension], sample.get("txt"), facts)

    def advice(self, reason: str) -> str:
        return "look at the shards with `cascade verify`"

    def remarks(self) -> list[str]:
        return several_captions(len(self._several))

    def _is_scattered(self, shard: int, row: int) -> bool:
        """Return whether blocks would read far more than the sample. Compressed shards always use blocks."""
        index, rows = self.dataset.index(shard)
        return not index.compressed and len(runs_of(self.reader.places(index, int(rows[row])))) > 1


class _Blocks:
    """Reads remote or compressed shards in large blocks, because samples are requested roughly in order."""

    def __init__(self, dataset: Dataset, reader: RowReader) -> None:
        self._dataset, self._reader = dataset, reader
        self._kept: Recent[tuple[int, int], Future[bytes]] = Recent(_BLOCKS_KEPT)
        self._lock = threading.Lock()

    def read(self, shard: int, row: int) -> list[Run]:
        """Return runs of the shard, (first byte, bytes), that contain a sample."""
        index, rows = self._dataset.index(shard)
        # Every block of a compressed shard is unpacked from the first byte on, so blocks must be large.
        size = _COMPRESSED_BLOCK if index.compressed else _BLOCK
        found = []
        for begin, end in runs_of(self._reader.places(index, int(rows[row]))):
            numbers = range(begin // size, max(-(-end // size), begin // size + 1))
            first = numbers[0] * size
            blocks = [self._block(shard, number, size, index) for number in numbers]
            cut = [block[max(begin - first - n * size, 0) : end - first - n * size] for n, block in enumerate(blocks)]
            found.append((begin, b"".join(cut)))
        return found

    def _block(self, shard: int, number: int, size: int, index: ShardIndex) -> bytes:
        with self._lock:
            future = self._kept.get((shard, number))
            mine = future is None
            if future is None:
                future = self._kept.put((shard, number), Future())
        if mine:
            try:
                end = int(index.spans()[1].max())
                future.set_result(self._reader.read_range(shard, number * size, min((number + 1) * size, end)))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def _inside(urls: Sequence[str], folder: str) -> list[str]:
    """Return the URLs or paths that lie in a folder or prefix."""
    from data_pipeline.storage import store

    def plain(place: str) -> str:
        return place if store.is_remote(place) else os.path.realpath(store.local_path(place))

    top = plain(folder).rstrip("/") + "/"
    return [url for url in urls if plain(url).startswith(top)]


def open_source(settings: PrepareConfig, config: DataConfig) -> Source:
    """Open the source given by prepare.kind and prepare.source. Raises `DataError` if it cannot be read."""
    source = str(settings.source)
    if settings.kind == "folder":
        return FolderSource(source, config.members, settings.captions, config.captions.encoding)
    if settings.kind == "table":
        return TableSource(source, config.members, settings.images, config.captions.encoding)
    if source.lower().endswith((".zip", ".rar", ".7z")):
        raise DataError(f"prepare.source={source}: it is not a tar archive: unpack it and use prepare.kind=folder")
    return ShardSource(source, config, str(settings.output))
