"""The table of what each command reads, compared with what it really reads, and the refusal of everything else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import ConfigError
from tests.training.saved_runs import make_run
from tests.training.tiny import stage_config
from training.cli.compose import load_config
from training.cli.fields import keys_of
from training.config.commands import COMMANDS
from training.config.experiment import Experiment
from training.config.reads import MODES, READS, is_read, reader, unchecked

WITHOUT_EFFECT = {"strength", "data.flip", "data.embeddings", "data.buckets"}
"""Read only without a picture to redraw, and where the evaluation has set its own value, the default."""


@contextmanager
def recorded(config: Any) -> Iterator[set[str]]:
    """The keys that are read, of this object, its sections and copies of them (where a copy has the same value)."""
    found: set[str] = set()
    _record(config, "", found)
    yield found


def _record(section: Any, prefix: str, found: set[str]) -> None:
    original = type(section)
    names = {field.name for field in fields(section)}
    given = dict(vars(section))
    for name in names:
        if is_dataclass(given[name]):
            _record(given[name], f"{prefix}{name}.", found)

    def getattribute(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        asker = sys._getframe(1)
        plain = asker.f_code.co_name != "__post_init__" and "dataclasses" not in asker.f_code.co_filename
        if name in names and plain and not is_dataclass(value) and (value is given[name] or value == given[name]):
            found.add(prefix + name)
        return value

    section.__class__ = type(original.__name__, (original,), {"__getattribute__": getattribute})


def run(verb: str, *words: str) -> set[str]:
    config: Any = load_config(verb, words)
    with recorded(config) as found:
        importlib.import_module(COMMANDS[verb].module).main(config)
    unknown = {key for key in found - WITHOUT_EFFECT if not is_read(verb, config, key)}
    assert not unknown, f"cascade {verb} reads these, and refuses them on the command line"
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reads")
    make_run(folder / "base", stage_config("base", 16))
    return folder


def test_a_command_accepts_every_key_that_it_reads(places: Path) -> None:
    words = [f"prepare.output={places}/drawn", "prepare.draw.count=4", "prepare.draw.heldout=4", "prepare.draw.size=16"]
    run("prepare", *words)
    shards = f"data.shards={places}/drawn/train"
    run("prepare", f"prepare.source={places}/drawn/train", "prepare.kind=shards", f"prepare.output={places}/again")
    run("index", shards)
    assert {"data.crop", "seed", "stage.image_size"} <= run("verify", shards, f"output={places}/verify")
    run("order", shards, "data.global_batch=4")
    run("embed", shards, f"output={places}/embedded", "cluster.gpus=false")
    run("checkpoints", f"run={places}/base")
    bundle = f"bundle.dir={places}/bundle"
    run("bundle", f"bundle.runs=[{places}/base]", bundle)
    drawing = [bundle, "cluster.gpus=false", "seed=1"]
    run("sample", *drawing, "prompts=a red circle", f"output={places}/samples", "steps=1")
    pictures = ["evaluation=pictures", f"evaluation.reference={places}/drawn/heldout", "evaluation.samples=2"]
    read = run("evaluate", *drawing, *pictures, f"evaluation.output={places}/evaluation", "steps=1")
    assert {"data.captions.clean", "evaluation.reference"} <= read, "the recorder sees sections of sections"
    assert not {"data.crop", "data.lanes"} & read, "what the evaluation decides itself is not read"


def test_every_key_of_the_tables_exists() -> None:
    assert set(READS) == set(COMMANDS)
    for verb, read in READS.items():
        known = {"", *keys_of(COMMANDS[verb].config)}
        assert not set(read(unchecked(verb))) - known, verb
        assert not set(MODES.get(verb, {})) - known
        own = {name for name in known if "." not in name} - {*keys_of(Experiment), ""}
        never = {key for key in own if not is_read(verb, unchecked(verb), key)}
        assert all("it belongs to" in reader(verb, unchecked(verb), key) for key in never), (verb, never)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("sample data.shards=x", "cascade sample would not use it; it is a setting of index, verify"),
        (
            "sample optimizer=adafactor",
            "optimizer: cascade sample would not use it; it is a setting of train, ablate, distill",
        ),
        ("sample ingredient=min_snr", "cascade sample would not use it; it is a setting of .*train, ablate, distill"),
        ("sample strength=0.5", "it belongs to image=FILE, not image=null"),
        (
            "evaluate action=compare results=[a,b] guidance=3",
            "guidance: .*action=evaluate or .*, not action=compare",
        ),
        ("evaluate action=reference bundle.text_path=x", "bundle.text_path: .* action=evaluate or .*, not action=ref"),
        ("evaluate figure=kid.x", "figure: .* it belongs to watch=true, not watch=false"),
        ("evaluate ++data.crop=random", "data.crop: cascade evaluate would not use it"),
        ("evaluate run=x", "run.dir: .* it belongs to watch=true"),
        (
            "bundle tracking=disabled",
            "wandb: cascade bundle would not use it; it is a setting of train, ablate, distill",
        ),
        ("prepare prepare.max_side=3", "it belongs to prepare.kind=folder or .*, not prepare.kind=draw, the default"),
        ("train evaluation.images_per_prompt=4", "it is a setting of evaluate"),
        (
            "train optimizer=adafactor optimizer.betas=[0.9,0.95]",
            "optimizer.betas: .* it belongs to optimizer.name=adamw or .*muon, not optimizer.name=adafactor$",
        ),
        ("plan optimizer=adafactor optimizer.eps=1e-6", "optimizer.eps: cascade plan would not use it"),
        (
            "train optimizer.decay=constant optimizer.decay_from=0.5",
            "it belongs to optimizer.decay=cosine or optimizer.decay=linear, not optimizer.decay=constant",
        ),
        ("train cluster.time=1:00:00", "cluster.time: cascade train would not use it; it is a setting of launch"),
        ("embed cluster.nodes=2", "cluster.nodes: cascade embed would not use it; it is a setting of launch"),
        ("train cluster.nodes=2", "it belongs to cluster.kind=slurm or .*, not cluster.kind=local"),
        ("checkpoints average=1", "it belongs to action=export, not action=list"),
    ],
)
def test_a_key_that_would_be_ignored_is_refused(line: str, sentence: str) -> None:
    verb, *words = line.split()
    with pytest.raises(ConfigError, match=sentence):
        load_config(verb, words)
