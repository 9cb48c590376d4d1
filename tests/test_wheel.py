"""What a wheel contains: one package, which leaves names such as `training` to others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cascade_t2i

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
import training
assert training.WHO == "somebody else"
import cascade_t2i
from cascade_t2i import Cascade, ShardStream, ShardWriter, decode, evaluate, index_shard, load_config
assert load_config("train", ["experiment=demo"]).stage.name == "demo_base"
ours = [m for m in sys.modules if m.partition(".")[0] in ("training", "data_pipeline", "slurm", "conf")]
assert ours == ["training"] and cascade_t2i.__file__.startswith(sys.argv[1]), ours
import cascade_t2i.slurm.jobs.frozen as frozen
from pathlib import Path
code = frozen.freeze(Path(sys.argv[1], "code"))
assert sorted(path.name for path in code.iterdir() if path.is_dir()) == ["cascade_t2i"]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel puts into site-packages, next to another package called `training`."""
    site = tmp_path_factory.mktemp("site-packages")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(site)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert [path.name for path in site.iterdir()] == ["cascade_t2i"]
    (site / "training").mkdir()
    (site / "training" / "__init__.py").write_text('WHO = "somebody else"')
    return site


def run(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, "-P", *words], cwd=site.parent, env=environ, capture_output=True, text=True)


def test_the_wheel_coexists_with_a_package_of_the_same_name(site: Path) -> None:
    done = run(site, "-c", PROGRAM, str(site))
    assert done.returncode == 0, done.stderr


def test_the_program_of_the_wheel_and_its_processes_work(site: Path, tmp_path: Path) -> None:
    words = [f"prepare.output={tmp_path}", "prepare.draw.count=8", "prepare.draw.heldout=8", "json=true"]
    done = run(site, "-m", "cascade_t2i", "prepare", "experiment=demo", *words)
    assert done.returncode == 0 and '"samples": 8' in done.stdout, done.stderr
    loader = """
import sys
from cascade_t2i.data_pipeline.config import DataConfig
from cascade_t2i.data_pipeline.reading.loader import Loader
loader = Loader(DataConfig(shards=sys.argv[1], global_batch=8), image_size=16, own_process=True)
assert len(next(loader)[0].keys) == 8
loader.close()
"""
    done = run(site, "-c", loader, f"{tmp_path}/train")
    assert done.returncode == 0, done.stderr


def test_remedies_for_errors_are_in_the_wheel(site: Path) -> None:
    known = "from cascade_t2i.slurm.jobs.remedies import remedy; print(remedy('', 2))"
    done = run(site, "-c", known)
    assert done.returncode == 0 and "start again" in done.stdout, done.stderr


def test_every_name_of_the_short_import_is_there() -> None:
    assert {name for name in cascade_t2i.__all__ if getattr(cascade_t2i, name)} <= {*dir(cascade_t2i)}
    with pytest.raises(AttributeError, match="no attribute 'cascade'"):
        _ = cascade_t2i.cascade  # type: ignore[attr-defined]
