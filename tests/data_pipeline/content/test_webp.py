from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_pipeline.common.errors import BadSample
from data_pipeline.content import images
from data_pipeline.content.images import decode
from data_pipeline.content.webp import decode_still
from tests.data_pipeline.photos import jpegs

PHOTO = Image.open(io.BytesIO(jpegs()[0])).convert("RGB")


def webp(image: Image.Image = PHOTO, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", **options)
    return out.getvalue()


@pytest.mark.parametrize("options", [{"quality": 80}, {"lossless": True, "quality": 0}, {"exif": b""}])
def test_the_same_pixels_as_pillow(options: dict[str, Any]) -> None:
    data = webp(**options)
    picture = decode_still(data, *PHOTO.size, "RGB")
    assert picture is not None
    assert np.array_equal(picture, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.array_equal(picture, decode(data))


def test_orientation_and_colours_are_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = webp(exif=exif.tobytes(), icc_profile=profile)
    assert decode(data).shape == (PHOTO.width, PHOTO.height, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("options", [{"quality": 80}, {"lossless": True, "quality": 0}])
@pytest.mark.parametrize("more", [0, 6])
def test_the_first_frame_of_an_animation_is_pillows(mode: str, options: dict[str, Any], more: int) -> None:
    """Even if it is smaller than the picture by `more` pixels."""
    first = PHOTO.resize((31, 22))
    if mode == "RGBA":
        first.putalpha(Image.linear_gradient("L").resize(first.size))
    data = bytearray(webp(first, save_all=True, append_images=[first.rotate(90)], **options))
    for at, side in ((24, 31), (27, 22)):
        data[at : at + 3] = (side + more - 1).to_bytes(3, "little")
    image = Image.open(io.BytesIO(bytes(data)))
    assert getattr(image, "n_frames", 1) == 2 and image.size == (31 + more, 22 + more)
    picture = decode_still(bytes(data), *image.size, image.mode)
    assert picture is not None and np.array_equal(picture, np.asarray(image))


def test_truncated_files_are_left_to_pillow() -> None:
    for data in (webp(), webp(save_all=True, append_images=[PHOTO.rotate(90)])):
        for end in (len(data) // 3, 60, 40):
            assert decode_still(data[:end], *PHOTO.size, "RGB") is None
            with pytest.raises(BadSample):
                decode(data[:end])


def test_transparency_is_composed_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = PHOTO.copy()
    layers.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    data = webp(layers, lossless=True, quality=0, exact=True)
    expected = np.asarray(images.to_rgb(layers, 30))
    assert np.array_equal(decode(data, background=30), expected)
    monkeypatch.setattr(images, "_BAND", 7)
    assert np.array_equal(decode(data, background=30), expected)


def test_large_pictures_are_copied_in_bands_and_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    PHOTO.save(out, "PNG")
    monkeypatch.setattr(images, "LARGE", 1000)
    monkeypatch.setattr(images, "_BAND", 7)
    assert np.array_equal(decode(out.getvalue()), np.asarray(PHOTO))
    assert not images._large.locked()
