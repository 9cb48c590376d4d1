"""Clusters as sites run them: what a job's script does there, with shell scripts in place of the site's programs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import slurm.script
from data_pipeline.common.errors import ConfigError, UserError
from slurm import supervise
from slurm.client import clean_environment
from slurm.commands import resume, status, stop
from slurm.jobs import frozen
from slurm.jobs.records import append
from slurm.options import quoted
from slurm.queue import job_states
from tests.slurm.launching import FAKE, ONE_TASK, install, launch, run_script
from training.cli.compose import load_config
from training.run.directory import json_lines

OK = "ended with code 0"


@pytest.fixture()
def site(here: Path, program, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The programs of a site; the submitted program prints its arguments. A start that ended at once is repeated
    without a long pause."""
    monkeypatch.setattr(supervise, "PAUSE_S", 1)
    program('echo "ran: $*; FOO=$FOO"')
    return install(here / "site", **FAKE)


def script(*words: str, own: tuple[str, ...] = ()) -> Path:
    return Path(launch(*ONE_TASK, *words, own=["dry_run=true", *own])["script"])


# ------------------------------------------------------------------------------------------------- environment


def test_nothing_of_an_outer_allocation_reaches_the_job() -> None:
    outer = {"SLURM_CPU_BIND": "quiet", "SLURM_MEM_PER_CPU": "100", "SLURM_JOB_ID": "3", "SLURMD_NODENAME": "n1"}
    kept = {"SBATCH_ACCOUNT": "me", "SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin"}
    assert clean_environment({**outer, **kept, "SRUN_DEBUG": "3", "CASCADE_SRUN": "1"}) == kept
    assert clean_environment({"SBATCH_CLUSTERS": "a", "SLURM_CLUSTERS": "b"}) == {"SLURM_CLUSTERS": "a"}, "as sbatch"


def test_a_script_submitted_by_hand_forgets_the_outer_allocation(site: Path, program) -> None:
    program(
        'echo "bind: [$SLURM_CPU_BIND$SLURM_CPU_BIND_TYPE$SLURM_MEM_PER_CPU$RANK$LOCAL_RANK$WORLD_SIZE'
        '$SLURM_CONSTRAINT$SLURM_STDOUTMODE]"'
    )
    outer = {"SLURM_CPU_BIND": "x", "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_MEM_PER_CPU": "100"}
    outer |= {"SLURM_CONSTRAINT": "a100", "SLURM_STDOUTMODE": "none"}
    outer |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # of torchrun, or of a container's image
    done = run_script(script(), site, **outer)
    assert "bind: []" in done.stdout and OK in done.stdout


def test_nothing_is_exported_to_the_tasks(site: Path) -> None:
    path = script("cluster.sbatch={export: NONE}", "cluster.setup=[export FOO=bar]")
    done = run_script(path, site, SLURM_EXPORT_ENV="NONE")
    assert "#SBATCH --export=NONE\n" in path.read_text()
    assert "FOO=bar" in done.stdout and OK in done.stdout, done


# ------------------------------------------------------------------------------------------------------- set-up


def test_the_set_up_may_read_unset_variables(site: Path, here: Path) -> None:
    (here / "activate.sh").write_text('if [ -n "$NEVER_SET" ]; then :; fi\nfalse\nexport FOO=there\n')
    done = run_script(script("cluster.setup=[source activate.sh]"), site)
    assert "FOO=there" in done.stdout and OK in done.stdout, "what fails inside of a sourced file is that file's affair"


@pytest.mark.parametrize("options", ["set -u", "set -euo pipefail"])
def test_options_of_the_set_up_lines_end_with_them(site: Path, here: Path, program, options: str) -> None:
    """A user's `set -u` would end bash inside conda's scripts; the failing line is named, and failures later on are
    left to the program."""
    (here / "activate.sh").write_text('if [ -n "$NEVER_SET" ]; then :; fi\n')
    done = run_script(script(f"cluster.setup=['{options}','source activate.sh']"), site)
    assert re.search(r"cluster.setup: 'source activate.sh' failed with code \d+\n==> ended with code 2", done.stdout)
    program('[ -e once ] || { touch once; exit 78; }\necho "ran: again"')
    done = run_script(script(f"cluster.setup=['{options}','source activate.sh || true']"), site, NEVER_SET="1")
    assert "restart in this allocation" in done.stderr and "ran: again" in done.stdout and OK in done.stdout, done


@pytest.mark.parametrize("line", ["module load nosuch", "source absent.sh", "test -e absent"])
def test_a_line_that_fails_ends_the_job_and_is_named(site: Path, line: str) -> None:
    done = run_script(script(f"cluster.setup=['{line}','echo later']"), site)
    assert re.search(rf"cluster.setup: '{line}' failed with code \d+\n==> ended with code 2", done.stdout)
    assert "ran:" not in done.stdout and "later" not in done.stdout


@pytest.mark.parametrize(
    "setting",
    ["set -eu", "set -o pipefail; set -f; IFS=' '", "shopt -s expand_aliases; alias srun=false scontrol=false"],
)
def test_settings_of_the_shell_at_a_site(site: Path, here: Path, program, setting: str) -> None:
    """bash runs the file that BASH_ENV names before any script. Failures are expected there, as here of a rank."""
    (here / "site.sh").write_text(f"{setting}\n")
    program('[ -e once ] || { touch once; exit 78; }\necho "ran: again, port $MASTER_PORT"')
    done = run_script(script(), site, BASH_ENV=str(here / "site.sh"))
    assert re.search(r"ran: again, port \d+\n", done.stdout) and OK in done.stdout, done


def test_functions_of_a_users_shell_are_not_taken_for_programs(site: Path) -> None:
    """Some are exported to all programs, but not those that they call."""
    functions = {"cd": 'builtin cd "$@" && enter', "grep": 'command grep -n --color=always "$@"', "date": "false"}
    functions |= {"srun": 'echo wrapped; command srun "$@"', "ls": 'command ls -l "$@"'}
    done = run_script(
        script(), site, **{f"BASH_FUNC_{name}%%": f"() {{ {body}\n}}" for name, body in functions.items()}
    )
    assert "ran:" in done.stdout and OK in done.stdout and "wrapped" not in done.stdout, done


def test_set_up_lines_keep_their_effects_to_themselves(site: Path, here: Path, program) -> None:
    """Settings contain relative paths; a clean-up at the end is wanted."""
    (here / "elsewhere").mkdir()
    program('echo "in $PWD"')
    lines = [
        "cd elsewhere",
        'trap "echo cleaned > cleaned" EXIT',
        "shopt -s expand_aliases",
        "alias srun=false python=false",
    ]
    done = run_script(script(f"cluster.setup={lines}"), site)
    assert f"in {here}\n" in done.stdout and OK in done.stdout, done
    assert (here / "cleaned").exists()


def test_an_alias_is_not_taken_for_the_python_of_an_environment(site: Path, here: Path) -> None:
    (here / "env").mkdir()
    install(here / "env/bin", python='echo "python of the environment"')
    line = f'shopt -s expand_aliases; alias python=python3; export VIRTUAL_ENV="{here}/env" PATH="{here}/env/bin:$PATH"'
    assert "python of the environment" in run_script(script(f"cluster.setup=['{line}']"), site).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["cluster.setup=['PATH=/absent']"],
            "srun: not on PATH of .*; did a setup line \\(module purge\\) remove it",
        ),
        (["cluster.python=/absent/python"], "/absent/python: not on PATH of .*; install it where all nodes have it"),
    ],
)
def test_a_program_that_a_node_lacks(site: Path, here: Path, words: list[str], said: str) -> None:
    done = run_script(script(*words), site)
    assert re.search(rf"==> {said}", done.stdout) and "ended with code 2" in done.stdout and "ran:" not in done.stdout


def test_a_node_without_the_directory_of_the_launch(site: Path, here: Path) -> None:
    path = script()
    path.write_text(path.read_text().replace(f"cd {here} ", "cd /absent "))
    done = run_script(path, site)
    assert "==> this node does not have the directory of the launch; launch from" in done.stdout
    assert "ended with code 2" in done.stdout and "ran:" not in done.stdout


def test_records_follow_a_line_that_a_full_disk_has_cut_off(site: Path, here: Path, program) -> None:
    program("[ -e once ] || { touch once; exit 78; }")
    path = script()
    for name in ("launch/events.jsonl", "restarts.jsonl"):
        (path.parents[1] / name).write_text('{"name": "tra')
    assert OK in run_script(path, site).stdout
    assert [event["code"] for event in json_lines(path.parent / "events.jsonl")] == [0]
    assert [end["code"] for end in json_lines(path.parents[1] / "restarts.jsonl")] == [78]


def test_the_queue_is_asked_about_this_job_alone(site: Path, here: Path, program) -> None:
    """With several clusters squeue prints more, and its filters may hide the job."""
    program('[ -e once ] || { touch once; exit 78; }\necho "ran: again"')
    install(site, squeue='[ -z "$SLURM_CLUSTERS$SQUEUE_STATES" ] || echo CLUSTER: gpu\necho RUNNING')
    done = run_script(script(), site, SLURM_CLUSTERS="gpu", SQUEUE_STATES="PENDING")
    assert "ran: again" in done.stdout and OK in done.stdout, done


def test_an_environment_that_is_activated_brings_its_python(site: Path, here: Path) -> None:
    (here / "env").mkdir()
    install(here / "env/bin", python='echo "python of the environment"')
    (here / "env/bin/activate").write_text(f'VIRTUAL_ENV="{here}/env"; PATH="{here}/env/bin:$PATH"; export PATH\n')
    done = run_script(script("cluster.venv=env"), site)
    assert "python of the environment" in done.stdout and "ran:" not in done.stdout
    assert "ran:" in run_script(script(), site).stdout, "else it is the one that launched"


def test_conda_by_key(site: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = 'conda() { echo "$*" > activated; CONDA_PREFIX=/env/$2; [ "$2" != absent ]; }'
    monkeypatch.setenv("CONDA_EXE", str(install(here / "conda", conda=f"echo '{hook}'") / "conda"))
    run_script(script("cluster.conda=mine"), site)
    assert (here / "activated").read_text() == "activate mine\n"
    done = run_script(script("cluster.conda=absent"), site)
    assert "==> cluster.conda: 'conda activate absent' failed with code 1\n" in done.stdout
    monkeypatch.setenv("CONDA_EXE", "/absent/conda")
    done = run_script(script("cluster.conda=mine"), site)
    assert "==> cluster.conda: '/absent/conda shell.bash hook' failed with code 127\n" in done.stdout
    assert OK not in done.stdout


def test_a_virtual_environment_that_a_node_lacks_is_named(site: Path, here: Path) -> None:
    done = run_script(script("cluster.venv=env"), site)
    assert f"==> cluster.venv: 'source {here}/env/bin/activate' failed with code 1\n" in done.stdout


def test_modules_by_key_are_there_afterwards(site: Path, here: Path) -> None:
    (here / "modules/init").mkdir(parents=True)
    (here / "modules/init/bash").write_text(  # like old versions: 0 even for a module that does not exist
        'LOADEDMODULES=\nmodule() { case $2 in cuda*) LOADEDMODULES="$LOADEDMODULES:$2/12.4";; esac; }\n'
    )
    place = {"MODULESHOME": str(here / "modules")}
    assert OK in run_script(script("cluster.modules=[cuda]"), site, **place).stdout
    done = run_script(script("cluster.modules=[cuda,nosuch]"), site, **place)
    assert "==> cluster.modules: 'module load nosuch' failed with code 1\n" in done.stdout
    assert "ended with code 2" in done.stdout and "ran:" not in done.stdout


# --------------------------------------------------------------------------------------------------- containers


def test_pyxis(site: Path, here: Path) -> None:
    words = ("cluster.container=nvcr.io#nvidia/pytorch:26.01-py3", "cluster.container_mounts=[/data:/data]")
    done = run_script(script(*words, "cluster.python=program"), install(site, program='echo "inside: $*"'))
    options = (here / "options").read_text()
    assert "--container-image=nvcr.io#nvidia/pytorch:26.01-py3\n" in options
    assert f"--container-mounts={here}:{here},/data:/data\n" in options, "runs and code lie below the directory"
    assert "inside: -P -m slurm.task program -P -m training.cli train" in done.stdout


def test_apptainer(site: Path, here: Path) -> None:
    install(
        site, apptainer='echo "apptainer $*" >> contained\nwhile [ "$1" != img.sif ]; do shift; done\nshift\nexec "$@"'
    )
    words = ("cluster.container=img.sif", "cluster.container_runtime=apptainer", f"cluster.python={sys.executable}")
    done = run_script(script(*words, "run.dir=my runs/x"), site)
    assert "ran: -m training.cli train" in done.stdout and OK in done.stdout
    assert (here / "contained").read_text().startswith(f"apptainer exec --bind {here}:{here} --pwd {here} img.sif ")


# ------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("given", "there", "gone"),
    [
        ("{mem-per-cpu: 2G}", "--mem-per-cpu=2G", "--mem="),
        ("{gpus-per-task: 1}", "--gpus-per-task=1", "--gpus-per-node"),
        ("{gres: 'gpu:a100:4'}", "--gres=gpu:a100:4", "--gpus-per-node"),
        ("{mem: null}", "--time=", "--mem"),
        ("{p: long}", "--partition=long", "--partition=short"),
        ("{mem_per_cpu: 2G}", "--mem-per-cpu=2G\n", "--mem="),
        ("{L: 'matlab:1'}", "--licenses=matlab:1\n", "--L"),
        ("{exclude: ['gpu-[001-016,020]',n2]}", "--exclude=gpu-[001-016,020],n2\n", '--exclude="['),
        ("{begin: 16:00, account: 2024_05}", "--begin=16:00\n", "--account=202405"),
    ],
)
def test_an_option_replaces_the_one_of_ours_that_it_excludes(here: Path, given: str, there: str, gone: str) -> None:
    words = ["cluster=slurm", "cluster.mem=4G", "cluster.partition=short", f"cluster.sbatch={given}"]
    text = Path(launch(*words, own=["dry_run=true"])["script"]).read_text()
    assert f"#SBATCH {there}" in text and f"#SBATCH {gone}" not in text


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["cluster.sbatch={mem: 1G, mem-per-cpu: 1G}"], "mem and mem-per-cpu exclude each other"),
        (
            ["cluster.sbatch={requeue: false}"],
            "cluster.sbatch.requeue: the script would ignore it; set cluster.",
        ),
        (["cluster.sbatch={tres-per-task: 'cpu=2'}"], "cluster.sbatch.tres-per-task: the script would ignore it; set"),
        (["cluster.sbatch={het-group: 1}"], "cluster.sbatch.het-group: a job with several components"),
        (["cluster.sbatch={gres: {gpu: 4}}"], "cluster.sbatch.gres={'gpu': 4}: write the value as for sbatch"),
        (["cluster.sbatch={array: 0-3}"], "all its tasks would write to the same run.dir"),
        (["cluster.time='1:00'", "cluster.signal_s=60"], "cluster.time=1:00: these 60 s leave no time to work"),
        (["cluster.sbatch={time: 3}"], "cluster.sbatch.time=3: these 180 s"),
        (["run.dir='a\\b'"], "run.dir: Slurm cannot write a log to"),
        (["cluster.sbatch={output: 'out/%j/log'}"], "cluster.sbatch.output=out/%j/log: Slurm does not create"),
        (["cluster.sbatch={error: '%5j/log'}"], "cluster.sbatch.error=%5j/log: Slurm does not create"),
        (["cluster.conda=a", "cluster.venv=b"], "cluster.conda=a and cluster.venv=b"),
        (["cluster.container_mounts=[a:b]"], "cluster.container_mounts: it needs cluster.container"),
        (["cluster.nodes=2", "cluster.min_nodes=3"], "cluster.min_nodes=3"),
    ],
)
def test_options_that_cannot_work_are_refused(here: Path, words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        script(*words)
    assert not list(here.iterdir())


def test_numbers_that_are_names(here: Path) -> None:
    answer = launch(*ONE_TASK, "cluster.sbatch.account=2024_05", "cluster.sbatch.begin=16:00", own=["dry_run=true"])
    lines = Path(answer["script"]).read_text().splitlines()
    assert "#SBATCH --account=2024_05" in lines and "#SBATCH --begin=16:00" in lines


def test_the_log_is_named_where_it_is(here: Path) -> None:
    answer = launch(*ONE_TASK, "cluster.sbatch={output: x.log}", own=["dry_run=true"])
    assert answer["log"] == str(here / "x.log")
    answer = launch(*ONE_TASK, "cluster.sbatch={-o: x.log}", own=["dry_run=true"])
    assert answer["log"] == str(here / "x.log")
    answer = launch(*ONE_TASK, "cluster.sbatch={output: 'out/%x-%j.log'}", own=["dry_run=true"])
    assert answer["log"] == str(here / "out/demo-demo_base-%j.log") and (here / "out").is_dir()
    answer = launch(*ONE_TASK, "cluster.sbatch={a: 0-3}", own=["verb='embed output=e'", "dry_run=true"])
    assert answer["log"].endswith("/logs/slurm-%A-%a.log")
    answer = launch(*ONE_TASK, "run.dir='50%n'", own=["dry_run=true"])
    assert f"#SBATCH --output={here}/50%%n/logs/slurm-%j.log\n" in Path(answer["script"]).read_text()


@pytest.mark.parametrize(
    ("words", "own", "pattern", "log"),
    [
        (["run.dir='%j-%A'"], [], "%%j-%%A/logs/slurm-%j.log", "%j-%A/logs/slurm-17.log"),
        (["run.dir='%j'", "cluster.sbatch={a: 0-3}"], ["verb='embed output=e'"], "%%j/logs/slurm-%A-%a.log",
         "%j/logs/slurm-17-%a.log"),
        (["cluster.sbatch={output: '%5j%%j-%x'}"], [], "%5j%%j-%x", "00017%j-demo-demo_base"),
    ],
)  # fmt: skip
def test_patterns_of_slurm_in_names(
    site: Path, here: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], own: list[str], pattern: str, log: str
) -> None:
    """Only those of the log's name are replaced, also in the records."""
    (here / "%x").mkdir()
    monkeypatch.chdir(here / "%x")
    install(site, sbatch="echo 17")
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    answer = launch(*ONE_TASK, *words, own=own)
    assert f"#SBATCH --output={here}/%%x/{pattern}\n" in Path(answer["script"]).read_text()
    (record,) = json_lines(Path(answer["script"]).parent / "jobs.jsonl")
    assert record["log"] == answer["log"] == f"{here}/%x/{log}"


def test_quotation_marks_and_backslashes_of_directives() -> None:
    """sbatch takes a backslash as an escape, also between quotation marks."""
    assert quoted("output", 'a "b"/c') == '"a \\"b\\"/c"' and quoted("comment", "a\\b") == '"a\\\\b"'
    with pytest.raises(ConfigError, match="it must not contain line breaks"):
        quoted("account", "a\nb")


def test_a_gpu_per_task(here: Path) -> None:
    text = Path(launch("cluster=slurm", "cluster.gpus_per=task", own=["dry_run=true"])["script"]).read_text()
    assert "#SBATCH --gpus-per-task=1\n" in text and "gpus-per-node" not in text


@pytest.mark.parametrize(("verb", "gpus", "cores"), [("index", None, 8), ("bundle", None, 8), ("embed", 8, 64)])
def test_a_command_asks_for_what_it_uses(here: Path, verb: str, gpus: int | None, cores: int) -> None:
    text = Path(launch("cluster=slurm", own=[f"verb={verb}", "dry_run=true"])["script"]).read_text()
    assert f"#SBATCH --cpus-per-task={cores}\n" in text
    assert (f"#SBATCH --gpus-per-node={gpus}\n" in text) if gpus else ("gpus" not in text)


def test_the_number_of_nodes_may_vary(here: Path) -> None:
    words = [*ONE_TASK, "cluster.nodes=4", "cluster.min_nodes=1", "data.global_batch=8"]
    text = Path(launch(*words, own=["dry_run=true"])["script"]).read_text()
    assert "#SBATCH --nodes=1-4\n" in text and "for count in 4 2 1; do" in text, "3 cannot share 8 samples"
    assert "--ntasks-per-node" not in text.split("unset SLURM")[0], "sbatch would allocate one node for one task"
    assert "#SBATCH --cpus-per-task=8\n" in text
    with pytest.raises(ConfigError, match=r"cluster\.gpus_per=task: Slurm would allocate at most 1 of"):
        script("cluster.nodes=4", "cluster.min_nodes=1", "cluster.gpus=true", "cluster.gpus_per=task")


# ------------------------------------------------------------------------------------------------------- requeue


def test_a_requeue_that_slurm_refuses_is_reported(site: Path, here: Path, program) -> None:
    """A site may not let users requeue, or scontrol may be missing on its compute nodes."""
    program("exit 75")
    denied = "slurm_requeue error: Access/permission denied"
    install(site, scontrol=f'[ "$1" != requeue ] || {{ echo "{denied}" >&2; exit 1; }}')
    done = run_script(script(), site)
    assert f"==> Slurm did not requeue this job ({denied}); continue it with: cascade resume run={here}" in done.stdout
    assert "ended with code 75" in done.stdout and done.returncode == 75


def test_a_requeue_waits_for_slurm_to_answer(site: Path, here: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.script, "ANSWER_S", 0)
    program("exit 75")
    silent = "slurm_requeue error: Unable to contact slurm controller (connect failure)"
    tries = f'echo >> tries; [ $(wc -l < tries) -gt 2 ] || {{ echo "{silent}" >&2; exit 1; }}'
    install(site, scontrol=f'[ "$1" != requeue ] || {{ {tries}; }}', sleep="true")
    done = run_script(script(), site)
    assert (here / "tries").read_text() == "\n\n\n" and "did not requeue" not in done.stdout


def test_a_requeue_works_on_compute_nodes_without_scontrol(site: Path, program) -> None:
    program('echo "at $MASTER_ADDR"')
    install(site, scontrol="exit 127")
    assert "at n1" in run_script(script(), site, SLURMD_NODENAME="n1").stdout


# --------------------------------------------------------------------------------------------------- frozen code


def test_the_job_imports_the_code_of_its_submission(site: Path, here: Path, program) -> None:
    program('exec "$REAL" -P -c "import slurm, training; print(slurm.__file__, training.__file__)"')
    path = script()
    (code,) = (here / "runs/demo/demo_base/launch/code").iterdir()
    done = run_script(path, site, REAL=sys.base_prefix + "/bin/python3")
    assert f"{code}/slurm/__init__.py {code}/training/__init__.py" in done.stdout, done
    assert script() != path and len(list(code.parent.iterdir())) == 1, "the same code is kept once"
    assert OmegaConf.load(code / "frozen.json").keys() == {"commit", "dirty"}


def test_a_checkout_as_people_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without git, with a dangling link, hidden and untracked files, and with data among the code."""
    tree = tmp_path / "tree"
    for name in frozen.PACKAGES:
        (tree / name).mkdir(parents=True)
        (tree / name / "__init__.py").write_text("")
    (tree / "conf/untracked.yaml").write_text("a: 1")
    (tree / "conf/.secret").write_text("x")
    (tree / "conf/gone.yaml").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(frozen, "_place", lambda name: tree / name)
    monkeypatch.setattr(frozen, "code_version", lambda: {"commit": None, "dirty": True, "versions": {}})
    code = frozen.freeze(tmp_path / "code")
    assert {path.name for path in (code / "conf").iterdir()} == {"__init__.py", "untracked.yaml"}
    assert OmegaConf.load(code / "frozen.json") == {"commit": None, "dirty": True}
    os.mkfifo(tree / "conf/pipe")  # any file that cannot be copied
    with pytest.raises(UserError, match=r"other: the code of the job could not be copied there: .*conf/pipe"):
        frozen.freeze(tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())
    (tree / "conf/pipe").unlink()
    with open(tree / "conf/weights.bin", "wb") as file:
        file.truncate(frozen.MOST_BYTES + 1)
    with pytest.raises(UserError, match=r"weights\.bin: 210 MB among the code"):
        frozen.freeze(tmp_path / "code")


def test_a_module_of_the_directory_replaces_nothing(site: Path, here: Path) -> None:
    (here / "training.py").write_text("raise SystemExit('shadowed')")
    (here / "slurm.py").write_text("raise SystemExit('shadowed')")
    done = run_script(script(), site)
    assert OK in done.stdout and "shadowed" not in done.stdout + done.stderr
    assert '"$python" -P -m training.cli train ' in script().read_text()


# --------------------------------------------------------------------------------------------- before submission


def test_a_live_run_is_not_launched_again(site: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, sbatch="echo 4711", squeue='echo "PENDING|(Resources)"')
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    launch(*ONE_TASK)
    with pytest.raises(UserError, match=r"job 4711 of this run is in the queue \(PENDING\)"):
        launch(*ONE_TASK)
    install(site, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert launch(*ONE_TASK)["job_id"] == 4711
    install(site, squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UserError, match="job 4711 of this run may be in the queue: squeue does not answer"):
        launch(*ONE_TASK)
    state = status.main(load_config("status", ["run.dir=runs/demo"]))["runs"][0]
    assert (state["state"], state["why"]) == ("unknown", "squeue does not answer")
    with pytest.raises(UserError, match="it is not known whether job 4711 is alive"):
        resume.main(load_config("resume", ["run.dir=runs/demo"]))


def test_resume_names_the_log_of_the_new_job(site: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, sbatch="echo 17", squeue="echo 'Invalid job id specified' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    launch(*ONE_TASK, "run.dir=runs/17")
    install(site, sbatch="echo 18")
    assert [one["job"] for one in resume.main(load_config("resume", ["run.dir=runs/17"]))["resumed"]] == [18]
    (row,) = status.main(load_config("status", ["run.dir=runs/17"]))["runs"]
    assert (row["state"], row["step"], row["job"]) == ("stopped", 0, None), "it was cancelled before it began"
    append(here / "runs/17/launch/events.jsonl", {"name": "train", "what": "ended", "code": 2, "job": 18, "time": 1})
    (row,) = status.main(load_config("status", ["run.dir=runs/17"]))["runs"]
    assert row["state"] == "failed" and row["error"].startswith("job 18 ended with code 2, see ")
    last = json_lines(here / "runs/17/launch/jobs.jsonl")[-1]
    assert last["log"] == str(here / "runs/17/logs/slurm-18.log"), "the directory keeps its name"


def ended(home: Path, name: str, job: int, code: int | None, *after: str, launch: str = "a", **more: object) -> None:
    """Records a job that has left the queue, with its script."""
    script = home / "launch" / f"{name}.sbatch"
    record = {"name": name, "verb": "index", "job": job, "home": str(home), "script": str(script), "time": job}
    append(script.parent / "jobs.jsonl", {**record, "log": f"{job}.log", "after": after, "launch": launch, **more})
    script.write_text("#!/bin/bash\n")
    if code is not None:
        append(script.parent / "events.jsonl", {"name": name, "what": "ended", "code": code, "job": job, "time": 1})


@pytest.fixture()
def calls(site: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which sbatch records its calls. It numbers jobs from 101; squeue knows no earlier ones."""
    install(site, sbatch='echo "$*" >> calls; echo $((100 + $(wc -l < calls)))')
    install(site, squeue="echo 'Invalid job id specified' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    return here / "calls"


def test_resume_distinguishes_runs_whose_jobs_have_the_same_name(calls: Path, here: Path) -> None:
    """As in a sweep."""
    ended(here / "runs/lr=1", "train", 1, 0)
    ended(here / "runs/lr=2", "train", 2, 1)
    ended(here / "runs/lr=3", "train", 3, 1)
    answer = resume.main(load_config("resume", ["run.dir=runs"]))
    assert answer["left"] == {"train (runs/lr=1)": "complete"}
    assert [call.split("/runs/")[1] for call in calls.read_text().splitlines()] == [
        "lr=2/launch/train.sbatch",
        "lr=3/launch/train.sbatch",
    ]


def test_resume_submits_what_others_wait_for_first(calls: Path, here: Path) -> None:
    """Regardless of the order of their last submission; the names are those of the same launch."""
    for number, launch_id in enumerate("ab"):
        jobs = here / f"runs/{launch_id}/jobs"
        ended(jobs, "watch", 10 * number + 1, 1, "train", launch=launch_id, when="begun")
        ended(jobs, "index", 10 * number + 2, 1, launch=launch_id)
        ended(jobs, "train", 10 * number + 3, 1, "index", launch=launch_id)
    resume.main(load_config("resume", ["run.dir=runs"]))
    waits = [re.search(r"--dependency=(\S+) .*/runs/(.)/", call) for call in calls.read_text().splitlines()]
    assert [match and (match[2], match[1]) for match in waits] == [
        None, None, ("a", "afterok:101"), ("b", "afterok:102"),
        ("a", "after:103,afterok:101"), ("b", "after:104,afterok:102"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("array", "codes", "state", "reason"),
    [
        ("0-2", [0, 0, 0], "complete", None),
        ("0-2%2", [0, 0], "failed", "1 of 3 tasks did not end"),
        ("1,4-8:2", [0, 0, 0, 0], "complete", None),
        ("0-2", [0, 1], "failed", None),
    ],
)
def test_an_array_is_complete_with_all_of_its_tasks(
    calls: Path, here: Path, array: str, codes: list[int], state: str, reason: str | None
) -> None:
    """A task that Slurm ended could not record that it is complete."""
    ended(here, "embed", 7, None, array=array)
    for code in codes:
        append(here / "launch/events.jsonl", {"name": "embed", "what": "ended", "code": code, "job": 7, "time": 1})
    (job,) = job_states(here)
    assert (job["state"], job["reason"]) == (state, reason)


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        ("SIGNALING", "running"),
        ("STAGE_OUT", "running"),
        ("SPECIAL_EXIT", "pending"),
        ("PREEMPTED", "cancelled"),
        ("CLUSTER: gpu\nPENDING", "pending"),
        ("CLUSTER: gpu\nCANCELLED", "cancelled"),
    ],
)
def test_a_job_counts_as_alive_until_squeue_says_that_it_ended(
    calls: Path, site: Path, here: Path, state: str, shown: str
) -> None:
    ended(here, "train", 7, None)
    install(site, squeue=f'echo "{state}|n1"')
    assert [job["state"] for job in job_states(here)] == [shown]


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("PartitionTimeLimit", "set cluster.time within"),
        ("QOSMaxWallDurationPerJobLimit", "one job may not request as much"),
        ("QOSMaxGRESPerJob", "one job may not request as much"),
        ("launch failed requeued held", "`scontrol release 7`"),
        ("Resources", ""),
        ("QOSMaxJobsPerUserLimit", ""),
    ],
)
def test_a_job_that_would_wait_forever(calls: Path, site: Path, here: Path, reason: str, advice: str) -> None:
    ended(here, "train", 7, None)
    install(site, squeue=f'echo "PENDING|({reason})"')
    (job,) = job_states(here)
    assert job["reason"].startswith(reason) and advice in job["reason"] and (advice or job["reason"] == reason)


def test_squeue_is_asked_once_about_each_job(calls: Path, site: Path, here: Path) -> None:
    ended(here / "runs/a", "train", 7, None, verb="train")
    ended(here / "runs/jobs", "embed", 8, None)
    install(site, squeue='echo >> asked; echo "RUNNING|n1"')
    answer = status.main(load_config("status", ["run.dir=runs"]))
    assert [row["state"] for row in [*answer["runs"], *answer["jobs"]]] == ["running", "running"]
    assert (here / "asked").read_text() == "\n\n"


@pytest.mark.parametrize(
    "said",
    [
        "4711",
        "4711;gpu",
        "lua: please read the news\n4711",
        "Submitted batch job 4711 on cluster gpu",
        "4711\n==> thanks",
        "\x1b[32mSubmitted batch job 4711\x1b[0m",
        "Submitted batch job 4711 to partition gpu.",
    ],
)
def test_the_job_number_is_read_whatever_else_sbatch_prints(
    site: Path, here: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    install(site, sbatch=f"printf '%s\n' {shlex.quote(said)}; echo 'sbatch: warning: old partition' >&2")
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    assert launch(*ONE_TASK)["job_id"] == 4711


def test_a_missing_job_number_of_sbatch_is_an_error(site: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, sbatch="echo welcome to 12 nodes")
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="sbatch printed no job number, but 'welcome to 12 nodes'"):
        launch(*ONE_TASK)


@pytest.mark.parametrize(
    ("refusal", "hint"),
    [
        ("Batch job submission failed: Invalid job array specification", "at most MaxArraySize tasks"),
        ("QOSMaxSubmitJobPerUserLimit", "limits how many jobs you may have in the queue"),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "limits how many jobs",
        ),
        ("Invalid account or account/partition combination specified", "set cluster.account and cluster.partition"),
        ("invalid partition specified: gpu", "set cluster.partition; `sinfo -s`"),
        ("Requested node configuration is not available", "no node has the resources requested per node"),
        ("Socket timed out on send/recv operation", "`squeue --me` whether it accepted the job"),
        ("sbatch: unrecognized option '--qoss=high'", "check the names in cluster.sbatch"),
        ("Batch job submission failed: More processors requested than permitted", "no node has the resources"),
        ("Invalid feature specification", "set 'cluster.sbatch={constraint: NAME}'"),
        ("Requested reservation is invalid", "to one that you may use (`scontrol show reservation`)"),
    ],
)
def test_a_graph_is_submitted_whole_or_not_at_all(
    site: Path, here: Path, monkeypatch: pytest.MonkeyPatch, refusal: str, hint: str
) -> None:
    refuse = f"[ $n -lt 2 ] || {{ echo {shlex.quote(refusal)} >&2; exit 1; }}"
    refuse = f"n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) > n\n{refuse}"
    install(site, sbatch=f"{refuse}\necho $((100 + n))", scancel='echo "$*" > cancelled')
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=re.escape(refusal) + ".*" + re.escape(hint)) as error:
        launch(*ONE_TASK, own=["verb=all"])
    assert "the 2 jobs of this launch submitted before it were cancelled" in str(error.value)
    assert (here / "cancelled").read_text() == "100 101\n"


def test_the_users_defaults_do_not_overrule_the_script(site: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sbatch, its environment variables take precedence over the script's lines."""
    install(site, sbatch="env | grep SBATCH_ > given; echo 1")
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    overruling = (
        "SIGNAL",
        "TIMELIMIT",
        "ARRAY_INX",
        "NO_REQUEUE",
        "REQUEUE",
        "OUTPUT",
        "OPEN_MODE",
        "WAIT",
        "PARTITION",
    )
    kept = ("ACCOUNT", "QOS", "RESERVATION", "EXPORT")
    for name in (*overruling, *kept, "MEM_PER_CPU"):
        monkeypatch.setenv(f"SBATCH_{name}", "x")
    launch(*ONE_TASK, "cluster.partition=mine", "cluster.mem=4G")
    assert sorted((here / "given").read_text().split()) == sorted(f"SBATCH_{name}=x" for name in kept)


def test_a_training_without_data_is_refused_before_it_waits(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.shards: it is not set; give"):
        launch("cluster=slurm", "data.shards=null")


# ------------------------------------------------------------------------------------- commands that do not answer


@pytest.fixture()
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.queue.SUBMIT_S", 1)
    monkeypatch.setattr("slurm.client.PATIENCE_S", 1)
    monkeypatch.setattr("slurm.queue._silent_until", 0.0)


def test_sbatch_that_does_not_answer(calls: Path, site: Path, here: Path, impatient) -> None:
    install(site, sbatch="exec sleep 60")
    with pytest.raises(UserError, match=r"sbatch did not answer within 1 s; check with `squeue --me` whether"):
        launch(*ONE_TASK)


def test_what_sbatch_says_about_an_accepted_job_is_shown(
    calls: Path, site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's plugin may change the job, and sbatch may have to wait."""
    monkeypatch.setattr("slurm.client.QUIET_S", 0.1)
    install(site, sbatch="sleep 0.3; echo 'sbatch: lua: moved to partition long' >&2; echo 4711")
    assert launch(*ONE_TASK)["job_id"] == 4711
    errors = capsys.readouterr().err
    assert "sbatch: lua: moved to partition long" in errors and "sbatch has not answered yet; waiting 24" in errors


def test_stop_tries_all_jobs_and_names_those_that_it_could_not_cancel(calls: Path, site: Path, here: Path) -> None:
    for job in (7, 8, 9):
        ended(here / "jobs", f"embed-{job}", job, None)
    denied = "scancel: error: Kill job error on job id 8: Access/permission denied"
    install(
        site,
        squeue='echo "RUNNING|n1"',
        scancel=f'echo "$*" >> asked; [[ " $* " != *" 8 "* ]] || {{ echo "{denied}" >&2; false; }}',
    )
    with pytest.raises(UserError, match=r"not cancelled \(.*Access/permission denied\): .* run `scancel 8`"):
        stop.main(load_config("stop", ["run.dir=jobs"]))
    assert (here / "asked").read_text() == "7 8 9\n7\n8\n9\n"


def test_stop_does_not_wait_for_slurm_once_for_each_job(calls: Path, site: Path, here: Path, impatient) -> None:
    for job in (7, 8):
        ended(here / "jobs", f"embed-{job}", job, None)
    install(site, squeue='echo "RUNNING|n1"', scancel="echo >> asked; exec sleep 60")
    with pytest.raises(UserError, match=r"scancel did not answer within 1 s\): .* run `scancel 7 8`"):
        stop.main(load_config("stop", ["run.dir=jobs"]))
    assert (here / "asked").read_text() == "\n"


def test_jobs_that_could_not_be_withdrawn_are_named(calls: Path, site: Path, here: Path) -> None:
    install(
        site, sbatch="[ -e once ] && { echo no >&2; exit 1; }; touch once; echo 100", scancel="echo down >&2; exit 1"
    )
    with pytest.raises(UserError, match=r"could be cancelled \(down\): scancel 100"):
        launch(*ONE_TASK, own=["verb=all"])


def test_the_users_filters_hide_no_job(calls: Path, site: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(here / "jobs", "embed", 7, None)
    install(site, squeue='[ -n "$SQUEUE_STATES" ] || echo "RUNNING|n1"')
    install(site, scancel='[ -n "$SCANCEL_STATE" ] || echo >> cancelled')
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SCANCEL_STATE", "PENDING")
    assert stop.main(load_config("stop", ["run.dir=jobs"])) == {"stopped": [7]}
    assert (here / "cancelled").exists()
