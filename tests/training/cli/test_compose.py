"""Every YAML file under conf/ becomes a valid config, and every kind of override arrives as the user meant it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.common.errors import ConfigError
from training.cli.compose import composed, ingredients_of, load_config, searching
from training.cli.explain import SYNONYMS
from training.cli.fields import keys_of
from training.cli.overrides import ALIASES, CONF_DIR, groups, section_of
from training.config.commands import COMMANDS, SampleCommand
from training.config.plain import from_plain
from training.config.reads import may_read

FILES = sorted(str(p.relative_to(CONF_DIR)) for p in CONF_DIR.rglob("*.yaml"))


def overrides_for(path: str) -> tuple[str, list[str]]:
    """A command line that uses a file of conf/."""
    parts = Path(path).with_suffix("").parts
    if path in ("base.yaml", "quiet.yaml", "ingredients.yaml"):
        return "train", []
    if parts[0] == "recipe":
        return "train", [f"experiment={parts[1]}", f"stage={parts[2]}"]
    needed = ["dino.path=models/dinov2"] if parts[1] in ("repa", "perceptual") else []
    needed += ["stage=demo_sr"] if parts[1] == "residual" else []
    return "train", [f"{parts[0]}={parts[1]}", *needed]


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_a_valid_config(path: str) -> None:
    verb, overrides = overrides_for(path)
    config = load_config(verb, overrides)
    assert type(config) is COMMANDS[verb].config


@pytest.mark.parametrize("path", FILES)
def test_every_file_begins_with_what_it_is(path: str) -> None:
    text = (CONF_DIR / path).read_text()
    if path.startswith(("experiment/", "debug/")):
        assert text.startswith("# @package _global_\n# "), (
            "a file that sets several sections says so, and what it is for"
        )
    if path.startswith("experiment/"):
        for word in ("cascade ", "Cost:", "Result"):
            assert word in text, "an experiment states its command, its cost and the expected result"


@pytest.mark.parametrize("verb", COMMANDS)
def test_an_experiment_serves_every_command(verb: str) -> None:
    assert load_config(verb, ["experiment=demo"]).run.name == "demo"


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("stage.sampler.guidance=9", "guidance=9"),
        ("stage.sampler.name=ddim", "sampler=ddim"),
        ("stage.image_size=32", "another bundle"),
    ],
)
def test_keys_that_a_bundle_decides_are_refused(word: str, instead: str) -> None:
    for verb in ("sample", "evaluate"):
        with pytest.raises(
            ConfigError, match=f"cascade {verb} uses the settings stored in the bundle .* give {instead}$"
        ):
            load_config(verb, [word])
    assert vars(load_config("evaluate", ["stage=demo_sr", "guidance=9"]))["guidance"] == 9


def test_composing_needs_nothing_heavy() -> None:
    import subprocess

    program = "import sys; from training.cli.compose import load_config as load; load('train'); "
    program += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_demo_experiment() -> None:
    base, sr = (load_config("train", ["experiment=demo", *stage]) for stage in ([], ["stage=demo_sr"]))
    assert (base.run.dir, sr.run.dir) == ("runs/demo/demo_base", "runs/demo/demo_sr")
    assert base.bundle.runs == [base.run.dir, sr.run.dir]
    assert base.data.shards == f"{base.prepare.output}/train"
    assert base.cluster.processes == 2
    assert base.wandb.mode == "offline"
    assert not base.stage.is_super_resolution
    assert sr.stage.image_size == 4 * sr.stage.low_res_size == 4 * base.stage.image_size


def test_the_paper_experiment_is_literal() -> None:
    base, sr, last = (load_config("train", ["experiment=paper", f"stage={s}"]) for s in ("base64", "sr256", "sr1024"))
    for config in (base, sr, last):
        assert (config.data.global_batch, config.train.steps, config.optimizer.warmup_steps) == (
            2048,
            2_500_000,
            10_000,
        )
        assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-4, 0.0)
        assert (config.stage.diffusion.parametrization, config.stage.diffusion.weighting) == ("eps", "paper")
        assert (config.stage.diffusion.text_drop, config.stage.diffusion.null_text) == (0.1, "zero")
    assert [c.optimizer.name for c in (base, sr, last)] == ["adafactor", "adamw", "adamw"]
    assert [c.optimizer.decay for c in (base, sr, last)] == ["cosine", "cosine", "constant"]
    assert [c.stage.diffusion.schedule for c in (base, sr, last)] == ["cosine", "cosine", "linear"]
    assert [c.stage.sampler.guidance for c in (base, sr)] == [1.35, 8.0]
    assert sr.optimizer.betas == [0.9, 0.999]
    assert (last.stage.image_size, last.stage.low_res_size, last.stage.crop_size) == (1024, 256, 256)


def test_ingredients_override_the_experiment_in_their_order() -> None:
    def composed(*words: str) -> tuple[str, str, str]:
        found = load_config("train", ["experiment=paper", "text.path=x", *words]).stage.diffusion
        return found.schedule, found.parametrization, found.weighting

    assert composed("ingredient=[]") == composed() == ("cosine", "eps", "paper")
    assert composed("ingredient=x_pred_v_loss") == ("logit_normal", "x0", "flow_v")
    assert composed("ingredient=[x_pred_v_loss,sigmoid_weighting]") == ("logit_normal", "x0", "sigmoid")
    assert composed("ingredient=[sigmoid_weighting,x_pred_v_loss]")[2] == "flow_v"
    assert composed("ingredient=[x_pred_v_loss]", "stage.diffusion.weighting=v")[2] == "v"
    with pytest.raises(ConfigError, match=r"residual=true: needs stage.diffusion.parametrization=x0, not eps"):
        composed("stage=sr256", "ingredient=residual")
    sr = load_config("train", ["experiment=paper", "text.path=x", "stage=sr256", "ingredient=[x_pred_v_loss,residual]"])
    assert sr.stage.diffusion.residual and sr.stage.diffusion.parametrization == "x0"
    with pytest.raises(ConfigError, match=r"ingredient=nothing: no such option; the options are .*min_snr"):
        composed("ingredient=[min_snr,nothing]")


def test_a_recipe_names_the_ingredients_of_one_stage_and_the_command_line_replaces_them() -> None:
    def composed(stage: str, *words: str) -> tuple[list[str], str, str]:
        overrides = ["experiment=modern", f"stage={stage}", *words]
        config = load_config("plan", overrides)
        return ingredients_of("plan", overrides), config.stage.diffusion.parametrization, config.optimizer.name

    assert composed("base64") == (["x_pred_v_loss", "muon"], "x0", "muon")
    assert composed("base64", "ingredient=[]") == ([], "v", "adamw")
    assert composed("base64", "ingredient=[muon]") == (["muon"], "v", "muon")
    assert composed("sr256") == (["capped_x0", "residual", "unshifted"], "x0", "adamw")
    assert composed("sr256", "ingredient=[]") == ([], "v", "adamw")
    assert load_config("plan", ["experiment=modern", "stage=sr256"]).stage.sampler.threshold == "static"
    for words, shifted in (
        (["experiment=modern", "stage=sr1024"], 0),
        (["experiment=speedrun", "stage=sr256"], 0),
        (["experiment=modern", "stage=sr256", "ingredient=[]"], 64),
        (["experiment=paper", "stage=sr256"], 0),
    ):
        assert load_config("plan", words).stage.diffusion.shift_from == shifted


def test_a_file_of_ones_own_says_times_without_quotation_marks(tmp_path: Path) -> None:
    """YAML 1.1 reads 12:00:00 as 43200, which would be 30 days to Slurm."""
    (tmp_path / "cluster").mkdir()
    lines = "defaults: [slurm, _self_]\ntime: 12:00:00\naccount: 0123\nsbatch: {begin: 16:00, nice: 100}\n"
    (tmp_path / "cluster" / "mine.yaml").write_text(lines)
    with searching(str(tmp_path)):
        cluster = load_config("plan", ["experiment=demo", "cluster=mine"]).cluster
    assert (cluster.time, cluster.account, cluster.sbatch) == ("12:00:00", "0123", {"begin": "16:00", "nice": 100})


def test_an_experiment_names_its_ingredients_and_the_command_line_replaces_them(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    lines = "# @package _global_\ndefaults:\n  - demo\n  - override /ingredient: [min_snr]\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(lines)
    with searching(str(tmp_path)):
        own, none = (load_config("train", ["experiment=mine", *words]) for words in ([], ["ingredient=[]"]))
    assert (own.stage.diffusion.weighting, none.stage.diffusion.weighting) == ("min_snr", "v")


def test_what_hydra_keeps_of_a_file_is_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    for steps in (7, 8, 7):
        (tmp_path / "experiment/own.yaml").write_text(f"# @package _global_\ntrain:\n  steps: {steps}\n")
        with searching(str(tmp_path)):
            config = composed("train", ["experiment=own"])
        assert (config.train.steps, config.train.log_every) == (steps, load_config("train").train.log_every)
        config.train.steps = config.train.log_every = 99  # the next composition does not see it


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.shards=s3://bucket/a/{00000..00099}.tar", "data.shards", "s3://bucket/a/{00000..00099}.tar"),
        ("data.shards={a,b}/[0-9]*.tar", "data.shards", "{a,b}/[0-9]*.tar"),
        ("data.shards=[a.tar,b.tar]", "data.shards", ["a.tar", "b.tar"]),
        ("data.shards=[a/{0,1}.tar, s3://b/{0..3}.tar]", "data.shards", ["a/{0,1}.tar", "s3://b/{0..3}.tar"]),
        (
            "cluster.setup=[module load cuda,'export A=\"b, c\"']",
            "cluster.setup",
            ["module load cuda", 'export A="b, c"'],
        ),
        ("run.dir=/tmp/My Pictures (1)/it's=here", "run.dir", "/tmp/My Pictures (1)/it's=here"),
        ("run=runs/x", "run.dir", "runs/x"),
        ("run.name=2024", "run.name", "2024"),
        ("init_from=runs/demo/bundle", "train.init_from", "runs/demo/bundle"),
        ("debug=true", "debug", True),
        ("debug=false", "debug", False),
        ("zero=zero3", "zero.stage", 3),
        ("zero.stage=2", "zero.stage", 2),
        ("zero=offload", "zero.offload_parameters", True),
        ("text=t5", "text.kind", "t5"),
        ("optimizer=adafactor", "optimizer.name", "adafactor"),
        ("tracking=disabled", "wandb.mode", "disabled"),
        ("cluster=slurm", "cluster.kind", "slurm"),
        ("cluster.sbatch.qos=high", "cluster.sbatch", {"qos": "high"}),
        ("cluster.sbatch={qos: high, comment: night}", "cluster.sbatch", {"qos": "high", "comment": "night"}),
        ("stage.model.overrides.widths=[64,64]", "stage.model.overrides", {"widths": [64, 64]}),
        *(
            (f"data.captions.sources={typed}", "data.captions.sources", {"json:caption": 2.0})
            for typed in ('{"json:caption":2.0}', "{'json:caption': 2}", "{json:caption:2}", "{json:caption: 2}")
        ),
        ("data.captions.sources={txt:0.5,json:a_b:2}", "data.captions.sources", {"txt": 0.5, "json:a_b": 2.0}),
        ("data.filter={min_side: 256, max_aspect: 2}", "data.filter.max_aspect", 2.0),
        ("train.sample_prompts=[a red circle,a blue one]", "train.sample_prompts", ["a red circle", "a blue one"]),
    ],
)
def test_overrides_mean_what_they_say(override: str, key: str, value: object) -> None:
    found: object = load_config("launch" if key.startswith("cluster.") else "train", [override])
    for part in key.split("."):
        found = getattr(found, part)
    if isinstance(found, dict):  # a mapping keeps the other names that a file gave
        assert isinstance(value, dict)
        found = {name: found[name] for name in value}
    assert found == value


def test_the_command_line_beats_group_and_experiment() -> None:
    config = load_config("train", ["zero.stage=2", "experiment=demo", "zero=zero3", "train.steps=9", "run.dir=here"])
    assert (config.zero.stage, config.train.steps, config.run.dir) == (2, 9, "here")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trian.steps=5", "trian.steps: no such key; did you mean train.steps?"),
        ("train.stps=5", "train.stps: no such key; did you mean train.steps?"),
        ("+train.steps_more=5", "train.steps_more: no such key; "),
        ("steps=5", "steps: no such key; did you mean stage.sampler.steps or train.steps?"),
        ("qwertz=5", "qwertz: no such key; the top level has seed, json, debug, run"),
        ("data.filter={min_sid: 3}", "data.filter.min_sid: no such key; did you mean data.filter.min_side?"),
        ("train.steps=1.5", "train.steps=1.5: it must be an integer"),
        ("train.steps=null", "train.steps=null: it must be an integer"),
        ("optimizer.lr=fast", "optimizer.lr=fast: it must be a number"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9: it must be a list"),
        ("optimizer.betas=[a,b]", "optimizer.betas[0]=[a,b]: it must be a list, each element a number"),
        ("json=maybe", "json=maybe: it must be true or false"),
        ("train=5", "train=5: it must be a section; its keys are steps,"),
        ("data=a/b", "data=a/b: data is a section; did you mean data.shards=a/b?"),
        ("data.captions.sources={txt: much}", "data.captions.sources.txt={txt:much}: it must be a number"),
        ("seed=1,2", "seed=1,2: several values; add --multirun for one run per value"),
        ("seed=${sed}", "seed: ${sed} refers to a key that does not exist"),
        ("demo", "'demo': a setting is key=value"),
        ("=5", "'=5': a setting is key=value"),
        ("stage=foo", "stage=foo: no such option; the options are base64, "),
        ("zero=2", "zero=2: no such option; did you mean zero2?"),
        ("experiment=null", "experiment=null: the options of experiment are demo, "),
        ("debug=maybe", "debug=maybe: no such option; "),
        ("wandb.mode=of", "wandb.mode=of: it must be online, offline or disabled"),
        ("stage.diffusion.schedule=square", "stage.diffusion.schedule=square: it must be one of cosine, linear, edm"),
        ("stage.model.preset=huge", "stage.model.preset=huge: it must be one of "),
        ("stage=base64,sr256", "stage=base64,sr256: several values; add --multirun"),
        ("ingredient=muon,min_snr", "ingredient=muon,min_snr: several values; write ingredient=[muon,min_snr]"),
        ("train.steps=10,000", "train.steps=10,000: several values; write train.steps=10000 for one number"),
        ("experiment=demo,stage=demo_base", "experiment=demo,stage=demo_base: settings are separated by blanks"),
        ("experiment=demo stage=demo_base", "experiment=demo stage=demo_base: these are several settings in one"),
        (
            "experiment=conf/experiment/demo.yaml",
            "experiment=conf/experiment/demo.yaml: no such option; did you mean demo?",
        ),
        ("stage@run=base64", "stage@run=base64: a group has its own section and cannot be put elsewhere; write stage="),
        ("tracking=off", "tracking=off: no such option; did you mean disabled?"),
        ("precision=float32", "precision=float32: no such option; did you mean fp32?"),
        ("wandb=disabled", "wandb: it is a section; to turn W&B off or on, write tracking=disabled"),
        ("EXPERIMENT=demo", "EXPERIMENT: no such key; did you mean experiment?"),
        ("deepspeed=ds.json", "deepspeed: no such key; did you mean zero (zero=zero2;"),
        ("hydra.run.dir=out", "hydra.run.dir=out: nothing would be written there; a run's directory is run.dir"),
        ("hydra.job.chdir=true", "hydra.job.chdir=true: cascade stays in the current directory"),
        ("hydra.output_subdir=x", "hydra.output_subdir=x: nothing would be written there"),
        ("hydra.verbose=true", "hydra.verbose=true: nothing more would be shown; debug=true shows tracebacks"),
        ("hydra.launcher=joblib", "hydra.launcher=joblib: a launcher is chosen with hydra/launcher=NAME"),
        ("hydra.nothing=1", "hydra.nothing: Hydra has no such setting"),
        ("hydra.job.num=often", "hydra.job.num=often: it must be a value that Hydra accepts"),
        ("data.captions.sources={a:1", "data.captions.sources='{a:1': it must be a mapping"),
        ("run.name=[a]", "run.name=[a]: it must be text"),
        ("run.name=", "run.name='': it is part of paths"),
        ("run.name=a/../b", "run.name='a/../b': it is part of paths"),
        ("run.name=/scratch/a", "run.name='/scratch/a': it is part of paths"),
        ("run.name=${seed", "run.name: '${seed' is an incomplete reference"),
        ("run.name=${run.name}", "run.name: it refers to itself"),
        ("run.name=${oc.env:NOT_SET_HERE}", "run.name: the environment variable NOT_SET_HERE is not set"),
        ("run.name=${env:HOME}", "run.name: ${env:...} is not a reference"),
        ("ema.decays[0]=1", "'ema.decays[0]=1': a list is given as a whole: ema.decays=[...]"),
        (
            "train.steps",
            "'train.steps': a setting is key=value, without blanks around =, for example train.steps=VALUE",
        ),
        ("photos", "'photos': a setting is key=value, without blanks around =, for example experiment=photos"),
        ("\u2013\u2013multirun", "'\u2013\u2013multirun': it starts with a typographic dash"),
        ("~", "'~': a setting is key=value"),
    ],
)
def test_a_wrong_override_is_explained(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("train", [override])
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("verb", "word", "sentence"),
    [
        ("evaluate", "samples=4", "samples: no such key; did you mean evaluation.samples?"),
        ("evaluate", "prompts=a", "prompts: no such key; did you mean evaluation.prompts?"),
        ("evaluate", "evaluation.trainng=x", "evaluation.trainng: no such key; did you mean evaluation.training?"),
        ("train", "guidance=4", "guidance: no such key; did you mean stage.sampler.guidance?"),
        ("train", "prompts=a", "prompts: no such key; did you mean train.sample_prompts?"),
        ("train", "num_images=4", "num_images: cascade train has no such key; it is a setting of sample"),
        ("train", "dry_run=true", "dry_run: cascade train has no such key; it is a setting of launch"),
        ("bundle", "output=x", "output: no such key; did you mean bundle.dir?"),
        ("prepare", "out=x", "out: no such key; did you mean prepare.output?"),
        ("prepare", "optimzer=x", "optimzer: no such key; the top level has seed, json, debug, data, prepare"),
    ],
)
def test_only_settings_that_the_command_uses_are_suggested(verb: str, word: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(verb, [word])
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("verb", "words", "sentence"),
    [
        ("trian", [], "trian: no such command; the commands are prepare, index"),
        ("train", "experiment=demo", "overrides='experiment=demo': give a list of settings"),
        ("train", {"experiment": "demo"}, "overrides={'experiment': 'demo'}: give a list of settings"),
        ("train", ["seed=1", 3], "overrides=['seed=1', 3]: give a list of settings"),
    ],
)
def test_a_program_is_told_what_to_give(verb: str, words: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(verb, words)
    assert str(caught.value).startswith(sentence)


def test_a_mistake_in_a_file_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.cli import main as cli

    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ntrain:\n  stps: 3\n")
    (tmp_path / "experiment/broken.yaml").write_text("# @package _global_\ntrain: [\n")
    for name, part in (("mine", "train.stps: no such key; did you mean train.steps?"), ("broken", "broken.yaml")):
        with pytest.raises(ConfigError) as caught:
            cli._hydra("train", ["--config-dir", str(tmp_path), f"experiment={name}"])
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "stage.crop_size=128",
        "stage.crop_size=-4",
        "stage.image_size=0",
        "stage.low_res_size=64",
        "stage.name=a/b",
        "stage.name=''",
        "train.steps=0",
        "train.sample_every=-1",
        "train.timeout_s=0",
        "train.spike_factor=-1",
        "checkpoint.every=0",
        "checkpoint.keep_every=-3",
        "optimizer.lr=nan",
        "optimizer.betas=[0.9]",
        "optimizer.betas=[0.9,1.5]",
        "optimizer.eps=0",
        "optimizer.weight_decay=-1",
        "optimizer.warmup_steps=-5",
        "optimizer.clip_norm=-1",
        "stage.sampler.guidance=nan",
        "stage.sampler.gamma=2",
        "text.max_tokens=0",
        "text.dim=0",
        "cluster.processes=-1",
        "cluster.threads=-1",
        "seed=-1",
        "seed=99999999999999999999",
        "run.dir=''",
        "bundle.dir=''",
        "sampling.columns=0",
        "validation.every=-1",
        "lora.rank=-1",
        "evaluation.samples=1",
        "data.threads=0",
        "data.window=-1",
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_key(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("train", ["experiment=demo", "stage=demo_sr", override])
    assert str(error.value).startswith(override.partition("=")[0]), error.value


SENTENCES = [
    "a red circle, on a white background",
    "[a cat, on a mat]",
    "choice(a,b)",
    "1e3",
    "true",
    "007",
    "price ${x}, or ${y",
    "it's \\ a {blue, green} one",
    "a, b, \"c\" and 'd'",
    "x=1, y=[2]",
    "~/home",
]


@pytest.mark.parametrize("text", SENTENCES)
def test_free_text_is_a_single_value(text: str) -> None:
    sample = load_config("sample", [f"prompts={text}", f"negative_prompts={text}", f"sampling.prompts={text}"])
    assert isinstance(sample, SampleCommand)
    home = str(Path(text).expanduser()) if text.startswith("~/") else text
    assert sample.prompts == sample.negative_prompts == home
    assert sample.sampling.prompts == [home]
    assert load_config("train", [f"train.sample_prompts={text}"]).train.sample_prompts == [home]


@pytest.mark.parametrize(
    ("typed", "prompts"),
    [
        ("[a red circle,a blue one]", ["a red circle", "a blue one"]),
        ("['a cat, on a mat','b']", ["a cat, on a mat", "b"]),
        ('["it\'s, here", "b"]', ["it's, here", "b"]),
        ("[]", []),
        ("null", None),
        ("'quoted, once'", "quoted, once"),
        ("[a cat, a dog]", "[a cat, a dog]"),
    ],
)
def test_lists_of_prompts(typed: str, prompts: object) -> None:
    sample = load_config("sample", [f"prompts={typed}"])
    assert isinstance(sample, SampleCommand)
    assert sample.prompts == prompts


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("train.sample_prompts='a cat'", "train.sample_prompts", ["a cat"]),
        ("wandb.notes=[a,b]", "wandb.notes", "[a,b]"),
        ('wandb.notes=["a"]', "wandb.notes", '["a"]'),
        ("+seed=3", "seed", 3),
        ("++train.steps=3", "train.steps", 3),
        ("+experiment=demo", "run.name", "demo"),
    ],
)
def test_unambiguous_spellings_are_accepted(word: str, key: str, value: object) -> None:
    config: object = load_config("train", ["data.shards=x", word])
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value


def test_texts_reach_other_processes_unchanged() -> None:
    config = load_config("sample", [f"sampling.prompts={SENTENCES[6]}", r"run.name=\${x}"])
    assert from_plain(SampleCommand, json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("verb", "word", "setting"),
    [
        ("status", "runs", "run=runs"),
        ("checkpoints", "runs/demo/demo_base", "run=runs/demo/demo_base"),
        ("verify", "data/train", "data.shards=data/train"),
        ("prepare", "my/pictures", "prepare.source=my/pictures"),
        ("prepare", "pictures", "prepare.source=pictures"),  # also an option of a group that prepare does not use
        ("bundle", "now", "experiment=demo"),
        ("sample", "runs/demo/bundle", "from_bundle=runs/demo/bundle"),
        ("sample", "a cat", "prompts='a cat'"),
    ],
)
def test_a_bare_word_is_answered_with_the_probable_setting(verb: str, word: str, setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(verb, [word])
    assert str(caught.value).endswith(f"for example {setting}")


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        ("experiment=photos prepare.source=my photos", "'prepare.source=my photos'"),
        ("prepare.source=my own photos experiment=photos", "'prepare.source=my own photos'"),
    ],
)
def test_a_value_with_blanks_that_was_not_quoted_is_shown_quoted(words: str, quoted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("prepare", words.split())
    assert str(caught.value).endswith(f"quote both: {quoted}")


@pytest.mark.parametrize("name", ["007", "true", "1e3", "1_0", "nan", "2024-06-01"])
def test_names_keep_their_spelling(name: str) -> None:
    assert load_config("train", [f"run.name={name}"]).run.name == name


@pytest.mark.parametrize(
    ("verb", "typed", "key"),
    [
        ("train", "expermient=demo", "experiment"),
        ("train", "batch_size=4", "data.global_batch"),
        ("train", "learning_rate=1", "optimizer.lr"),
        ("train", "optimizer.learning_rate=1", "optimizer.lr"),
        ("train", "epochs=3", "train.steps (epochs x samples / data.global_batch)"),
        ("sample", "num_inference_steps=3", "steps"),
        ("sample", "guidance_scale=3", "guidance"),
        ("sample", "width=64", "size"),
        ("sample", "ckpt=x", "from_bundle"),
        ("train", "ckpt_path=x", "the same command again, which resumes automatically"),
        ("train", "devices=2", "cluster.processes"),
        ("launch", "qos=high", "cluster.sbatch (cluster.sbatch.qos=...)"),
        ("train", "use_wandb=false", "tracking (tracking=online, offline or disabled)"),
    ],
)
def test_names_of_other_programs_are_answered_with_ours(verb: str, typed: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(verb, [typed])
    assert f"did you mean {key}?" in str(caught.value)


def test_other_names_lead_to_keys_that_exist() -> None:
    keys = {key for verb in COMMANDS.values() for key in keys_of(verb.config)} | set(groups())
    names = [name for one in SYNONYMS.values() for name in ([one] if isinstance(one, str) else one)]
    assert {name.split()[0] for name in names} - {"the"} <= keys


def test_every_setting_is_explained() -> None:
    keys = {key.name: key for verb in COMMANDS.values() for key in keys_of(verb.config).values()}
    assert [name for name, key in keys.items() if not (key.doc or is_dataclass(key.type))] == []


def documented() -> tuple[list[str], list[str]]:
    """The commands of all pages and of `--help`, and those within sentences."""
    root = Path(__file__).parents[3]
    pages = [root / "slurm/README.md", *root.glob("*.md"), *root.glob("docs/*.md")]
    lines = [line for page in pages for line in page.read_text().replace("\\\n", " ").splitlines()]
    commands = [line.replace("\\\n", " ") for verb in COMMANDS.values() for line in verb.examples]
    commands += [line.strip() for line in lines if re.match(r"(    )?([A-Z_]+=\S+ )*cascade [a-z]+ +\S+=", line)]
    return commands, [found for line in lines for found in re.findall(r"`(cascade [a-z]+ [^`]+)`", line)]


def test_documented_commands_can_be_pasted_into_bash_and_zsh() -> None:
    """Brackets, braces and stars in settings are quoted; zsh would take a comment for arguments."""
    blocks, within = documented()
    commands = blocks + within
    assert len(commands) > 40
    bare = [re.sub(r"'[^']*'|\"(\\.|[^\"])*\"", "", command) for command in commands]
    assert [command for command in bare if re.search(r"=[^ ]*[\[{*]| #", command)] == []


def test_documented_settings_exist() -> None:
    for command in documented()[0]:
        words = shlex.split(command)
        verb, settings = words[words.index("cascade") + 1], words[words.index("cascade") + 2 :]
        for key, _, value in (word.partition("=") for word in settings if "=" in word and verb in COMMANDS):
            if key.startswith("hydra"):  # its own
                continue
            options, known = groups().get(key), keys_of(COMMANDS[verb].config)
            key = ALIASES.get(key, key)
            assert may_read(verb, section_of(key) if options else key), f"{command}: it would be refused"
            if options is None:
                assert key in known or key.rpartition(".")[0] in ("cluster.sbatch", "stage.model.overrides"), command
            elif "..." not in value:
                assert {*value.strip("[]").split(",")} <= {*options}, command


@pytest.mark.parametrize(
    ("verb", "words", "samples", "evaluation"),
    [
        ("sample", [], "runs/default/samples", "runs/default/evaluation"),
        ("sample", ["experiment=demo"], "runs/demo/samples", "runs/demo/evaluation"),
        ("sample", ["from_bundle=runs/x/bundle"], "runs/x/samples", "runs/x/evaluation"),
        ("evaluate", ["bundle.dir=/models/mine/"], "/models/samples", "/models/evaluation"),
        ("evaluate", ["bundle.dir=s3://b/runs/x/bundle"], "runs/x/samples", "runs/x/evaluation"),
        ("evaluate", ["bundle.dir=b", "evaluation.output=here"], "./samples", "here"),
    ],
)
def test_samples_of_a_bundle_are_next_to_it(verb: str, words: list[str], samples: str, evaluation: str) -> None:
    config = load_config(verb, words)
    assert (config.sampling.output, config.evaluation.output) == (samples, evaluation)


def test_variables_of_wandb_apply_unless_the_command_line_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {"MODE": "disabled", "PROJECT": "theirs", "NAME": "a, b", "TAGS": "x, 1,", "RUN_GROUP": "g", "NOTES": "n, m"}
    for name, value in said.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb = load_config("train", []).wandb
    assert (wandb.mode, wandb.project, wandb.name, wandb.group) == ("disabled", "theirs", "a, b", "g")
    assert wandb.tags == ["x", "1"] and wandb.notes == "n, m"
    typed = load_config("train", ["tracking=online", "wandb.project=mine", "wandb.tags=[z]"]).wandb
    assert (typed.mode, typed.project, typed.tags, typed.name) == ("online", "mine", ["z"], "a, b")
    assert load_config("sample", []).wandb.project == "cascade", "only what trains tracks"
    monkeypatch.setenv("WANDB_MODE", "DRYRUN")
    assert load_config("train", []).wandb.mode == "offline"
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert load_config("train", []).wandb.mode == "disabled"


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("WANDB_MODE", "somehow", "wandb.mode=somehow: it must be online, offline or disabled"),
        ("WANDB_PROJECT", "team/project", "wandb.project=team/project: W&B accepts"),
        ("WANDB_ENTITY", "my team", "wandb.entity=my team: it is the name of a W&B user or team"),
        ("WANDB_TAGS", "y" * 65, "wandb.tags: W&B accepts tags of 1 to 64 characters"),
        ("WANDB_NAME", "n" * 129, "wandb.name="),
    ],
)
def test_a_variable_of_wandb_that_cannot_be_used_is_named(
    variable: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load_config("train", [])
    assert str(caught.value).startswith(f"{variable}, in the environment, sets {sentence}")


def test_the_command_of_a_wandb_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/training.md: W&B's agent puts the values of a run into it, and names the run by a variable."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    text = (Path(__file__).parents[3] / "docs/training.md").read_text()
    (found,) = re.findall(r"`command: (\[.*?\])`", text, re.DOTALL)
    cascade, verb, *words = yaml.safe_load(found)
    values = {"optimizer.lr": {"value": 1e-05}, "ema.decays": {"value": [0.99, 0.999]}, "data.flip": {"value": 0.5}}
    place = words.index("${args_no_hyphens}")
    words[place : place + 1] = create_sweep_command_args({"args": values})["args_no_hyphens"]
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    config = load_config(verb, words)
    assert cascade == "cascade" and config.run.dir == "runs/sweep/abc123" and config.wandb.mode == "online"
    assert (config.optimizer.lr, config.ema.decays, config.data.flip) == (1e-05, [0.99, 0.999], 0.5)


@pytest.mark.parametrize(
    "word",
    ["wandb.project=a/b", "wandb.project=''", f"wandb.tags=[{'x' * 65}]", "wandb.tags=['']", f"wandb.name={'n' * 129}"],
)
def test_values_that_wandb_would_refuse_are_refused_at_the_start(word: str) -> None:
    with pytest.raises(ConfigError, match="W&B accepts"):
        load_config("train", [word])


def test_a_pareto_curve_is_next_to_the_results_it_compares() -> None:
    words = ["action=pareto", "results=[runs/a/one,runs/a/two/result.json]"]
    assert load_config("evaluate", words).evaluation.output == str(Path("runs/a/pareto").absolute())
    assert load_config("evaluate", [*words, "evaluation.output=here"]).evaluation.output == "here"
