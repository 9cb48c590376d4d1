"""How runs are displayed: the status page, the comparison of runs, remedies."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from slurm.commands import compare, status
from slurm.commands.compare import paired_difference
from slurm.jobs.remedies import remedy
from slurm.pages.curves import by_level, curves_of, thinned
from slurm.pages.page import status_html
from tests.browser import CHROMIUM, measured
from training.cli.compose import load_config


def make_run(folder: Path, lr: float = 1e-3, shift: float = 0.0, samples: int = 8, **settings: object) -> Path:
    """A run of 40 steps with two validations and a sample grid."""
    for name in ("logs", "samples", "validation"):
        (folder / name).mkdir(parents=True)
    found = {"train": {"steps": 40}, "stage": {"name": "base64"}, "data": {"global_batch": 8}, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump({**found, "optimizer": {"lr": lr}, "run": {"dir": str(folder)}}))
    lines = []
    for step in range(1, 41):
        line = {"step": step, "loss": 1 / step + shift, "images_per_second": 9.0, "loss_t/0.0-0.2": 0.5}
        if step % 20 == 0:
            line |= {"validation_loss_ema": 0.5 + shift, "validation_t/0.0-0.2": 0.2, "validation_t/0.2-0.4": 0.3}
            rng = np.random.default_rng(step)
            losses = (
                rng.uniform(0, 1, samples) + shift + np.random.default_rng(1).normal(0, 1e-3, samples) * bool(shift)
            )
            (folder / f"validation/step-{step:08d}.json").write_text(json.dumps({"step": step, "loss": list(losses)}))
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 41, "lo']))
    for step in (10, 20):
        Image.new("RGB", (1400, 300), "navy").save(folder / f"samples/step-{step:08d}.png")
    return folder


@pytest.fixture()
def page(tmp_path: Path) -> str:
    make_run(tmp_path / "runs/a")
    failed = make_run(tmp_path / "runs/b")
    (failed / "restarts.jsonl").write_text(
        json.dumps({"action": "end 76", "code": 76, "why": "gave up: <b>" + "x" * 99})
    )
    answer = status.main(load_config("status", [f"run.dir={tmp_path / 'runs'}", f"html={tmp_path / 'my page.html'}"]))
    assert [row["label"] for row in answer["runs"]] == ["a", "b"], "two of one stage"
    return (tmp_path / "my page.html").read_text()


def test_the_page_has_curves_samples_and_what_to_do(page: str) -> None:
    assert set(re.findall(r'(?:src|href)="(\w+):', page)) == {"data"} and "http" not in page
    assert page.count("<polyline") == 2 * (1 + 1 + 2 + 1), "loss, validation, its two levels, speed"
    assert "Held-out loss by noise level" in page
    assert page.count("<img") == 4 and page.index("Samples of step 20") < page.index("Samples of step 10")
    assert "gave up: &lt;b&gt;" in page and "optimizer.lr" in page


def test_a_curve_of_one_point_is_a_dot(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text('{"step": 20, "loss": 0.5}')
    status.main(load_config("status", [f"run.dir={run}", f"html={tmp_path / 'page.html'}"]))
    assert (tmp_path / "page.html").read_text().count("<circle") == 1


def test_the_page_says_why_other_jobs_failed(tmp_path: Path) -> None:
    log = tmp_path / "evaluate.log"
    log.write_text("cascade evaluate: no <b> shards\n")
    job = {"name": "evaluate", "verb": "evaluate", "state": "failed", "code": 2, "reason": None, "log": str(log)}
    page = status_html("runs", [], [job | {"note": status.note_on_job(job)}])
    assert f">with code 2 (no &lt;b&gt; shards), see {log}" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_the_page_in_a_browser(page: str, width: int, tmp_path: Path) -> None:
    """The page is laid out in a frame as wide as a phone: a window cannot be that narrow."""
    frame = f'<iframe srcdoc="{html.escape(page)}" style="width:{width}px;height:900px;border:0"></iframe>'
    script = (
        "<script>onload=()=>{const d=frames[0].document;document.title=[d.documentElement.scrollWidth,"
        "frames[0].innerWidth,[...d.images].filter(i=>i.complete&&i.naturalWidth>0).length,d.images.length].join(' ')}"
        "</script>"
    )
    scroll, inner, loaded, images = measured(f"<html><body>{frame}{script}</html>", 1400, tmp_path)
    assert scroll <= inner == width and loaded == images == 4


def test_the_advice_on_a_failure_is_that_of_the_page_on_training() -> None:
    said = remedy("rank 3: another rank died or did not respond within the time-outs (step 5, phase step, rank 1)")
    assert said and "the one named in brackets is not" in said and not said.startswith(("(", "*"))
    assert "optimizer.lr" in str(remedy("gave up", 76)), "by its code"
    words = "the last 5 steps were skipped (train.max_skipped), even after rolling back to the checkpoint of step 10"
    assert "optimizer.lr" in str(remedy(f"{words} (train.max_rollbacks)"))
    assert "memory_gb" in str(remedy("something else", 137)) or remedy("something else", 137) is None
    assert "look at the named rank's node" in str(remedy("something else", 78))
    assert remedy("something else") is None
    assert remedy("anything", 78, page=Path("/nowhere")) is None, "an installation without docs"


def test_curves(tmp_path: Path) -> None:
    curves = curves_of(make_run(tmp_path / "a"))
    assert len(curves["loss"]) == 40 and curves["loss"][-1] == (40, 1 / 40)
    prefix, levels = by_level(curves)
    assert prefix == "validation_t/" and list(levels) == ["0.0-0.2", "0.2-0.4"]
    assert by_level({"loss_t/0.0-0.2": curves["loss"]})[0] == "loss_t/"
    thin = thinned([(step, float(step)) for step in range(1000)], 10)
    assert len(thin) == 10 and thin[-1] == (999, 949.5)


# ------------------------------------------------------------------------------------------------------ comparing


def compared(*words: str) -> dict:
    return compare.main(load_config("compare", list(words)))


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a b"), make_run(tmp_path / "c", lr=2e-3, shift=0.1)
    answer = compared(str(a), str(b), f"output={tmp_path / 'new/compare.png'}")
    assert answer["settings"] == {"optimizer.lr": [1e-3, 2e-3]}
    (pair,) = answer["paired"]
    assert pair["step"] == 40 and pair["n"] == 8 and pair["difference"] == pytest.approx(0.1, abs=2e-3)
    low, high = pair["interval"]
    assert 0.095 < low < pair["difference"] < high < 0.105, "pairs: the spread of the samples is not in it"
    assert Image.open(answer["picture"]).size[0] == 900
    said = capsys.readouterr().out
    assert f"{a} is better" in said and "validation_loss_ema" in said and "x " + str(b) in said


def test_validations_with_different_settings_are_not_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", validation={"samples": 8})]
    (pair,) = compared(*map(str, runs), f"output={tmp_path / 'x.png'}")["paired"]
    assert pair["why"] == "their validations use different settings (validation.samples)"


def test_the_interval_of_a_paired_difference() -> None:
    found = paired_difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.8])
    assert found["difference"] == pytest.approx(0.6)
    half = 1.96 * np.std([0.5, 0.5, 0.8], ddof=1) / np.sqrt(3)
    assert found["interval"] == pytest.approx([0.6 - half, 0.6 + half])


@pytest.mark.parametrize(
    ("words", "error", "part"),
    [
        (["A"], ConfigError, "give at least two runs"),
        (["A", "A"], ConfigError, "the same run is listed twice"),
        (["A", "nowhere"], DataError, "nowhere: not a run"),
        (["A", "B", "curves=[colour]"], DataError, "none of them is in metrics.jsonl"),
        (["A", "B", "output=x.jpg"], ConfigError, "it must end in .png"),
    ],
)
def test_refused(tmp_path: Path, words: list[str], error: type[Exception], part: str) -> None:
    for name in "AB":
        make_run(tmp_path / name)
    with pytest.raises(error, match=part):
        compared(*(str(tmp_path / word) if "=" not in word else word for word in words))
