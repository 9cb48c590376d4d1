"""The command line as a user types it: help, mistakes in one sentence, exit codes, and nothing heavy imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from training.cli import main as cli
from training.cli.compose import load_config
from training.cli.help import overview
from training.config.commands import COMMANDS
from training.config.reads import may_read

SERVER = """
import json, os, sys, traceback
from training.cli.compose import load_config
from training.cli.main import main

load_config("train", ["data.shards=none"])
for line in sys.stdin:
    words, cwd, out, err = json.loads(line)
    child = os.fork()
    if not child:
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        os.chdir(cwd)
        code = 1
        try:
            main(words)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        heavy = {"torch", "deepspeed", "transformers", "s3fs", "wandb"} & set(sys.modules)
        print("heavy:", sorted(heavy), file=sys.stderr)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Each command line in a fork of one process that has composed a config before, as a start of Python and Hydra takes a
second. What that process imports counts as well."""


@lru_cache(maxsize=1)
def server() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def cascade(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`cascade WORDS...` in a separate process; its last line on stderr lists the heavy packages that were imported."""
    asking, answering = server().stdin, server().stdout
    assert asking is not None and answering is not None
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        print(json.dumps([words, str(cwd), str(out), str(err)]), file=asking, flush=True)
        code = int(answering.readline())
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def mistake(*words: str, cwd: Path) -> str:
    """Runs a command that must fail as a user error; returns its sentence."""
    done = cascade(*words, cwd=cwd)
    *sentence, heavy = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert heavy == "heavy: []"
    assert len(sentence) == 1, done.stderr
    assert done.stdout == ""
    assert list(cwd.iterdir()) == []
    return sentence[0]


@pytest.fixture()
def fake_verb(monkeypatch: pytest.MonkeyPatch):
    """Lets `cascade train` (or another command) call a function of the test instead of training."""

    def install(main, verb: str = "train") -> None:
        module: Any = type(sys)("fake_training")
        module.main = main
        monkeypatch.setitem(sys.modules, "fake_training", module)
        monkeypatch.setitem(COMMANDS, verb, replace(COMMANDS[verb], module="fake_training"))

    return install


def test_the_version_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["train", "--version"]):
        cli.main(words)
        assert re.match(r"cascade \d+\.\d+\.\d+, torch ", capsys.readouterr().out)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_overview_lists_every_command(words: list[str], tmp_path: Path) -> None:
    done = cascade(*words, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["heavy: []"]
    for name, verb in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert verb.line in " ".join(done.stdout.split())


def test_the_overview_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, overview().splitlines())) <= 80


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_of_a_command(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cli.main([verb, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"cascade {verb}: ")
    assert f"cascade {verb} " in text.split("\n", 1)[1], "an example of the command itself"
    assert "\n  experiment " in text and ("\n  optimizer " in text) == may_read(verb, "optimizer"), "the groups it uses"
    assert "--cfg job" in text and "--multirun" in text
    keys = re.findall(r"^  ([\w.]+)=", text, re.MULTILINE)
    assert keys and len(keys) == len({*keys}), "each key once"
    assert [key for key in keys if not may_read(verb, key)] == [], "none that it would refuse"
    assert [line for line in text.splitlines() if len(line) > 80] == []
    examples = text.partition("examples:\n")[2].partition("\n\n")[0].replace(" \\\n     ", "")
    assert [line.strip() for line in examples.splitlines()] == list(COMMANDS[verb].examples), "pasted, they are whole"


@pytest.mark.parametrize("words", [["help", "bundle"], ["--help", "bundle"], ["bundle", "help"], ["bundle", "-h"]])
def test_help_in_any_order(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words)
    assert capsys.readouterr().out.startswith("cascade bundle: ")


def test_help_shows_the_values_that_overrides_give(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "experiment=demo", "train.steps=7", "--help"])
    text = capsys.readouterr().out
    assert "train.steps=7" in text
    assert "data.shards=data/demo/train" in text
    assert "Samples per optimizer step over all ranks." in text


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    done = cascade("train", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["heavy: []"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tran"], ["tran", "did you mean train?", "evaluate"]),
        (["train", "train.stps=5"], ["train.stps: no such key", "did you mean train.steps?"]),
        (["train", "train.steps=many"], ["train.steps=many: it must be an integer"]),
        (["train", "stage=demo_bas"], ["stage=demo_bas: no such option", "did you mean demo_base?", "sr1024"]),
        (["train", "zero.stage=7"], ["zero.stage=7: it must be 0, 1, 2 or 3"]),
        (["train", "cluster.processes=3"], ["3 processes", "data.global_batch", "cluster.processes", "1, 2, 4"]),
        (["train", "--frobnicate"], ["--frobnicate", "--help"]),
        (["train", "--resume"], ["--resume: no such option; it is the same command again"]),
        (["train", "TRAIN.STEPS=5"], ["did you mean train.steps?"]),
        (["train", "seed=1,2"], ["seed=1,2: several values; add --multirun"]),
        (["sample", "sampling.negative_prompt=a, b"], ["no such key; did you mean negative_prompts?"]),
        (["train", "--experiment", "demo", "--steps", "4"], ["--experiment: no such option; write experiment=demo;"]),
        (["sample", "--prompt", "a dog", "-n", "4"], ["--prompt: no such option; write prompts='a dog';"]),
        (["train", "--dry-run"], ["--dry-run: no such option; dry_run=... is a setting of launch"]),
        (["train", "--package", "train"], ["--package: only --cfg uses it; add --cfg job"]),
        (["train", "--batch-size=4"], ["--batch-size=4: no such option; write data.global_batch=4"]),
        (["train", "experiment=null"], ["experiment=null: the options of experiment are"]),
        (["train"], ["data.shards: it is not set"]),
        (["launch", "cluster=slurm", "dry_run=true"], ["data.shards: it is not set"]),
        (["train", "--config-path", "nowhere"], ["--config-path=nowhere: there is no such directory"]),
        (["train", "-m", "hydra/launcher=joblib_x"], ["hydra/launcher=joblib_x: no such option"]),
        (["train", "-m", "hydra/launcher=ray"], ["pip install hydra-ray-launcher"]),
        (["train", "~train.steps"], ["~train.steps: a setting cannot be removed", "train.steps=..."]),
        (["train", "~experiment"], ["~experiment: a group always has an option"]),
        (["train", "~cluster.sbatch.qos"], ["~cluster.sbatch.qos: no such key"]),
        (["sample", "guidanc=3"], ["guidanc: no such key", "did you mean guidance?"]),
        (["sample", "a cat"], ["for example prompts='a cat'"]),
        (["TRAIN"], ["TRAIN: no such command; did you mean train?"]),
        (["generate"], ["did you mean sample?"]),
        (["experiment=demo", "train"], ["experiment=demo: the command comes first: cascade train key=value"]),
        (["train", "--local_rank=0"], ["--local_rank=0: no such option; cascade starts its own processes"]),
        (["train", "--config", "x.yaml"], ["--config: no such option; write experiment=NAME, or --config-dir DIR"]),
        (["train", "-cn", "demo"], ["--config-name=demo: demo is an experiment; write experiment=demo"]),
        (["train", "--config-dir", "nowhere"], ["--config-dir=nowhere: there is no such directory"]),
        (["train", "hydra/sweeper=optuna"], ["hydra/sweeper=optuna: only a sweep uses it; add --multirun"]),
        (["train", "hydra.sweep.dir=x"], ["hydra.sweep.dir=x: only a sweep uses it; add --multirun"]),
        (["train", "-m", "hydra/launcher=submitit"], ["did you mean submitit_local or submitit_slurm?"]),
        (["train", "-m", "hydra.sweeper.n_trials=3"], ["choose the sweeper that has it with hydra/sweeper=NAME"]),
        (["train", "-m", "optimizer.lr=interval(1e-4,1e-3)"], ["only a sweeper that searches uses it; add hydra/swee"]),
        (["train", "seed=range(1,3)"], ["seed=range(1,3): several values; add --multirun for one run per value"]),
        (["train", "-m", "seed=1,2", "--cfg", "job"], ["--multirun, --cfg and --info cannot be combined"]),
        (
            ["train", "hydra.searchpath=[nowhere]"],
            ["hydra.searchpath: there is no directory nowhere; write file://DIR"],
        ),
        (["train", "--config-name=mine"], ["there is no mine.yaml", "--config-dir"]),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(words: list[str], expected: list[str], tmp_path: Path) -> None:
    sentence = mistake(*words, cwd=tmp_path)
    assert sentence.startswith("cascade")
    for part in expected:
        assert part in sentence


def test_an_agent_of_a_wandb_sweep_is_told_how_to_pass_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    with pytest.raises(SystemExit):
        cli.main(["train", "--optimizer.lr=1e-3"])
    assert "write ${args_no_hyphens} for ${args}" in capsys.readouterr().err


def test_a_working_directory_that_was_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "data.shards=/x"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("cascade train: the working directory of this shell no longer exists")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = cascade("train", "train.stps=5", "debug=true", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "train.stps: no such key" in done.stderr


def test_cfg_job_shows_every_key_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = cascade("train", "experiment=demo", "--cfg", "job", "stage=demo_sr", cwd=tmp_path)
    assert done.returncode == 0
    assert "shards: data/demo/train" in done.stdout
    assert "log_every:" in done.stdout, "a key that no YAML file sets"
    assert list(tmp_path.iterdir()) == []


def test_json_is_the_last_line(fake_verb, capfd: pytest.CaptureFixture[str]) -> None:
    fake_verb(lambda config: print("progress") or {"seed": config.seed, "dir": config.run.dir})
    cli.main(["train", "json=true", "seed=3", "run=runs/here"])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "progress"
    assert json.loads(lines[-1]) == {"seed": 3, "dir": "runs/here"}


def test_without_json_only_the_command_prints(fake_verb, capfd: pytest.CaptureFixture[str]) -> None:
    fake_verb(lambda config: {"seed": config.seed})
    cli.main(["train"])
    assert capfd.readouterr().out == ""


def test_errors_of_the_command_keep_their_exit_code(fake_verb, capfd: pytest.CaptureFixture[str]) -> None:
    from data_pipeline.common.errors import CascadeError

    class Full(CascadeError):
        exit_code = 75

    def main(config: object) -> None:
        raise Full("saved at step 12")

    fake_verb(main)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == 75
    assert capfd.readouterr().err == "cascade train: saved at step 12\n"


def test_a_bug_is_not_presented_as_a_mistake_of_the_user(fake_verb, capfd: pytest.CaptureFixture[str]) -> None:
    fake_verb(lambda config: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_file_that_cannot_be_written_is_reported_in_one_sentence(
    fake_verb, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_verb(lambda config: Path("/proc/nowhere").mkdir())
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    text = capfd.readouterr().err
    assert ended.value.code == 2 and text.startswith("cascade train: /proc/nowhere: ") and text.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["train", "debug=true"])
    assert "Traceback" in capfd.readouterr().err


def test_other_ranks_leave_the_message_to_rank_0(
    fake_verb, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "train.steps=0"])
    assert ended.value.code == 2
    assert capfd.readouterr().err == ""


def test_multirun_gives_each_job_its_own_directory(fake_verb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[int, str]] = []
    fake_verb(lambda config: seen.append((config.seed, config.run.dir)))
    cli.main(["train", "--multirun", "seed=1,2", "stage=demo_base,demo_sr"])
    assert seen == [
        (1, "runs/default/demo_base/seed=1"),
        (1, "runs/default/demo_sr/seed=1"),
        (2, "runs/default/demo_base/seed=2"),
        (2, "runs/default/demo_sr/seed=2"),
    ]


def test_multirun_separates_an_output_that_is_given(fake_verb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []
    fake_verb(lambda config: seen.append(config.output), "sample")
    cli.main(["sample", "--multirun", "seed=1,2", "output=mine"])
    assert seen == ["mine/seed=1", "mine/seed=2"]
    seen.clear()
    fake_verb(lambda config: seen.append(config.checkpoint.dir))
    cli.main(["train", "--multirun", "optimizer.lr=1,2", "checkpoint.dir=s3://b/ck"])
    assert seen == ["s3://b/ck/optimizer.lr=1", "s3://b/ck/optimizer.lr=2"]


def test_help_knows_the_users_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [demo]\ntrain:\n  steps: 77\n")
    cli.main(["train", "--config-dir", str(tmp_path), "experiment=mine", "--help"])
    assert "train.steps=77" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--config-dir", str(tmp_path / "none"), "--help"])
    assert stopped.value.code == 2 and "no such directory" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--config-dir"], ["--config-path"]])
def test_a_primary_config_of_the_user_is_read(flags: list[str], fake_verb, tmp_path: Path) -> None:
    defaults = "defaults: [train, override experiment: demo, _self_]"
    (tmp_path / "mine.yaml").write_text(f"{defaults}\ntrain:\n  steps: 77\n")
    seen: list[tuple[str, int]] = []
    fake_verb(lambda config: seen.append((config.run.name, config.train.steps)))
    cli.main(["train", *flags, str(tmp_path), "-cn", "mine", "--multirun", "seed=1"])
    cli.main(["train", *flags, str(tmp_path), "-cn", "mine", "train.steps=78"])
    assert seen == [("demo", 77), ("demo", 78)]


def test_a_tilde_is_replaced_by_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config("train", ["run.dir=~/runs/a", "data.shards=[~/x,s3://b/~/y]"])
    assert config.run.dir == "/home/me/runs/a" and config.data.shards == ["/home/me/x", "s3://b/~/y"]


def test_files_of_the_working_directory_and_of_pythonpath_shadow_nothing(tmp_path: Path) -> None:
    """The command, the processes that it starts, and those that decode for them; a Slurm script has the same -P."""
    ours = ("training", "conf", "data_pipeline", "slurm")
    for name in (*ours, "queue", "other/training", "other/conf", "other/data_pipeline", "other/slurm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('shadowed by {name}')\n")
    program, environ = [sys.executable, "-m", "cascade_t2i"], os.environ | {"PYTHONPATH": str(tmp_path / "other")}
    draw = ["prepare.output=data", "prepare.draw.count=8", "prepare.draw.heldout=0", "prepare.draw.size=16"]
    words = ["data.shards=data/train", "data.global_batch=2", "cluster.processes=2", "stage.model.preset=tiny_base"]
    words += ["train.steps=1", "train.sample_every=0", "tracking=disabled", "text.dim=32"]
    for command in (["prepare", *draw], ["train", *words]):
        done = subprocess.run([*program, *command], capture_output=True, text=True, cwd=tmp_path, env=environ)
        assert done.returncode == 0 and "shadowed" not in done.stdout + done.stderr, done.stderr


def test_ctrl_c_while_python_imports_the_command_line() -> None:
    program = """
import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "training.cli.main": raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
import cascade_t2i.__main__
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_child_of_multiprocessing_keeps_the_path_of_its_parent() -> None:
    program = """
import sys
sys.modules["__mp_main__"] = sys  # as multiprocessing's spawn does while it runs the main program again
sys.path.insert(0, "/from/PYTHONPATH")
import cascade_t2i.__main__
assert "/from/PYTHONPATH" in sys.path
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_closed_output_keeps_the_exit_code(tmp_path: Path) -> None:
    script = f"{sys.executable} -m training.cli order data.shards={tmp_path}/none >&- 2>&-; echo $?"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["2"]


def test_help_into_a_closed_pipe_and_onto_a_full_disk() -> None:
    full = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m training.cli > /dev/full"], capture_output=True, text=True
    )
    assert full.returncode == 1
    assert full.stderr == "cascade: the output cannot be written (No space left on device; make room)\n"
    script = f"{sys.executable} -m training.cli train --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines()[1] in ("0", "141")


def test_characters_that_the_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "training.cli", "sample", "prompts=\u00e4", "--cfg", "job"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "prompts: \\xe4\n" in done.stdout


def test_commands_inherit_no_variable_of_ours(fake_verb) -> None:
    import os

    seen: list[str | None] = []
    fake_verb(lambda config: seen.append(os.environ.get("HYDRA_FULL_ERROR")))
    cli.main(["train"])
    assert seen == [None]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cascade tr", {"train"}),
        ("cascade train stage=demo_s", {"stage=demo_sr"}),
        ("cascade train optimizer.l", {"optimizer.lr="}),
        ("cascade sample gu", {"guidance="}),
    ],
)
def test_shell_completion(line: str, expected: set[str], monkeypatch, capsys) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    cli.main(["-sc", "query=bash"])
    assert set(capsys.readouterr().out.split()) == expected


def test_shell_completion_can_be_installed(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cascade", "-sc", "install=bash"])
    cli.main()
    assert capsys.readouterr().out.rstrip().endswith("-F hydra_bash_completion cascade")
