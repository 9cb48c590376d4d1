"""`cascade caption`: captions the pictures of shards with a local vision-language model, one file per shard.

The shards are not changed: `data.captions.files={NAME: OUTPUT}` and the source `file:NAME` mix the new captions with
the others. Finished files are kept, so an interrupted run resumes; shards are divided as by `cascade embed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_pipeline.common.errors import BadSample, ConfigError
from data_pipeline.common.progress import progress
from data_pipeline.config import DataConfig
from data_pipeline.content import images
from data_pipeline.reading.sequential import PartReader
from data_pipeline.shards.caption_files import caption_file_url, read_captions, write_captions
from data_pipeline.shards.dataset import keep_rows, patience_of
from data_pipeline.shards.index import IMAGE_EXTENSIONS, ShardIndex
from data_pipeline.shards.mixture import entries_of
from data_pipeline.storage import store
from training.commands.sharing import (
    first_and_last,
    in_groups,
    in_processes,
    index_of,
    refuse_equal_names,
    refuse_other,
    remove_leftovers,
)
from training.processes.devices import own_device
from training.processes.ranks import ranks_of, share
from training.text.identity import folder_hash

if TYPE_CHECKING:
    from PIL import Image

    from training.config.commands import CaptionCommand
    from training.text.captioner import Captioner


def main(config: CaptionCommand) -> dict[str, Any]:
    """Run `cascade caption`, in the processes of a launcher or in `cluster.processes` processes of this machine.

    Returns:
        Counts for this run: "shards", "captions" written, "kept" files that were already complete, "bad" pictures that
        cannot be decoded and get no caption, "bytes" written.

    Raises:
        ConfigError: vlm.path or output is not set.
        DataError: a shard or the model cannot be read, or the output has a file made with other settings.
    """
    if not config.vlm.path:
        raise ConfigError("vlm.path: it is not set; give the directory of a vision-language model")
    if not config.output:
        raise ConfigError("output: it is not set; give a directory or s3:// prefix for the captions")
    return in_processes("training.commands.caption", config, _caption_share)


def _caption_share(config: CaptionCommand) -> dict[str, Any]:
    import transformers

    from training.text.captioner import Captioner

    settings, patience, output = config.vlm, patience_of(config.data), str(config.output)
    shards = entries_of(config.data)
    places = [caption_file_url(entry.url, _folder_of(output, name)) for name, entry, _ in shards]
    refuse_equal_names([entry.url for _, entry, _ in shards], places, "caption file")
    part, parts = share(config.part, config.parts)
    mine, rank = list(zip(shards, places, strict=True))[part::parts], ranks_of()
    made_by = {
        "model": os.path.basename(os.path.normpath(str(settings.path))),
        "sha": folder_hash(str(settings.path), "vlm.path"),
        "prompt": settings.prompt,
        "max_tokens": settings.max_tokens,
        "side": settings.side,
        "dtype": settings.dtype,
    }
    for number in first_and_last(places):
        _check_same(places[number], {**made_by, **_of_data(shards[number][2])})
    remove_leftovers(places[part::parts])
    done = {"shards": len(mine), "captions": 0, "kept": 0, "bad": 0, "bytes": 0}
    captioner: Captioner | None = None
    for (_, entry, data), place in progress(mine, desc="caption", unit="shard", disable=rank[0] > 0):
        index = index_of(entry, data, patience, bool(data.filter.licences))
        facts = {**made_by, **_of_data(data), "shard": store.basename(entry.url), "digest": index.digest}
        if store.exists(place):
            _check_same(place, facts)
            done["kept"] += 1
            continue
        if captioner is None:
            device = own_device(config.cluster, *rank[:2])
            captioner = Captioner(
                str(settings.path), settings.prompt, max_tokens=settings.max_tokens, dtype=settings.dtype, device=device
            )
        rows: list[tuple[str, str]] = []
        with PartReader(entry, index.compressed, patience) as reader:
            for group in in_groups(_pictures(index, reader, data, settings.side, done), config.batch):
                texts = captioner.describe([picture for _, picture in group])
                rows += [(key, text) for (key, _), text in zip(group, texts, strict=True) if text]
        done["bytes"] += write_captions(place, rows, {**facts, "transformers": transformers.__version__})
        done["captions"] += len(rows)
    return done


def _folder_of(output: str, dataset: str) -> str:
    return store.join(output, dataset) if dataset else output


def _pictures(
    index: ShardIndex, reader: PartReader, data: DataConfig, side: int, done: dict[str, int]
) -> Iterator[tuple[str, Image.Image]]:
    """Yield (key, picture) of the samples that pass data.filter, in archive order; pictures that cannot be decoded are
    counted in `done` and skipped."""
    from PIL import Image

    for row in keep_rows(index, data.filter)[0].tolist():
        parts = {part.extension: part for part in index.parts(row)}
        picture = next(parts[name] for name in IMAGE_EXTENSIONS if name in parts)
        try:
            orientation = images.orientation_from_json(reader.read(parts["json"]) if "json" in parts else None)
            pixels = images.decode(
                reader.read(picture), side, 1.0, data.max_pixels, data.background, orientation, data.srgb
            )
        except BadSample:
            done["bad"] += 1
            continue
        shown = Image.fromarray(pixels)
        shown.thumbnail((2 * side, 2 * side))  # limits the cost of a panorama
        yield index.key(row), shown


def _of_data(data: DataConfig) -> dict[str, Any]:
    """Return the settings that decide which pictures are captioned and how they look, unless they are the defaults."""
    default = DataConfig()
    looks = {name: getattr(data, name) for name in _LOOKS if getattr(data, name) != getattr(default, name)}
    return {"filter": data.filter.in_force(), **looks}


def _check_same(place: str, facts: dict[str, Any]) -> None:
    made = {"filter": {}, **dict.fromkeys(_LOOKS), **read_captions(place)[1]}  # earlier versions did not record these
    wanted = {**dict.fromkeys(_LOOKS), **facts}
    differing = [said for name, said in _SAID.items() if name in wanted and made.get(name) != wanted[name]]
    refuse_other(place, differing)


_LOOKS = ("max_pixels", "background", "srgb")
_SAID = {
    **{"sha": "model", "prompt": "vlm.prompt", "max_tokens": "vlm.max_tokens", "side": "vlm.side"},
    **{"dtype": "vlm.dtype", "filter": "data.filter", "digest": "content of the shard"},
    **{name: f"data.{name}" for name in _LOOKS},
}
"""Fact -> what it is called in messages."""
