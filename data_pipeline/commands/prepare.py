"""`cascade prepare`: draws, imports or repacks data into WebDataset shards with an index beside each.

The output depends only on the input and the settings: sample i of the source goes to shard i // samples_per_shard
unless it is dropped. Existing shards are therefore complete and kept, an interrupted run can be resumed, and settings
other than those an output was started with are an error. Progress is recorded in OUTPUT/.prepare; OUTPUT/dropped.jsonl
lists dropped samples and reasons.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from data_pipeline.common.errors import NO_FILE, BadSample, ConfigError, DataError, dropped_remark, system_words
from data_pipeline.common.ordered import ordered
from data_pipeline.common.progress import progress
from data_pipeline.common.terminal import print_result
from data_pipeline.config import CaptionConfig, DataConfig, DrawConfig, PrepareConfig
from data_pipeline.content.captions import (
    decode_text,
    fields_with_text,
    first_caption,
    is_blank,
    json_caption,
    no_caption,
)
from data_pipeline.content.members import CAPTION_ENDINGS
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage import store

if TYPE_CHECKING:
    from data_pipeline.commands.prepare_duplicates import Duplicate, Print
    from data_pipeline.commands.prepare_item import Item, Source

logger = logging.getLogger(__name__)

VERSION = 1
DROPPED = "dropped.jsonl"
_AHEAD_PER_THREAD = 4
"""Samples made ahead per thread: one that takes long, such as a large picture, must not idle the other threads."""
_LONGEST = 500
"""Most characters of a name or detail in the report."""

Made = tuple[str, dict[str, bytes]]
"""Key and members of a finished sample."""


class PrepareSettings(Protocol):
    """The settings of the command that are read here."""

    seed: int
    json: bool
    data: DataConfig
    prepare: PrepareConfig


def main(config: PrepareSettings) -> dict[str, Any]:
    """Run `cascade prepare`; print the result as a line of JSON, or readable lines in a terminal.

    Returns:
        {"output": .., "shards": .., "samples": .., "dropped": {reason: count}}; for drawings and with prepare.heldout
        also "heldout" and "heldout_shards".

    Raises:
        DataError: the source cannot be read, the output cannot be written or contains something else, or every sample
            was dropped.
    """
    settings = config.prepare
    with _naming("output", settings.output):
        if settings.kind == "draw":
            result = _draw(settings.draw, settings.output, config.seed)
        else:
            result = _import(settings, config)
    result.pop("why", None)
    if not config.json:
        print_result(result)
    if result["dropped"] and not result["samples"]:
        raise DataError(f"{settings.output}: every sample was dropped; {DROPPED} there lists the reasons")
    return result


@contextmanager
def _naming(key: str, value: str | None) -> Iterator[None]:
    """Make errors of the system name a setting of this command, unless no file is to blame.

    Raises:
        DataError: a file cannot be read or written.
        OSError: this machine has run out of something.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_FILE:
            raise
        raise DataError(f"prepare.{key}={value}: {error.filename or value}: {system_words(error)}") from error


# ------------------------------------------------------------------------------------------------------ drawings


def _draw(draw: DrawConfig, output: str, seed: int) -> dict[str, Any]:
    train = _draw_split(draw, store.join(output, "train"), "train", draw.count, seed)
    heldout = _draw_split(draw, store.join(output, "heldout"), "heldout", draw.heldout, seed)
    return {**train, "output": output, "heldout": heldout["samples"], "heldout_shards": heldout["shards"]}


def _draw_split(draw: DrawConfig, output: str, split: str, count: int, seed: int) -> dict[str, Any]:
    from PIL import Image

    from data_pipeline.content.synthetic import caption, example

    def make(number: int) -> Made:
        picture, spec = example(number, draw.size, seed, split == "heldout", draw.objects)
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, "PNG")
        text = caption(spec)
        facts = {"caption": text, "width": draw.size, "height": draw.size, **spec.to_json()}
        return f"{number:09d}", {"png": encoded.getvalue(), "txt": text.encode(), "json": json.dumps(facts).encode()}

    _begin(
        output,
        {
            "draw": split,
            "size": draw.size,
            "objects": draw.objects,
            "count": count,
            "seed": seed,
            "samples_per_shard": draw.samples_per_shard,
        },
    )
    return _write_all(output, f"{split}-", range(count), draw.samples_per_shard, make, f"drawing {split}")


# ------------------------------------------------------------------------------------------------------- imports


def _import(settings: PrepareConfig, config: PrepareSettings) -> dict[str, Any]:
    from data_pipeline.commands.prepare_sources import open_source

    if members := config.data.captions.members:
        raise ConfigError(
            f"data.captions.sources: cascade prepare does not read member:{members[0]}; "
            f"choose it with 'data.members={{caption: [{members[0]}]}}'"
        )
    with _naming("source", settings.source):
        source = open_source(settings, config.data)
    if settings.heldout >= len(source) > 0:  # before anything is recorded in the output
        words = f"the source has {len(source)} samples; hold out fewer, so that some are left to train on"
        raise DataError(f"prepare.heldout={settings.heldout}: {words}")
    begun = _begun(settings, config.data, source.identity)
    _begin(settings.output, begun)
    duplicates: dict[int, Duplicate] = {}
    if settings.deduplicate != "none":
        duplicates = _find_duplicates(source, settings, config.data)

    def make(number: int) -> Made:
        if number in duplicates:
            same = duplicates[number]
            how = "the same bytes" if same.bits is None else f"it shows the same: {same.bits} of 128 bits differ"
            raise BadSample("duplicate", f"of {source.name(same.of)} ({how})")
        return _finish(source.read(number), settings, config.data)

    result = _write_splits(settings, begun, source, make, config.data.threads)
    for remark in [*source.remarks(), _dropped_remark(source, result)]:
        if remark:
            logger.warning("%s", remark)
    return result


def _begun(settings: PrepareConfig, data: DataConfig, content: str) -> dict[str, Any]:
    """Return what an import of `content` depends on. Settings that were added later appear only if they are in use, so
    that older outputs can still be continued."""
    later = {
        "members": data.members.tag,
        "captions": settings.captions if settings.captions != "files" else "",
        "encoding": data.captions.encoding,
        "sources": data.captions.sources,
        "heldout": settings.heldout,
    }
    return {
        "kind": settings.kind,
        "content": content,
        "max_side": settings.max_side,
        "quality": settings.quality,
        "samples_per_shard": settings.samples_per_shard,
        "deduplicate": settings.deduplicate,
        "max_pixels": data.max_pixels,
        **{name: value for name, value in later.items() if value},
    }


def _write_splits(
    settings: PrepareConfig, begun: dict[str, Any], source: Source, make: Callable[[int], Made], threads: int
) -> dict[str, Any]:
    """Write everything to one place or, with prepare.heldout, training and held-out samples to two."""
    numbers, per_shard = range(len(source)), settings.samples_per_shard
    if not settings.heldout:
        return _write_all(settings.output, "", numbers, per_shard, make, "prepare", source.name, threads)
    apart = {(2 * i + 1) * len(numbers) // (2 * settings.heldout) for i in range(settings.heldout)}
    found = []
    for split, chosen in (("train", [n for n in numbers if n not in apart]), ("heldout", sorted(apart))):
        place = store.join(settings.output, split)
        _begin(place, {**begun, "split": split})
        found.append(_write_all(place, "", chosen, per_shard, make, f"prepare {split}", source.name, threads))
    train, heldout = found
    dropped = Counter(train["dropped"]) + Counter(heldout["dropped"])
    return {
        **train,
        "output": settings.output,
        "heldout": heldout["samples"],
        "heldout_shards": heldout["shards"],
        "dropped": dict(sorted(dropped.items())),
        "why": {**heldout["why"], **train["why"]},
    }


def _dropped_remark(source: Source, result: dict[str, Any]) -> str:
    """Return a remedy if most samples were dropped for one reason; empty otherwise."""
    total = result["samples"] + sum(result["dropped"].values())
    return dropped_remark(result["dropped"], total, lambda reason: source.advice(reason) or result["why"][reason])


def _finish(item: Item, settings: PrepareConfig, data: DataConfig) -> Made:
    """Return the key and the members to write: the picture, shrunk if necessary, its caption and its metadata."""
    from data_pipeline.commands.prepare_item import dump_json
    from data_pipeline.content.images import check_size, dimensions

    width, height = dimensions(item.image)
    check_size(width, height, data.max_pixels)
    meta, image, extension = dict(item.meta), item.image, item.extension
    if settings.max_side and max(width, height) > settings.max_side:
        image, (meta["width"], meta["height"]) = _shrink(item, settings, data.max_pixels)
        extension = "jpg"
        meta.setdefault("original_width", width)
        meta.setdefault("original_height", height)
        meta.pop("exif", None)  # its orientation has been applied to the pixels
    else:
        meta["width"], meta["height"] = width, height
    text = _caption(item, data.captions)
    return item.key, {extension: image, "txt": text.encode("utf-8", "ignore"), "json": dump_json(meta)}


def _caption(item: Item, config: CaptionConfig) -> str:
    if config.sources:
        from data_pipeline.commands.prepare_item import dump_json

        return first_caption({"txt": item.caption, "json": dump_json(item.meta)}, config)
    text = decode_text(item.caption, config.encoding) if item.caption else ""
    why_not = no_caption(text)
    if not is_blank(text) and not why_not:
        return text
    found = json_caption(item.meta)
    if found is None:
        looked = ", ".join(f".{ending}" for ending in CAPTION_ENDINGS)
        fields = [name for name in fields_with_text(item.meta) if name != "source"]
        known = f"; its fields with text are {', '.join(fields[:8])}" if fields else ""
        how = f"; 'data.captions.sources={{\"json:{fields[0]}\": 1}}' would use the first" if fields else ""
        beside = why_not or f"no text beside it ({looked})"
        raise BadSample("missing_caption", f"{beside}; there is no caption in its .json or row{known}{how}")
    return found[1][0]


def _shrink(item: Item, settings: PrepareConfig, max_pixels: int) -> tuple[bytes, tuple[int, int]]:
    """Return the upright picture with a longer side of prepare.max_side as JPEG, and its (width, height)."""
    from PIL import Image

    from data_pipeline.commands.prepare_item import dump_json
    from data_pipeline.content.images import decode, orientation_from_json

    orientation = orientation_from_json(dump_json(item.meta))
    picture = Image.fromarray(decode(item.image, max_pixels=max_pixels, orientation=orientation))
    scale = (settings.max_side or 0) / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    encoded = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).save(encoded, "JPEG", quality=settings.quality)
    return encoded.getvalue(), size


def _find_duplicates(source: Source, settings: PrepareConfig, data: DataConfig) -> dict[int, Duplicate]:
    from data_pipeline.commands.prepare_duplicates import Print, find, fingerprint
    from data_pipeline.content.images import check_size, dimensions

    perceptual = settings.deduplicate == "perceptual"

    def measure(number: int) -> Print | None:
        try:
            item = source.read(number)
            width, height = dimensions(item.image)
            check_size(width, height, data.max_pixels)
            _caption(item, data.captions)
            return fingerprint(item.image, width * height, perceptual, data.max_pixels)
        except BadSample:
            return None  # it will be dropped when it is written, so no other picture may count as its duplicate

    prints: list[Print | None] = []
    ahead = _AHEAD_PER_THREAD * data.threads
    with ThreadPoolExecutor(data.threads) as pool:
        for numbers in progress(_ranges(len(source), settings.samples_per_shard), desc="comparing", unit="shard"):
            place = _record(settings.output, f"prints-{numbers.start // settings.samples_per_shard:05d}.json")
            if not store.exists(place):
                found = [one.to_json() if one else None for _, one in ordered(pool, measure, numbers, ahead)]
                store.write_bytes(place, json.dumps(found).encode())
            prints += [Print.from_json(one) if one else None for one in json.loads(store.read_bytes(place))]
    return find(prints, perceptual)


# ------------------------------------------------------------------------------------------------------- writing


def _begin(output: str, settings: dict[str, Any]) -> None:
    """Record the settings of a new output, or check that they are those of an output started before.

    Raises:
        DataError: they differ, or the output contains shards that this command did not write.
    """
    settings = {"version": VERSION, **settings}
    place = _record(output, "settings.json")
    if not store.exists(place):
        if any(name.endswith(".tar") for name in store.list_dir(output)):
            raise DataError(
                f"{output}: it contains shards that `cascade prepare` did not write; choose another prepare.output"
            )
        store.write_bytes(place, json.dumps(settings).encode())
        return
    before = json.loads(store.read_bytes(place))
    before.setdefault("max_pixels", settings.get("max_pixels"))  # not recorded by earlier versions
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        differences = ", ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in changed)
        raise DataError(
            f"{output}: it was prepared with other settings ({differences}); remove it or choose another prepare.output"
        )
    for name in store.list_dir(output):
        if name.startswith(".") and name.endswith(".tmp"):  # left by a run that was killed
            store.remove(store.join(output, name))


def _write_all(
    output: str,
    prefix: str,
    numbers: Sequence[int],
    per_shard: int,
    make: Callable[[int], Made],
    label: str,
    name: Callable[[int], str] = str,
    threads: int = 1,
) -> dict[str, Any]:
    """Write the shards that are missing, and the list of dropped samples."""
    shards, samples, dropped = 0, 0, []
    with ThreadPoolExecutor(threads) as pool, progress(total=len(numbers), desc=label, unit="sample") as bar:
        for places in _ranges(len(numbers), per_shard):
            shard = f"{prefix}{places.start // per_shard:05d}"
            done = _done(output, shard)
            if done is None:
                made = ordered(
                    pool, _Guarded(make, name), (numbers[place] for place in places), _AHEAD_PER_THREAD * threads
                )
                done = _write_shard(output, shard, _counted(made, bar))
            else:
                bar.update(len(places))
            shards += done["samples"] > 0
            samples += done["samples"]
            dropped += done["dropped"]
    if dropped:
        lines = "".join(json.dumps(line) + "\n" for line in dropped)
        store.write_bytes(store.join(output, DROPPED), lines.encode())
    reasons = Counter(line["reason"] for line in dropped)
    why = {line["reason"]: line.get("detail", "") for line in reversed(dropped)}
    return {
        "output": output,
        "shards": shards,
        "samples": samples,
        "dropped": dict(sorted(reasons.items())),
        "why": why,  # the first detail of each reason; removed by main()
    }


def _done(output: str, shard: str) -> dict[str, Any] | None:
    """Return the record of a complete shard; None if it is not complete."""
    place = _record(output, f"{shard}.json")
    if not store.exists(place):
        return None
    done: dict[str, Any] = json.loads(store.read_bytes(place))
    return done if not done["samples"] or store.exists(store.join(output, f"{shard}.tar")) else None


def _write_shard(output: str, shard: str, made: Iterator[Made | dict[str, str]]) -> dict[str, Any]:
    """Write a shard, unless all its samples were dropped, and then the record that it is complete."""
    done: dict[str, Any] = {"samples": 0, "dropped": []}
    used: dict[str, int] = {}
    writer = ShardWriter(store.join(output, f"{shard}.tar"))
    try:
        for one in made:
            if isinstance(one, dict):
                done["dropped"].append(one)
                continue
            key, members = one
            name = key
            while name in used:
                used[key] += 1
                name = f"{key}-{used[key]}"
            used[name] = 1
            writer.write(name, members)
            done["samples"] += 1
    except BaseException:
        writer.abort()
        raise
    if done["samples"]:
        writer.close()
    else:
        writer.abort()
    store.write_bytes(_record(output, f"{shard}.json"), json.dumps(done).encode())
    return done


class _Guarded:
    """Makes one sample; for a bad one, returns its line of the report instead."""

    def __init__(self, make: Callable[[int], Made], name: Callable[[int], str]) -> None:
        self.make, self.name = make, name

    def __call__(self, number: int) -> Made | dict[str, str]:
        try:
            return self.make(number)
        except BadSample as bad:
            return {"sample": self.name(number)[:_LONGEST], "reason": bad.reason, "detail": bad.detail[:_LONGEST]}


def _record(output: str, name: str) -> str:
    from data_pipeline.commands.prepare_item import RECORDS

    return store.join(store.join(output, RECORDS), name)


def _ranges(count: int, step: int) -> list[range]:
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _counted(items: Iterator[Any], bar: Any) -> Iterator[Any]:
    for _, item in items:
        yield item
        bar.update()
