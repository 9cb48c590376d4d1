"""Cascade: seeds, batches, stages, devices, saving, img2img; on two tiny random stages."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.images import box_average
from tests.training.text.tiny_t5 import tiny_t5
from tests.training.tiny import TEXT, tiny_cascade
from training.cascade import Cascade
from training.cascade.requests import picture_seed, to_masks, to_pictures, to_uint8
from training.config.experiment import TextConfig
from training.diffusion.denoiser import to_unit
from training.diffusion.sampler import sample_stage
from training.text.identity import pinned

PROMPTS = ["a red circle", "a blue square on grey", "蓝天白云"]


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return tiny_cascade()


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def same(a, b, tolerance: int = 1) -> bool:
    """Equal up to the rounding differences between batch shapes."""
    return bool(np.abs(pixels(a) - pixels(b)).max() <= tolerance)


def test_one_picture_per_prompt_at_the_final_size(cascade: Cascade) -> None:
    images = cascade.generate(PROMPTS, seed=0)
    assert [image.size for image in images] == [(32, 32)] * 3 and images[0].mode == "RGB"
    assert np.array_equal(pixels(images), pixels(cascade.generate(PROMPTS, seed=0)))
    assert not same(images, cascade.generate(PROMPTS, seed=1))
    assert not same(images[:1], images[1:2])


def test_a_single_string_is_one_prompt(cascade: Cascade) -> None:
    assert same(cascade.generate(PROMPTS[0]), cascade.generate(PROMPTS[:1]))


def test_a_picture_depends_on_neither_batch_nor_neighbours(cascade: Cascade) -> None:
    together = cascade.generate(PROMPTS, seed=3)
    assert same(together[1:2], cascade.generate([PROMPTS[1]], seed=3))
    assert same(together, cascade.generate(PROMPTS, seed=3, batch=1))
    assert same(together[::-1], cascade.generate(PROMPTS[::-1], seed=3, batch=2))


def test_chunks_change_nothing(cascade: Cascade, monkeypatch) -> None:
    together = cascade.generate(PROMPTS, seed=3, num_images=2)
    monkeypatch.setattr("training.cascade.cascade.CHUNK_BATCHES", 1)
    assert same(together, cascade.generate(PROMPTS, seed=3, num_images=2, batch=2))


def test_repeated_prompts_are_further_pictures_of_it(cascade: Cascade) -> None:
    twice = cascade.generate([PROMPTS[0]] * 2, seed=0)
    assert not same(twice[:1], twice[1:])
    assert same(twice, cascade.generate(PROMPTS[0], seed=0, num_images=2))
    assert len({picture_seed(s, p, n) for s in (0, 1) for p in PROMPTS for n in (0, 1)}) == 12


def test_several_devices_draw_the_same(cascade: Cascade) -> None:
    together = cascade.generate(PROMPTS, seed=5, num_images=2, batch=2)
    assert same(together, cascade.generate(PROMPTS, seed=5, num_images=2, batch=2, devices=["cpu", "cpu"]))


def test_stages_are_chained_through_8_bits(cascade: Cascade) -> None:
    """The super-resolution stage sees the base picture as in training: 8 bits, enlarged by `sample_stage`."""
    drawing = cascade.draw(PROMPTS[:1], seed=2)[0]
    assert {name: image.size for name, image in drawing.stages.items()} == {"base": (16, 16), "sr": (32, 32)}
    assert drawing.image is drawing.stages["sr"] and drawing.seed == picture_seed(2, PROMPTS[0], 0)
    text, mask = cascade.encoder.encode(PROMPTS[:1])
    sr = cascade.stages[1]
    low = torch.from_numpy(np.array(drawing.stages["base"])).permute(2, 0, 1)[None]
    by_hand = sample_stage(
        sr.unet, text, mask, config=sr.config.diffusion, sampler=sr.config.sampler, image_size=32,
        seeds=[drawing.seed], low_res=low,
    )  # fmt: skip
    assert np.array_equal(to_uint8(by_hand)[0].permute(1, 2, 0).numpy(), np.asarray(drawing.image))


def test_8_bits_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_unit(values)), values)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_a_generation_may_use_only_some_stages(cascade: Cascade) -> None:
    base = cascade.generate(PROMPTS, stages=1)
    assert base[0].size == (16, 16)
    assert same(base, cascade.generate(PROMPTS, stages=["base"]))
    upscaled = cascade.generate(PROMPTS, stages="sr", low_res=base)
    assert same(upscaled, cascade.generate(PROMPTS))


def test_guidance_steps_and_sampler_per_stage(cascade: Cascade) -> None:
    plain = cascade.generate(PROMPTS)
    assert same(plain, cascade.generate(PROMPTS, guidance=[2.0, 2.0], steps={"base": 3}))
    for change in (
        {"guidance": 6},
        {"guidance": {"sr": 5}},
        {"steps": [5, 3]},
        {"sampler": "ddpm"},
        {"aug_level": 0.9},
    ):
        assert not same(plain, cascade.generate(PROMPTS, **change)), change


def test_negative_prompts(cascade: Cascade) -> None:
    plain = cascade.generate(PROMPTS)
    assert same(plain, cascade.generate(PROMPTS, negative_prompts=""))
    steered = cascade.generate(PROMPTS, negative_prompts=["", "green", ""])
    assert same(plain[::2], steered[::2]) and not same(plain[1:2], steered[1:2])
    assert same(cascade.generate(PROMPTS, "green"), cascade.generate(PROMPTS, ["green"] * 3))


def test_weights_that_are_not_numbers_draw_no_picture() -> None:
    cascade = tiny_cascade()
    with torch.no_grad():
        next(cascade.stages[1].unet.parameters()).fill_(float("nan"))
    assert len(cascade.generate(PROMPTS[:1], stages=1)) == 1
    with pytest.raises(DataError, match=r"stage sr draws values .* \(NaN\): .* overflow in float32; try an earlier"):
        cascade.generate(PROMPTS[:1])


def test_callback_counts_all_steps(cascade: Cascade) -> None:
    calls: list[tuple[str, int, int]] = []
    cascade.generate(PROMPTS, batch=2, callback=lambda *call: calls.append(call))
    assert calls == [(name, done, 6) for name in ("base", "sr") for done in range(1, 7)]


def test_img2img_and_inpainting(cascade: Cascade) -> None:
    picture = Image.new("RGB", (32, 32), (250, 20, 20))
    half = Image.new("L", (32, 32), 0)
    half.paste(255, (0, 0, 16, 32))
    near = cascade.generate(PROMPTS, image=picture, strength=0.1, stages=1)
    far = cascade.generate(PROMPTS, image=picture, strength=0.9, stages=1)
    truth = pixels([picture.resize((16, 16))] * 3)
    assert np.abs(pixels(near) - truth).mean() < np.abs(pixels(far) - truth).mean()
    assert same(cascade.generate(PROMPTS), cascade.generate(PROMPTS, image=picture))
    inpainted = pixels(cascade.generate(PROMPTS, image=picture, mask=half))
    assert np.abs(inpainted[:, :, 16:] - np.array([250, 20, 20])).max() <= 1
    assert np.abs(inpainted[:, :, :16] - np.array([250, 20, 20])).max() > 20


def test_img2img_and_inpainting_of_every_stage(cascade: Cascade) -> None:
    picture = Image.new("RGB", (32, 32), (250, 20, 20))
    low = cascade.generate(PROMPTS, stages=1)
    free = cascade.generate(PROMPTS, stages="sr", low_res=low)
    assert same(free, cascade.generate(PROMPTS, stages="sr", low_res=low, image=picture))
    near = cascade.generate(PROMPTS, stages="sr", low_res=low, image=picture, strength=0.1)
    blue = Image.new("RGB", (32, 32), (20, 20, 250))
    other = cascade.generate(PROMPTS, stages="sr", low_res=low, image=blue, strength=0.1)
    assert not same(near, free) and not same(near, other)
    # stage by stage within one cascade: the base draws freely, super-resolution starts from the picture
    assert same(near, cascade.generate(PROMPTS, image=picture, strength={"sr": 0.1}))
    assert same(near, cascade.generate(PROMPTS, image=picture, strength=[1.0, 0.1]))
    half = Image.new("L", (32, 32), 0)
    half.paste(255, (0, 0, 16, 32))
    inpainted = pixels(cascade.generate(PROMPTS, stages="sr", low_res=low, image=picture, mask=half))
    assert np.abs(inpainted[:, :, 16:] - np.array([250, 20, 20])).max() <= 1
    assert np.abs(inpainted[:, :, :16] - np.array([250, 20, 20])).max() > 20


def test_low_res_pictures_shrink_as_in_training(cascade: Cascade) -> None:
    fine = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shrunk = Image.fromarray(box_average(fine, 2))
    ready = cascade.generate(PROMPTS[:1], stages="sr", low_res=shrunk)
    assert same(ready, cascade.generate(PROMPTS[:1], stages="sr", low_res=Image.fromarray(fine)), tolerance=3)


def test_a_stage_trained_on_crops_draws_whole_pictures(cascade: Cascade) -> None:
    cascade = tiny_cascade()
    cascade.stages[1].config.crop_size = 16
    assert cascade.generate(PROMPTS[:1])[0].size == (32, 32)


def test_guidance_within_an_interval(cascade: Cascade) -> None:
    plain, free = cascade.generate(PROMPTS), cascade.generate(PROMPTS, guidance=1.0)
    assert same(plain, cascade.generate(PROMPTS, guidance_interval=(0.0, 1.0)))
    assert same(free, cascade.generate(PROMPTS, guidance_interval=[0.0, 0.0]))
    one = cascade.generate(PROMPTS, guidance_interval={"base": [0.0, 0.0]})
    assert not same(one, plain) and not same(one, free)


def test_explain_gives_heat_per_word(cascade: Cascade) -> None:
    explained = cascade.draw(PROMPTS, explain=True, batch=2)
    assert same([d.image for d in explained], cascade.generate(PROMPTS, batch=2), tolerance=2)
    heat = explained[0].words["base"]
    assert [word for word, _ in heat] == ["a", "red", "circle"]
    assert all(h.shape == (4, 4) and np.isfinite(h).all() and h.min() >= 0 and h.max() < 1 for _, h in heat)
    assert [word for word, _ in explained[2].words["base"]] == list("蓝天白云")
    assert cascade.draw(PROMPTS)[0].words == {}


def test_threads_take_turns_so_that_words_are_those_of_their_own_picture(cascade: Cascade) -> None:
    alone = cascade.draw("a red circle", explain=True)[0].words["base"]
    drawing, other = threading.Event(), threading.Thread(target=lambda: cascade.draw("blue", callback=begun))

    def begun(*_: Any) -> None:
        drawing.set()

    def begin_another(*_: Any) -> None:
        if other.ident is None:
            other.start()
            drawing.wait(0.2)

    found = cascade.draw("a red circle", explain=True, callback=begin_another)[0].words["base"]
    other.join()
    assert drawing.is_set() and [word for word, _ in found] == [word for word, _ in alone]
    assert all(np.array_equal(heat, before) for (_, heat), (_, before) in zip(found, alone, strict=True))


def test_save_and_load(cascade: Cascade, tmp_path: Path) -> None:
    cascade.save(str(tmp_path / "bundle"))
    loaded = Cascade.from_pretrained(str(tmp_path / "bundle"))
    assert np.array_equal(pixels(loaded.generate(PROMPTS)), pixels(cascade.generate(PROMPTS)))
    assert [s.origin["step"] for s in loaded.stages] == [7, 7] and loaded.text == pinned(TEXT)
    assert not any(p.requires_grad for s in loaded.stages for p in s.unet.parameters())


def test_bundles_may_be_in_object_stores(cascade: Cascade, bucket: str) -> None:
    cascade.save(f"s3://{bucket}/models/tiny")
    loaded = Cascade.from_pretrained(f"s3://{bucket}/models/tiny")
    assert np.array_equal(pixels(loaded.generate(PROMPTS)), pixels(cascade.generate(PROMPTS)))
    with pytest.raises(DataError, match="not a bundle"):
        Cascade.from_pretrained(f"s3://{bucket}/models/other")


def test_bundles_in_a_hugging_face_cache(cascade: Cascade, tmp_path: Path, monkeypatch) -> None:
    """By `owner/name`, and by its directory in the cache; nothing is downloaded."""
    home = tmp_path / "models--someone--tiny"
    cascade.save(str(home / "snapshots" / "abc123"))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("someone/tiny", str(home), str(home / "snapshots" / "abc123")):
        loaded = Cascade.from_pretrained(name)
        assert np.array_equal(pixels(loaded.generate(PROMPTS[:1])), pixels(cascade.generate(PROMPTS[:1]))), name


def test_learned_null_text_is_saved(tmp_path: Path) -> None:
    cascade = tiny_cascade(null_text="learned")
    with torch.no_grad():
        cascade.stages[0].unet.null_text.normal_()
    cascade.save(str(tmp_path / "bundle"))
    loaded = Cascade.from_pretrained(str(tmp_path / "bundle"))
    assert np.array_equal(pixels(loaded.generate(PROMPTS)), pixels(cascade.generate(PROMPTS)))


def test_to_bf16_draws_nearly_the_same(cascade: Cascade, tmp_path: Path) -> None:
    cascade.save(str(tmp_path / "bundle"))
    half = Cascade.from_pretrained(str(tmp_path / "bundle")).to("cpu", torch.bfloat16)
    assert next(half.stages[0].unet.parameters()).dtype == torch.bfloat16
    difference = np.abs(pixels(half.generate(PROMPTS)) - pixels(cascade.generate(PROMPTS)))
    assert 0 < difference.mean() < 12


def test_a_bundle_knows_its_text_encoder_wherever_it_is_stored(tmp_path: Path) -> None:
    home = Path(tiny_t5(tmp_path / "encoder"))
    tiny_cascade(text=TextConfig(kind="t5", path=str(home), dim=16, max_tokens=32)).save(str(tmp_path / "bundle"))
    elsewhere = home.rename(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"encoder: there is no encoder here.*name its directory with bundle\.text_path=DIR"
    ):
        Cascade.from_pretrained(str(tmp_path / "bundle"))
    cascade = Cascade.from_pretrained(str(tmp_path / "bundle"), text_path=str(elsewhere))
    assert len(cascade.generate(["a red circle"])) == 1
    weights = elsewhere / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=rf"text\.sha=.*not the same text encoder as .* text\.path={elsewhere}"):
        Cascade.from_pretrained(str(tmp_path / "bundle"), text_path=str(elsewhere))


@pytest.mark.parametrize("kind", ["byte_level", "multilingual"])
def test_chinese_prompts_through_byt5_and_mt5_end_to_end(tmp_path: Path, kind: str) -> None:
    text = TextConfig(kind="t5", path=tiny_t5(tmp_path / "encoder", **{kind: True}), dim=16, max_tokens=32)
    cascade = tiny_cascade(text=text)
    cascade.save(str(tmp_path / "bundle"))
    images = Cascade.from_pretrained(str(tmp_path / "bundle")).generate(["蓝天白云下的沙滩", "黑色的猫"], seed=0)
    assert not same(images[:1], images[1:]) and images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": "sr1024"}, "stages=sr1024: no such stage; the cascade has base, sr"),
        ({"stages": 3}, "stages=3: the cascade has 2"),
        ({"stages": ["sr", "base"]}, "must be consecutive"),
        ({"stages": "sr"}, "low_res: sr starts from 16 px pictures"),
        ({"guidance": [1, 2, 3]}, "3 values for 2 stages"),
        ({"guidance": "much"}, "guidance=much: it must be a number"),
        ({"steps": 0}, "steps=0: it must be at least 1"),
        ({"steps": 2.5}, "steps=2.5: it must be a whole number"),
        ({"sampler": "euler"}, "sampler=euler: it must be one of"),
        ({"guidance": {"sr9": 1}}, "sr9 is not one of the stages drawn"),
        ({"negative_prompts": ["a", "b"]}, "2 for 3 prompts"),
        ({"strength": 0}, "strength=0"),
        ({"strength": [0.5]}, "1 values for 2 stages"),
        ({"strength": {"sr": 2}}, "strength=2"),
        ({"guidance_interval": [0.5, 0.1]}, "guidance_interval=[0.5, 0.1]"),
        ({"mask": Image.new("L", (8, 8))}, "inpainting needs `image`"),
        ({"image": [Image.new("RGB", (8, 8))] * 2}, "image: 2 pictures for 3 prompts"),
        ({"image": np.zeros((4, 8, 8, 2), np.uint8)[:1]}, "a picture of shape (8, 8, 2)"),
        ({"image": Image.new("F", (8, 8))}, "this picture cannot be used: floating-point pixels"),
        ({"stages": 1.0}, "stages=1.0: give a number of stages"),
        ({"guidance_interval": "ab"}, "guidance_interval=ab: give two times"),
        ({"batch": 2.5}, "batch=2.5"),
        ({"negative_prompts": "caf\udce9"}, "negative_prompts: 'caf\\udce9' contains characters"),
        ({"num_images": 0}, "num_images=0"),
        ({"batch": 0}, "batch=0: it must be a whole number, at least 1"),
        ({"image": np.zeros((0, 0, 3), np.uint8)}, "a picture without pixels"),
        ({"guidance": float("nan")}, "guidance=nan: it must be a finite number"),
        ({"num_images": 1.5}, "num_images=1.5: it must be a whole number"),
        ({"seed": "a"}, "seed=a: it must be a whole number"),
        ({"negative_prompts": [None]}, "negative_prompts: None is not a string"),
        ({"strength": 0.5}, "strength=0.5: it needs `image`, the picture to redraw"),
        ({"low_res": Image.new("RGB", (8, 8))}, "low_res: base draws from text only"),
        ({"devices": ["abacus"]}, "devices: 'abacus' is not a device"),
        ({"stages": 1, "aug_level": 0.1}, "aug_level: no stage drawn is for super-resolution"),
    ],
)
def test_impossible_arguments_are_reported_in_one_sentence(cascade: Cascade, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cascade.generate(PROMPTS, **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_more_noise_on_low_res_pictures_than_in_training() -> None:
    with pytest.raises(ConfigError, match=r"aug_level=0\.2: sr is trained .* at most stage\.diffusion\.aug_max=0\.1"):
        tiny_cascade(aug_max=0.1).draw("a", aug_level=0.2)


def test_values_that_are_not_prompts_are_refused_and_numpy_numbers_are_accepted(cascade: Cascade) -> None:
    with pytest.raises(ConfigError, match="prompts=None: give a caption"):
        cascade.generate(None)  # type: ignore[arg-type]
    picture = Image.new("RGB", (16, 16), "red")
    numpy = cascade.generate("a", steps=np.int64(2), strength=np.float32(0.5), image=picture)
    assert same(numpy, cascade.generate("a", steps=2, strength=0.5, image=picture))


def test_pictures_mean_what_they_mean_in_training() -> None:
    deep = Image.fromarray(np.full((8, 8), 0x8080, np.uint16))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    grey = torch.full((1, 8, 8), 128, dtype=torch.uint8)
    assert to_pictures([deep], 8).unique().tolist() == [128]
    assert to_pictures([clear], 8).unique().tolist() == [255], "on white"
    assert to_pictures([grey, np.full((8, 8, 1), 128, np.uint8)], 8).unique().tolist() == [128]
    assert to_masks([clear], 8).all() and to_masks([np.ones((8, 8), bool)], 8).all()


def test_a_missing_bundle_is_reported_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a bundle \(no bundle.json\); make one with: cascade bundle"):
        Cascade.from_pretrained(str(tmp_path))
    with pytest.raises(DataError, match="has no checkpoint yet"):
        Cascade.from_runs(tmp_path)  # type: ignore[arg-type]


def test_a_path_for_an_encoder_without_files_is_refused(cascade: Cascade, tmp_path: Path) -> None:
    cascade.save(str(tmp_path))
    with pytest.raises(ConfigError, match="text_path=/t5: the text encoder of this bundle, words, has no files"):
        Cascade.from_pretrained(str(tmp_path), text_path="/t5")
    with pytest.raises(DataError, match="not a bundle"):
        Cascade.from_pretrained("nobody/nothing")
