"""`cascade embed`: computes the text embeddings of a data set once, in one sidecar file per shard.

Every caption that `data.captions` may choose is embedded. Finished sidecars are kept, so an interrupted run resumes.
Shards are divided by `part` and `parts`, among the tasks of a Slurm array, and among the processes of a launcher or,
without one, `cluster.processes` processes of this machine (default: one per GPU).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from data_pipeline.common.progress import progress
from data_pipeline.config import CaptionConfig
from data_pipeline.content.captions import FROM_FILES, candidates
from data_pipeline.content.members import more_captions
from data_pipeline.reading.sequential import PartReader
from data_pipeline.shards.caption_files import CaptionFiles, captions_hash
from data_pipeline.shards.dataset import patience_of
from data_pipeline.shards.embeddings import Sidecar, SidecarWriter, sidecar_url
from data_pipeline.shards.index import Part, ShardIndex
from data_pipeline.shards.mixture import entries_of
from data_pipeline.shards.tar import MAX_TEXT
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
from training.text.identity import identity

if TYPE_CHECKING:
    from training.config.commands import EmbedCommand
    from training.text.encoder import TextEncoder


def main(config: EmbedCommand) -> dict[str, Any]:
    """Run `cascade embed`, in the processes of a launcher or in `cluster.processes` processes of this machine.

    Returns:
        Counts for this run: "shards", "captions" embedded, "kept" sidecars that were already complete, "bytes" written.

    Raises:
        ConfigError: `part` is not below `parts`.
        DataError: a shard or the encoder cannot be read, or the output has a sidecar made with other settings.
    """
    return in_processes("training.commands.embed", config, _embed_share)


def _embed_share(config: EmbedCommand) -> dict[str, Any]:
    from training.text.encoder import build_text_encoder

    patience = patience_of(config.data)
    shards = entries_of(config.data)
    places = [sidecar_url(entry.url, _folder(config.output, name)) for name, entry, _ in shards]
    refuse_equal_names([entry.url for _, entry, _ in shards], places, "sidecar")
    part, parts = share(config.part, config.parts)
    mine, rank = list(zip(shards, places, strict=True))[part::parts], ranks_of()
    facts = {"encoder": identity(config.text), "dtype": config.dtype}
    for number in first_and_last(places):
        _check_kept(places[number], {**facts, "captions": _of_captions(shards[number][2].captions)})
    remove_leftovers(places[part::parts])
    done: dict[str, Any] = {"shards": len(mine), "captions": 0, "kept": 0, "bytes": 0}
    encoder: TextEncoder | None = None
    for (_, entry, data), place in progress(mine, desc="embed", unit="shard", disable=rank[0] > 0):
        index = index_of(entry, data, patience)
        made_of = {**facts, "captions": {**_of_captions(data.captions), **_of_files(data.captions, entry.url)}}
        made_of |= {"shard": store.basename(entry.url), "digest": index.digest}
        if store.exists(place):
            _check_kept(place, made_of)
            done["kept"] += 1
            continue
        if encoder is None:
            encoder = build_text_encoder(config.text, own_device(config.cluster, *rank[:2]))
        with PartReader(entry, index.compressed, patience) as reader:
            texts = _texts(index, reader, data.captions, CaptionFiles(data.captions.files, {entry.url: index.digest}))
            done["captions"] += _embed(texts, encoder, place, made_of, config)
        done["bytes"] += store.size(place)
    return done


def _folder(output: str | None, dataset: str) -> str | None:
    """Return the folder for the sidecars of a data set; each data set of a mixture has its own."""
    return store.join(output, dataset) if output and dataset else output


def _texts(
    index: ShardIndex, reader: PartReader, config: CaptionConfig, files: CaptionFiles
) -> Iterator[tuple[str, str]]:
    """Yield (key, caption) for every caption of every sample, in archive order."""
    for row in range(len(index)):
        found = index.parts(row)
        names = ("txt", "json", *more_captions((part.extension for part in found), config.members))
        texts = [part for part in found if part.extension in names]
        parts = [part for part in texts if part.size <= MAX_TEXT]  # training ignores larger ones, too
        key = index.key(row)
        sample: dict[str, Any] = {part.extension: reader.read(part) for part in sorted(parts, key=_place)}
        sample[FROM_FILES] = files.of(index.url, key)
        for caption in candidates(sample, config):
            yield key, caption


def _place(part: Part) -> int:
    return part.offset


def _embed(
    texts: Iterator[tuple[str, str]], encoder: TextEncoder, place: str, facts: dict[str, Any], config: EmbedCommand
) -> int:
    """Write one sidecar; return its number of captions."""
    writer = SidecarWriter(place, facts, encoder.dim, config.dtype)
    count = 0
    for group in in_groups(texts, 16 * config.batch):
        by_length = sorted(range(len(group)), key=lambda i: len(group[i][1]))  # less padding in each batch
        rows: dict[int, Any] = {}
        for start in range(0, len(group), config.batch):
            numbers = by_length[start : start + config.batch]
            text, mask = encoder.encode([group[i][1] for i in numbers])
            lengths = mask.sum(dim=1).tolist()
            values = text.cpu().numpy()
            rows.update({i: values[n, : lengths[n]].copy() for n, i in enumerate(numbers)})
        for number, (key, caption) in enumerate(group):
            writer.add(key, caption, rows[number])
        count += len(group)
    writer.close()
    return count


def _of_captions(config: CaptionConfig) -> dict[str, Any]:
    """Return the settings that determine which captions are embedded."""
    sources = sorted(source for source, weight in config.weights.items() if weight > 0)
    encoding = {"encoding": config.encoding} if config.encoding else {}
    return {"sources": sources, "clean": config.clean, "max_characters": config.max_characters, **encoding}


def _of_files(config: CaptionConfig, shard: str) -> dict[str, Any]:
    """Return the hash of each file of captions of a shard: captions that have changed have to be embedded again."""
    hashes = {name: captions_hash(shard, folder) for name, folder in sorted(config.files.items())}
    return {"files": hashes} if hashes else {}


def _check_kept(place: str, made_of: Mapping[str, Any]) -> None:
    found = Sidecar(place).facts
    facts = {"captions": made_of["captions"], **found}  # older sidecars do not record them
    differing = [_SAID[name] for name in _SAID if name in made_of and facts.get(name) != made_of[name]]
    captions = facts["captions"]
    differing += [
        f"data.captions.{name}"
        for name in dict.fromkeys([*made_of["captions"], *captions])
        if captions.get(name) != made_of["captions"].get(name) and (name != "files" or "digest" in made_of)
    ]
    refuse_other(place, differing)


_SAID = {"digest": "content of the shard", "encoder": "text encoder", "dtype": "dtype"}
"""Fact -> what it is called in messages."""
