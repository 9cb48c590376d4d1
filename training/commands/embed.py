"""`cascade embed`: computes the text embeddings of a data set once, into one sidecar file per shard.

Every caption that `data.captions` may choose is embedded. Finished sidecars stay, so a broken-off run continues. Shards
are shared out by `part` and `parts`, by the tasks of a Slurm array, and by the processes of a launcher; without one, by
`cluster.processes` on this machine (as many as it has GPUs).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.progress import progress
from data_pipeline.config import CaptionConfig
from data_pipeline.content.captions import candidates
from data_pipeline.reading.sequential import PartReader
from data_pipeline.shards.dataset import patience_of
from data_pipeline.shards.embeddings import Sidecar, SidecarWriter, sidecar_url
from data_pipeline.shards.index import ShardIndex, build_index, load_index
from data_pipeline.shards.mixture import entries_of
from data_pipeline.shards.tar import MAX_MEMBER
from data_pipeline.storage import store
from training.processes.launcher import launch
from training.processes.ranks import process_count
from training.text.identity import identity

if TYPE_CHECKING:
    from training.config.commands import EmbedCommand
    from training.text.encoder import TextEncoder

_RESULTS = "CASCADE_EMBED_RESULTS"
"""Directory in which the processes of one command leave what they did."""


def main(config: EmbedCommand) -> dict[str, Any]:
    """Runs `cascade embed`, in as many processes as a launcher or `cluster.processes` says.

    Returns:
        {"shards": of this start, "captions": embedded, "kept": sidecars that were complete, "bytes": written}

    Raises:
        ConfigError: `part` is not below `parts`.
        DataError: a shard or the encoder cannot be read, or a sidecar of other settings is in the way.
    """
    launched = "RANK" in os.environ or os.environ.get("CASCADE_SRUN") == "1"
    if not launched and process_count(config.cluster) > 1:
        return _in_processes(config)
    done = _embed_share(config)
    if _RESULTS in os.environ:
        Path(os.environ[_RESULTS], os.environ["RANK"]).write_text(json.dumps(done))
    return done


def _in_processes(config: EmbedCommand) -> dict[str, Any]:
    """The command in several processes of this machine, and the sum of what they did."""
    with tempfile.TemporaryDirectory(prefix="cascade-embed-") as folder:
        os.environ[_RESULTS] = folder
        try:
            launch("training.commands.embed", config)
        finally:
            del os.environ[_RESULTS]
        total: Counter[str] = Counter()
        for file in Path(folder).iterdir():
            total.update(json.loads(file.read_text()))
        return dict(total)


def _embed_share(config: EmbedCommand) -> dict[str, Any]:
    import torch

    from training.text.encoder import build_text_encoder

    patience = patience_of(config.data)
    shards = entries_of(config.data)
    _refuse_equal_names([(entry.url, _folder(config.output, name)) for name, entry, _ in shards])
    part, parts = share(config.part, config.parts, os.environ)
    mine = shards[part::parts]
    facts = {"encoder": identity(config.text), "dtype": config.dtype}
    done: dict[str, Any] = {"shards": len(mine), "captions": 0, "kept": 0, "bytes": 0}
    encoder: TextEncoder | None = None
    quiet = _ranks(os.environ)[0] > 0
    for name, entry, data in progress(mine, desc="embed", unit="shard", disable=quiet):
        index = load_index(entry.url, data.index_dir, entry, patience, data.members)
        if index is None:
            index = build_index(entry, data.index_dir, patience, data.members)
        place = sidecar_url(entry.url, _folder(config.output, name))
        made_of = {**facts, "captions": _of_captions(data.captions)}
        made_of |= {"shard": store.basename(entry.url), "digest": index.digest}
        if store.exists(place):
            _check_kept(place, made_of)
            done["kept"] += 1
            continue
        device = f"cuda:{_ranks(os.environ)[1]}" if torch.cuda.is_available() else "cpu"
        encoder = encoder or build_text_encoder(config.text, device)
        with PartReader(entry, index.compressed, patience) as reader:
            done["captions"] += _embed(_texts(index, reader, data.captions), encoder, place, made_of, config)
        done["bytes"] += store.size(place)
    return done


def _folder(output: str | None, dataset: str) -> str | None:
    """Where the sidecars of a data set go: those of a mixture into a folder for each."""
    return store.join(output, dataset) if output and dataset else output


def share(part: int, parts: int, environment: Mapping[str, str]) -> tuple[int, int]:
    """(this process's part, parts in all), after the Slurm array and the launcher have divided it further.

    Raises:
        ConfigError: `part` is not below `parts`.
    """
    if not 0 <= part < parts:
        raise ConfigError(f"part={part}: it must lie between 0 and parts={parts} less 1")
    if "SLURM_ARRAY_TASK_COUNT" in environment and parts == 1:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = max(int(environment.get("SLURM_ARRAY_TASK_STEP", "1")), 1)
        part = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
        parts = int(environment["SLURM_ARRAY_TASK_COUNT"])
    rank, _, world = _ranks(environment)
    return part * world + rank, parts * world


def _ranks(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, rank on its machine, processes) by a launcher's variables, or by Slurm's in a job of `cascade launch`."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "RANK" not in environment and environment.get("CASCADE_SRUN") == "1":
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    rank, local_rank, world = (int(environment.get(name, default)) for name, default in zip(names, "001", strict=True))
    return rank, local_rank, world


def _texts(index: ShardIndex, reader: PartReader, config: CaptionConfig) -> Iterator[tuple[str, str]]:
    """(key, caption) of every caption of every sample, in archive order; samples without one are not trained on."""
    for row in range(len(index)):
        limits = {"txt": math.inf, "json": MAX_MEMBER}  # training does not look at larger ones, either
        parts = [part for part in index.parts(row) if part.size <= limits.get(part.extension, -1)]
        sample = {part.extension: reader.read(part) for part in sorted(parts, key=lambda part: part.offset)}
        key = index.key(row)
        for caption in candidates(sample, config):
            yield key, caption


def _embed(
    texts: Iterator[tuple[str, str]], encoder: TextEncoder, place: str, facts: dict[str, Any], config: EmbedCommand
) -> int:
    """Writes one sidecar; returns how many captions it holds."""
    writer = SidecarWriter(place, facts, encoder.dim, config.dtype)
    count = 0
    for group in _groups(texts, 16 * config.batch):
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


def _groups(items: Iterator[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    group: list[tuple[str, str]] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _of_captions(config: CaptionConfig) -> dict[str, Any]:
    """The settings that decide which texts there are."""
    sources = sorted(source for source, weight in config.weights.items() if weight > 0)
    return {"sources": sources, "clean": config.clean, "max_characters": config.max_characters}


def _check_kept(place: str, made_of: Mapping[str, Any]) -> None:
    facts = {"captions": made_of["captions"], **Sidecar(place).facts}  # older ones do not say
    differing = [name for name in ("digest", "encoder", "dtype", "captions") if facts.get(name) != made_of[name]]
    if differing:
        raise DataError(
            f"{place}: it was made with another {' and '.join(differing)}; remove it or choose another output"
        )


def _refuse_equal_names(shards: list[tuple[str, str | None]]) -> None:
    """Raises DataError where two of the shards (URL, folder of the sidecars) would write one file."""
    places: dict[str, str] = {}
    for url, folder in shards:
        place = sidecar_url(url, folder)
        other = places.get(place)
        places[place] = url
        if other is not None:
            raise DataError(f"{url} and {other} would share one sidecar; embed them into different outputs")
