"""A cascade called as users of diffusers type it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.common.errors import CascadeError, ConfigError, DataError
from tests.training.tiny import tiny_cascade
from training.cascade import Cascade


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return tiny_cascade()


def test_the_names_mean_what_they_mean_there(cascade: Cascade) -> None:
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


def test_what_it_does_not_have_is_refused(cascade: Cascade) -> None:
    with pytest.raises(ConfigError, match="height: not an option of a cascade; pictures are 32 px"):
        cascade("red", height=512)
    with pytest.raises(ConfigError, match="eta: not an option of a cascade; those are prompts"):
        cascade("red", eta=0.0)
    with pytest.raises(ConfigError, match="generator=list: give one"):
        cascade("red", generator=[torch.Generator()])


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
    ],
)
def test_other_arguments_are_told_what_they_are_here(cascade: Cascade, options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cascade("red", **options)
    assert str(caught.value).startswith(sentence)


def test_what_is_the_default_there_may_be_given(cascade: Cascade) -> None:
    plain = cascade("red")[0].tobytes()
    assert cascade("red", output_type="pil", return_dict=True).images[0].tobytes() == plain


def test_devices_and_places_that_do_not_exist(cascade: Cascade, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to: 'gpu' is not a device; give for example 'cuda'"):
        cascade.to("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="to: torch sees no GPU for 'cuda'; use 'cpu'"):
            cascade.to("cuda")
    assert cascade.to(torch.float32).device == torch.device("cpu")
    with pytest.raises(ConfigError, match="save: the path is empty"):
        cascade.save("")
    (tmp_path / "file").write_text("")
    with pytest.raises(CascadeError, match="file"):
        cascade.save(str(tmp_path / "file"))


def test_the_hub_out_of_reach_is_one_sentence(cascade: Cascade, monkeypatch) -> None:
    import huggingface_hub

    def unreachable(*arguments, **options):
        raise OSError("no route to the Hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    with pytest.raises(DataError, match=r"push_to_hub: me/cascade was not uploaded \(no route"):
        cascade.push_to_hub("me/cascade")
