"""The plan's numbers compared with sums done by hand, and the doctor on real shards."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.commands import prepare
from data_pipeline.common.errors import ConfigError, StoreError, UserError
from data_pipeline.storage import store
from training.cli.compose import load_config
from training.config.commands import PlanCommand
from training.config.unet import for_stage
from training.plan.checks import check
from training.plan.devices import planned_device
from training.plan.doctor import Trial, checkpoint_store, scratch_in, settings
from training.plan.flops import training_flops
from training.plan.plan import cost, main, make_plan, speed
from training.plan.table import table
from training.text.cost import text_cost


def plan_config(**changes: Any) -> PlanCommand:
    config = PlanCommand()
    config.stage.model.preset = "tiny_base"
    config.text.dim, config.text.max_tokens = 32, 12
    config.data.global_batch = 64
    config.cluster = replace(config.cluster, kind="slurm", nodes=1, processes=4)
    config.train.steps = 100
    for key, value in changes.items():
        *path, name = key.split("__")
        section: Any = config
        for part in path:
            section = getattr(section, part)
        setattr(section, name, value)
    return config


def test_state_is_what_zero_says_it_is() -> None:
    first, third = make_plan(plan_config(zero__stage=1)), make_plan(plan_config(zero__stage=3))
    n = first["parameters"]
    share = -(-n // 4)
    assert first["memory"]["weights"] == 4 * n
    assert third["memory"]["weights"] == 4 * share
    assert first["memory"]["moments"] == 8 * share
    assert first["memory"]["ema"] == 4 * share
    assert first["checkpoint_bytes"] == 16 * n
    assert first["memory"]["total"] == sum(
        value for part, value in first["memory"].items() if part not in ("total", "host", "moment")
    )


def test_adapters_leave_little_to_train() -> None:
    whole, adapters = make_plan(plan_config()), make_plan(plan_config(lora__rank=2))
    frozen, trained = whole["parameters"], adapters["trained_parameters"]
    assert whole["trained_parameters"] == frozen and adapters["parameters"] == frozen + trained < 1.5 * frozen
    assert adapters["memory"]["moments"] == pytest.approx(8 * trained / adapters["world_size"], rel=0.01)
    assert adapters["checkpoint_bytes"] / whole["checkpoint_bytes"] == pytest.approx(trained / frozen)
    assert adapters["flops_per_image"] == 2 / 3 * whole["flops_per_image"]


def test_activations_grow_with_the_micro_batch_and_bound_it() -> None:
    small, large = (make_plan(plan_config(data__micro_batch=size))["memory"]["activations"] for size in (4, 16))
    assert 3 < large / small < 4.5
    roomy = make_plan(plan_config())
    assert roomy["fits"]["memory"]
    assert roomy["largest_micro_batch"] >= 16


def test_time_and_cost_follow_from_flops_and_the_stated_peak() -> None:
    plan = make_plan(plan_config(gpu="a100", mfu=0.5, price=3.0, precision__dtype="bf16"))
    per_second = 0.5 * 312e12 * 4 / plan["flops_per_image"]
    assert plan["images"] == 6400
    assert plan["images_per_second"] == pytest.approx(per_second)
    assert plan["cost"] == pytest.approx(6400 / per_second / 3600 * 4 * 3.0)


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"gpu=abacus: it must be cpu or one of .*h100"):
        make_plan(plan_config(gpu="abacus"))


@pytest.mark.parametrize("wrong", ["mfu=0", "mfu=1.5", "store_gb_s=0"])
def test_impossible_assumptions_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.split("=")[0]):
        load_config("plan", [wrong])


def test_problems_are_listed_and_the_rest_is_still_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(plan_config(cluster__processes=3, memory_gib=1e-3))
    assert plan["fits"] == {"memory": False, "world_size": False, "lanes": False, "micro_batch": True, "shards": None}
    assert not plan["ok"] and any("3 processes" in problem for problem in plan["problems"])
    assert any("data.micro_batch=21 needs" in problem and "per device" in problem for problem in plan["problems"])
    assert plan["parameters"] > 0 and plan["days"] > 0
    monkeypatch.setenv("COLUMNS", "80")
    shown = table(plan).splitlines()
    assert any(line.startswith("problem: 3 processes") for line in shown)
    assert [line for line in shown if len(line) > 80 and not line.startswith("problem: ")] == []


def test_memory_by_zero_stage_and_micro_batch() -> None:
    plan = make_plan(plan_config(data__micro_batch=4, zero__stage=2))
    by_stage = plan["memory_by_zero_stage"]
    assert set(by_stage) == {"1", "2", "3"} and {"1", "2", "4", "8", "16"} <= set(by_stage["1"])
    assert by_stage["2"]["4"] == plan["memory"]["total"]
    assert by_stage["1"]["16"] > by_stage["1"]["1"]
    offloaded = make_plan(plan_config(data__micro_batch=4, zero__stage=2, zero__offload_optimizer=True))
    assert offloaded["memory_by_zero_stage"]["2"]["4"] == offloaded["memory"]["total"] < by_stage["2"]["4"]
    assert offloaded["memory_by_zero_stage"]["3"] == by_stage["3"], "another stage without offloading"


def test_the_text_encoder_online_against_precomputed() -> None:
    """T5-XXL has 4.76 billion weights; all but the embedding table meet every token."""
    config = plan_config(text__kind="t5", text__path="google/t5-v1_1-xxl", text__dim=4096, text__max_tokens=32)
    plan = make_plan(config)
    text = plan["text_encoder"]
    assert text["parameters"] == pytest.approx(4.76e9, rel=0.01)
    assert text["flops_per_caption"] == pytest.approx(2 * 4.63e9 * 32, rel=0.02)
    assert text["mode"] == "online" and plan["memory"]["text_encoder"] == 4 * text["parameters"]
    assert text["online"]["images_per_second"] < text["precomputed"]["images_per_second"]
    assert plan["images_per_second"] == text["online"]["images_per_second"]
    config.data.embeddings = "sidecars"
    other = make_plan(config)
    assert other["memory"]["text_encoder"] == 0 and other["text_encoder"]["mode"] == "precomputed"
    assert other["images_per_second"] == text["precomputed"]["images_per_second"]


def test_shards_determine_what_the_store_must_deliver(drawn: PlanCommand) -> None:
    plan = make_plan(drawn)
    data = plan["data"]
    assert (data["shards"], data["samples"], data["basis"]) == (1, 8, "index")
    assert plan["store_bytes_per_second"] == pytest.approx(data["bytes_per_sample"] * plan["images_per_second"])
    assert plan["fits"]["shards"] and data["epochs"] == pytest.approx(100 * 4 / 8)
    assert plan["checkpoint_seconds"] == pytest.approx(plan["checkpoint_bytes"] / 1e9)
    drawn.data.shards = str(Path(str(drawn.data.shards)) / "nowhere")
    plan = make_plan(drawn)
    assert plan["fits"]["shards"] is False and "nowhere" in plan["problems"][0]


@pytest.fixture
def drawn(tmp_path: Path) -> PlanCommand:
    config = plan_config(run__dir=str(tmp_path / "run"), data__global_batch=4, gpu="cpu")
    config.cluster = replace(config.cluster, kind="local", processes=1)
    config.prepare.output = str(tmp_path)
    config.prepare.draw = replace(config.prepare.draw, count=8, heldout=2, size=32, samples_per_shard=8)
    prepare.main(config)
    config.data.shards = str(tmp_path / "train")
    return config


def test_this_machine_can_be_planned_for(drawn: PlanCommand) -> None:
    plan = make_plan(drawn)
    assert plan["gpu"] == "cpu" and plan["cost"] == 0 and plan["peak_flops"] > 1e9
    assert "measured now" in plan["peak_basis"]


def test_the_doctor_tries_the_real_things(drawn: PlanCommand, capfd: pytest.CaptureFixture[str]) -> None:
    drawn.doctor, drawn.zero.stage = True, 0
    found = main(drawn)["doctor"]
    assert found["ok"]
    names = [
        "settings",
        "software",
        "credentials",
        "weights",
        "checkpoint store",
        "batch",
        "step",
        "checkpoint round trip",
    ]
    assert [check["name"] for check in found["checks"]] == names
    said = capfd.readouterr().out
    assert "1 MiB written and read back" in said and "resuming from step 1" in said and "4 pictures in" in said
    assert not list(Path(drawn.run.dir).parent.glob("*doctor*")), "nothing is left behind"


def test_the_doctor_tries_everything_and_names_what_fails(
    drawn: PlanCommand, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn.doctor, drawn.json, drawn.zero.stage = True, True, 0
    drawn.data.shards = str(Path(drawn.run.dir) / "nowhere")
    drawn.wandb.mode = "online"
    with pytest.raises(UserError, match=r"4 of 8 checks failed: credentials, batch, step, checkpoint round trip"):
        main(drawn)
    answer = json.loads(next(line for line in capfd.readouterr().out.splitlines() if line.startswith("{")))
    assert not answer["doctor"]["ok"] and "nowhere" in answer["doctor"]["checks"][2]["detail"]


REFUSED: dict[str, dict[str, Any]] = {
    "zero.stage=0: it only works with one process": {"zero__stage": 0},
    "3 processes": {"cluster__processes": 3},
    "data.micro_batch=3: it must divide": {"data__micro_batch": 3},
    "validation.shards: validation.every=5, but no held-out": {"validation__every": 5},
    "validation.samples=7: it must be a multiple": {
        "validation__every": 5,
        "validation__samples": 7,
        "validation__shards": "held",
    },
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_doctor_plan_and_train_refuse_the_same(sentence: str) -> None:
    config = plan_config(cluster__processes=2, cluster__kind="local", gpu="a100")
    for key, value in REFUSED[sentence].items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    with pytest.raises(ConfigError) as train:
        check("train", config)
    with pytest.raises(ConfigError) as doctor:
        settings(config)
    assert sentence in str(train.value) and sentence in str(doctor.value)
    assert any(sentence in problem for problem in make_plan(config)["problems"])


def test_held_out_shards_are_named_by_their_own_key_and_held_out(drawn: PlanCommand) -> None:
    drawn.validation.every, drawn.validation.shards = 1, str(Path(str(drawn.data.shards)) / "nowhere")
    assert any(problem.startswith("validation.shards=") for problem in make_plan(drawn)["problems"])
    drawn.validation.shards = drawn.data.shards
    assert any("is in data.shards as well" in problem for problem in make_plan(drawn)["problems"])
    drawn.validation.shards = str(Path(str(drawn.data.shards)).parent / "heldout")
    assert not make_plan(drawn)["problems"]


def test_the_doctor_tries_the_checkpoint_store_itself(drawn: PlanCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn.checkpoint.dir = str(Path(drawn.run.dir).parent / "a file")
    Path(drawn.checkpoint.dir).write_text("not a directory")
    with pytest.raises((OSError, UserError)):
        checkpoint_store(drawn)
    with scratch_in("s3://bucket/prefix/") as place:
        assert place.startswith("s3://bucket/prefix/.doctor-")

        def gone(_: str) -> None:
            raise StoreError("the store is gone")

        monkeypatch.setattr(store, "remove", gone)  # is reported, and hides nothing else


def test_a_giant_is_not_tried_without_a_gpu(drawn: PlanCommand) -> None:
    drawn.stage.model.preset, drawn.stage.image_size = "base64", 64
    with ExitStack() as scratch, pytest.raises(UserError, match=r"1,9\d\d M parameters are not tested without a GPU"):
        Trial(drawn, scratch).step()


@pytest.mark.parametrize(
    ("experiment", "hours", "stages"),
    [("modern", 768, ("base64", "sr256", "sr1024")), ("speedrun", 200, ("base64", "sr256"))],
)
def test_an_experiment_keeps_its_budget(experiment: str, hours: float, stages: tuple[str, ...]) -> None:
    """At the measured utilisation, with the text encoder in every step: the cost stated at the head of its file."""
    total = 0.0
    for stage in stages:
        words = (
            f"experiment={experiment}",
            f"stage={stage}",
            "gpu=h200",
            f"mfu={0.451 if stage == 'base64' else 0.38}",
        )
        config: Any = load_config("plan", words)
        device, own = planned_device(config), config.stage
        flops = training_flops(for_stage(own, config.text.dim), own.train_size, config.text.max_tokens)
        rate = speed(config, device, 1, flops + text_cost(config.text).flops_per_caption)["images_per_second"]
        total += cost(config, device, 1, rate)["gpu_hours"]
    assert 0.8 * hours < total < hours
    head = (Path(__file__).parents[3] / f"conf/experiment/{experiment}.yaml").read_text()
    assert f"# Cost: {total:.0f} H200-hours" in head
