"""A cascade called as users of diffusers type it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.common.errors import CascadeError, ConfigError, DataError
from tests.hub import Hub
from tests.training.tiny import tiny_cascade
from training.cascade import Cascade
from training.cascade.records import record

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return tiny_cascade()


def test_arguments_mean_what_they_mean_in_diffusers(cascade: Cascade) -> None:
    seeded = torch.Generator().manual_seed(7)
    torch.rand(3, generator=seeded)
    called = cascade(
        "red",
        negative_prompt="blue",
        num_inference_steps=2,
        guidance_scale=5.0,
        num_images_per_prompt=2,
        generator=seeded,
    )
    plain = cascade.generate("red", "blue", guidance=5.0, steps=2, num_images=2, seed=7)
    assert [a.tobytes() for a in called.images] == [b.tobytes() for b in plain]
    assert cascade("red", generator=7)[0].tobytes() == cascade("red", seed=7)[0].tobytes()


def test_a_notebook_shows_the_pictures(cascade: Cascade) -> None:
    shown = Image.open(io.BytesIO(cascade(["a", "b"])._repr_png_()))
    assert shown.width > 2 * 192
    assert cascade("a")[:0] == [] and type(cascade("a"))()._repr_png_() is None


def test_picture_paths_are_read(cascade: Cascade, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8))
    picture.save(tmp_path / "p.png")
    by_path = cascade("red", image=tmp_path / "p.png")
    assert by_path[0].tobytes() == cascade("red", image=picture, strength=0.8)[0].tobytes()
    assert by_path[0].tobytes() != cascade("red")[0].tobytes()
    with pytest.raises(DataError, match=r"absent\.png: no such picture"):
        cascade("red", image="absent.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="not a readable picture"):
        cascade("red", image=str(tmp_path / "text.png"))


def test_arguments_and_methods_it_does_not_have_are_refused(cascade: Cascade) -> None:
    with pytest.raises(ConfigError) as caught:
        cascade("red", clip_skip=1)
    assert str(caught.value).startswith("clip_skip: no such argument; the arguments are prompt, negative_prompt")
    assert not {"prompts", "steps", "guidance", "options"} & set(str(caught.value).split(", ")), "a call refuses those"
    for name, hint in (("save_pretrained", r"use save\(DIRECTORY\)"), ("cuda", r"use to\('cuda'\)"), ("nothing", "'$")):
        with pytest.raises(AttributeError, match=f"a Cascade has no '{name}.*{hint}"):
            getattr(cascade, name)
    with pytest.raises(ConfigError, match=r"from_pretrained: torch_dtype: load it, then use to\(torch.bfloat16\)"):
        Cascade.from_pretrained("bundle", torch_dtype=torch.float16)
    with pytest.raises(ConfigError, match="from_pretrained: path=''"):
        Cascade.from_pretrained("")


def test_a_list_has_one_generator_per_picture(cascade: Cascade) -> None:
    seeded = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    alone = [cascade("red", generator=one)[0].tobytes() for one in seeded]
    assert [image.tobytes() for image in cascade("red", num_images_per_prompt=2, generator=seeded)] == alone
    assert [image.tobytes() for image in cascade(["red", "red"], seed=[3, 4])] == alone
    with pytest.raises(ConfigError, match="generator: 2 for 3 pictures; give one for all, or one per picture"):
        cascade(["red", "blue", "green"], generator=seeded)


def test_height_and_width_are_a_size(cascade: Cascade) -> None:
    wide = cascade("red", height=32, width=64)[0]
    assert wide.size == (64, 32) and wide.tobytes() == cascade("red", size=(64, 32))[0].tobytes()


def test_prompts_come_in_any_ordered_collection(cascade: Cascade) -> None:
    plain = [image.tobytes() for image in cascade(["red", "blue"])]
    for given in (("red", "blue"), np.array(["red", "blue"]), iter(["red", "blue"])):
        assert [image.tobytes() for image in cascade(given)] == plain
    assert cascade(np.array("red"))[0].tobytes() == plain[0]


def test_numbers_of_numpy_and_torch_are_numbers(cascade: Cascade) -> None:
    given: dict[str, Any] = {
        "num_inference_steps": torch.tensor(3),
        "guidance_scale": np.array([2.0, 2.0]),
        "size": np.array([32, 32]),
    }
    given |= {"guidance_interval": [np.float32(0), np.float32(1)], "stages": np.int64(2), "batch": np.int64(4)}
    two = cascade(["red", "blue"], seed=range(2), devices="cpu", **given)
    one = [cascade(prompt, generator=seed)[0].tobytes() for seed, prompt in enumerate(("red", "blue"))]
    assert [image.tobytes() for image in two] == one
    assert cascade("red", seed=torch.tensor([0]))[0].tobytes() == one[0]
    assert cascade("red", seed=True)[0].tobytes() == cascade("red", seed=1)[0].tobytes()


@pytest.mark.parametrize(
    "mode", [torch.bfloat16, torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)]
)
def test_the_modes_of_torch_change_no_picture(cascade: Cascade, tmp_path: Path, mode: Any) -> None:
    cascade.save(str(tmp_path))
    plain = cascade("red")[0].tobytes()
    try:
        torch.set_default_dtype(mode if isinstance(mode, torch.dtype) else torch.float32)
        with contextlib.nullcontext() if isinstance(mode, torch.dtype) else mode:
            loaded = Cascade.from_pretrained(str(tmp_path)).to(torch.float64).to(torch.float32)
            drawn = [one("red")[0].tobytes() for one in (loaded, cascade)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [*drawn, loaded.to(torch.float64).to(torch.float32)("red")[0].tobytes()] == [plain] * 3
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_compiled_unet_is_saved_as_the_one_inside(cascade: Cascade, tmp_path: Path) -> None:
    stages = [replace(one, unet=torch.compile(one.unet, backend="eager")) for one in cascade.stages]  # type: ignore[arg-type]
    Cascade(stages, cascade.encoder, cascade.text).save(str(tmp_path))
    assert Cascade.from_pretrained(str(tmp_path))("red")[0].tobytes() == cascade("red")[0].tobytes()


def test_a_cascade_says_what_it_is_and_can_be_pickled(cascade: Cascade) -> None:
    assert repr(cascade).startswith("<Cascade: ") and "32 px" in repr(cascade) and "cpu, float32>" in repr(cascade)
    again = pickle.loads(pickle.dumps(cascade))
    assert again("red")[0].tobytes() == cascade("red")[0].tobytes()


def test_a_truncated_prompt_is_reported(cascade: Cascade) -> None:
    with pytest.warns(UserWarning, match=r"only the first \d+ tokens of this prompt are read: 'red red"):
        cascade("red " * 500)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 1}, "steps: in a call it is `num_inference_steps`"),
        ({"guidance": 1}, "guidance: in a call it is `guidance_scale`"),
        ({"cfg": 1}, "cfg: it is `guidance_scale`"),
        ({"output_type": "np"}, "output_type: the pictures are PIL images"),
        ({"return_dict": False}, "return_dict=False: the result is a list of pictures"),
        ({"callback_on_step_end": print}, "callback_on_step_end: give `callback`"),
        ({"prompt_embeds": 1}, "prompt_embeds: give the text"),
        ({"seed": 1, "generator": 2}, "seed and generator: give only one"),
        ({"seed": -1}, "seed=-1: it must be at least 0"),
        ({"generator": -1}, "generator=-1: it must be at least 0"),
        ({"generator": "3"}, "generator=str: give a torch.Generator or a seed"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0: it must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: it must be at least 1"),
        ({"guidance_scale": "high"}, "guidance_scale=high: it must be a number"),
        ({"negative_prompt": 3}, "negative_prompt=3: give a caption, or a list"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 for 1 prompts"),
        ({"width": 64}, "width=64: give height as well"),
        ({"width": 64, "height": 64, "size": 64}, "size: give it, or height and width"),
        ({"scheduler": "ddim"}, "scheduler: give `sampler`"),
        ({"sampelr": "ddim"}, "sampelr: no such argument; did you mean `sampler`?"),
        ({"callback": 3}, "callback=3: give a function"),
        ({"cond_scale": 3}, "cond_scale: it is `guidance_scale`"),
        ({"height": 0}, "height=0: give width as well"),
        ({"numbers": 0}, "numbers=0: give a list with a whole number"),
        ({"numbers": [-1]}, "numbers=[-1]: give a list with a whole number, at least 0"),
        ({"devices": []}, "devices: give at least one"),
        ({"devices": ["cpu", None]}, "devices: None is not a device"),
        ({"aug_level": {"base": 0.1}}, "aug_level={'base': 0.1}: only sr is for super-resolution"),
        ({"numbers": [0.0]}, "numbers=[0.0]: give a list with a whole number"),
    ],
)
def test_other_arguments_of_diffusers_are_explained(cascade: Cascade, options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cascade("red", **options)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("prompts", [None, 3, b"red", {"red": 1}, {"red"}])
def test_what_is_not_a_caption_is_refused(cascade: Cascade, prompts: Any) -> None:
    with pytest.raises(ConfigError, match=r"^prompt=.*: give a caption, or a list of captions"):
        cascade(prompts)
    with pytest.raises(ConfigError, match=r"^prompts=.*: give a caption, or a list of captions"):
        cascade.generate(prompts)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance_scale": 3}, "guidance_scale: `generate` takes `guidance`; a call, cascade"),
        ({"height": 64}, "height: `generate` takes `size`, (WIDTH, HEIGHT)"),
        ({"generator": 3}, "generator: `generate` takes `seed`"),
        ({"nothing": 3}, "nothing: no such argument; the arguments are prompts, negative_prompts, guidance"),
    ],
)
def test_generate_names_its_own_arguments(cascade: Cascade, options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cascade.generate("red", **options)
    assert str(caught.value).startswith(sentence)


def test_the_defaults_of_diffusers_are_accepted(cascade: Cascade) -> None:
    plain = cascade("red")[0].tobytes()
    assert cascade("red", output_type="pil", return_dict=True).images[0].tobytes() == plain


def test_devices_and_places_that_do_not_exist(cascade: Cascade, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to: 'gpu' is not a device; give for example 'cuda'"):
        cascade.to("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="to: torch sees no GPU for 'cuda'; use 'cpu'"):
            cascade.to("cuda")
    for dtype in ("bfloat16", torch.int8, torch.float8_e4m3fn):
        with pytest.raises(
            ConfigError, match=r"to: (torch\.int8|torch\.float8_e4m3fn|'bfloat16') is not a dtype .*bfloat16"
        ):
            cascade.to("cpu", dtype)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"to: torch\.float32 and torch\.float16 are two dtypes"):
        cascade.to(torch.float32, torch.float16)
    with pytest.raises(ConfigError, match="to: this machine has no meta"):
        cascade.to("meta")
    assert cascade.to(torch.float32).device == cascade.to(dtype=torch.float32).device == torch.device("cpu")
    with pytest.raises(ConfigError, match="save: the path is empty"):
        cascade.save("")
    (tmp_path / "file").write_text("")
    with pytest.raises(CascadeError, match="file"):
        cascade.save(str(tmp_path / "file"))


TO_THE_HUB = """
import os, sys
from data_pipeline.common.errors import DataError
from training.cascade import Cascade
from training.cascade.records import record
cascade = Cascade.from_pretrained(sys.argv[1])
for name in ("me/shapes", "shapes"):
    try:
        print(cascade.push_to_hub(name))
    except DataError as error:
        print(error)
"""


def pushed(bundle: str, endpoint: str) -> list[str]:
    """Upload a bundle twice, the second time without naming the owner, in a separate process; return what it prints."""
    environ = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TO_THE_HUB, bundle], capture_output=True, text=True, env=environ, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_bundle_on_the_hub_is_the_one_that_was_uploaded(cascade: Cascade, tmp_path: Path) -> None:
    cascade.save(str(tmp_path / "made"))
    stages = json.loads((tmp_path / "made" / "bundle.json").read_text())["stages"]
    used = [{"name": stage["name"], "sha256": stage["sha256"], "sampler": {}} for stage in stages]
    n, kid = {"samples": 8, "prompts": 8, "reference": 8}, {"value": 0.5, "interval": [0.4, 0.6], "n": 8}
    result = {"kid": {"inception": kid}, "n": n, "protocol": {"stages": used, "extractors": {}}}
    record(str(tmp_path / "made"), result)
    with Hub() as hub:
        said = pushed(str(tmp_path / "made"), hub.endpoint)
        kept = {name: data for (place, name), data in hub.files.items() if place == "models/me/shapes"}
    assert len(said) == 2 and all(line.startswith(f"{hub.endpoint}/") for line in said), said
    for file in (tmp_path / "made").glob("*.safetensors"):
        assert kept.pop(file.name) == file.read_bytes()
    card = kept.pop("README.md").decode()
    assert 'Cascade.from_pretrained("me/shapes")' in card and "/tmp" not in card
    assert "| kid.inception | 0.5 | 0.4 to 0.6 | 8 |" in card
    assert "me/shapes" in json.loads(kept.pop("bundle.json"))["index"]["use"]
    assert set(kept) <= {".gitattributes"}


def test_the_hub_out_of_reach_is_reported_in_one_sentence(cascade: Cascade, tmp_path: Path) -> None:
    cascade.save(str(tmp_path / "made"))
    said = pushed(str(tmp_path / "made"), "http://127.0.0.1:9")
    assert [line.partition(" was not uploaded (")[0] for line in said] == [
        "push_to_hub: me/shapes",
        "push_to_hub: shapes",
    ]
