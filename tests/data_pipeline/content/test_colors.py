"""Colour profiles: what is converted, and what is left as it is."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from data_pipeline.common.errors import BadSample
from data_pipeline.content.colors import convert_profile, icc_of_jpeg
from data_pipeline.content.images import decode, dimensions, training_pair
from tests.data_pipeline.photos import jpegs

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped() -> bytes:
    """A profile with the primaries of sRGB in another order: red is shown as green, green as blue, blue as red."""
    found = bytearray(SRGB)
    count = int.from_bytes(found[128:132], "big")
    tags = {bytes(found[132 + 12 * i : 136 + 12 * i]): 136 + 12 * i for i in range(count)}
    places = [tags[name] for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    values = [bytes(found[place : place + 8]) for place in places]
    for place, value in zip(places, values[1:] + values[:1], strict=True):
        found[place : place + 8] = value
    return bytes(found)


def encoded(kind: str, profile: bytes | None, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(jpegs()[0])).convert("RGB")
    if mode == "RGBA":
        picture.putalpha(255)
    picture.convert(mode).save(out, kind, icc_profile=profile, **options)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_colours_of_a_profile_are_shown(kind: str, mode: str) -> None:
    if kind in ("JPEG", "WEBP") and mode != "RGB":
        pytest.skip("this kind has no such pixels")
    options = {"lossless": True} if kind == "WEBP" else {}
    plain, other = encoded(kind, None, mode, **options), encoded(kind, swapped(), mode, **options)
    expected = decode(plain)[:, :, [2, 0, 1]].astype(int)
    assert np.abs(decode(other).astype(int) - expected).max() <= 3
    assert np.array_equal(decode(other, srgb=False), decode(plain))
    high, low = training_pair(other, size=32, low_res_size=16)
    same = training_pair(plain, size=32, low_res_size=16)
    assert low is not None and np.abs(high.astype(int) - same[0][:, :, [2, 0, 1]]).max() <= 3


@pytest.mark.parametrize("profile", [SRGB, b"junk" * 100, swapped()[:300]])
def test_profiles_that_are_srgb_or_damaged_leave_the_pixels_alone(profile: bytes) -> None:
    assert np.array_equal(decode(encoded("JPEG", profile)), decode(encoded("JPEG", None)))


def test_a_profile_in_several_segments_is_joined_and_a_truncated_one_is_ignored() -> None:
    profile = swapped() + bytes(150_000)
    data = encoded("JPEG", profile)
    assert icc_of_jpeg(data) == profile
    second = data.index(b"ICC_PROFILE\0\2")
    assert icc_of_jpeg(data[: second - 4] + b"\xff\xda" + data[second - 4 :]) is None


def test_a_profile_of_other_pixels_changes_nothing() -> None:
    grey = Image.new("L", (8, 8), 77)
    assert convert_profile(grey, swapped()).getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_png_keeps_its_picture_whatever_its_texts_unpack_to(where: str) -> None:
    picture = Image.open(io.BytesIO(jpegs()[0])).convert("RGB")
    texts, out = PngImagePlugin.PngInfo(), io.BytesIO()
    texts.add(b"zTXt", b"workflow\0\0" + __import__("zlib").compress(b"{}" * 2_000_000), after_idat=where == "after")
    picture.save(out, "PNG", pnginfo=texts)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(out.getvalue())).load()
    assert np.array_equal(decode(out.getvalue()), np.asarray(picture))
    assert dimensions(out.getvalue()) == picture.size


@pytest.mark.parametrize(("kind", "options"), [("JPEG2000", {}), ("PPM", {}), ("BMP", {}), ("TIFF", {}), ("MPO", {})])
def test_other_kinds_of_pictures_are_read(kind: str, options: dict[str, Any]) -> None:
    data = encoded(kind, None, **options)
    assert np.abs(decode(data).astype(int) - decode(jpegs()[0])).mean() < 6


def test_the_remedy_for_a_heic_is_named() -> None:
    with pytest.raises(BadSample, match="unsupported_image: heic: convert it to JPEG first"):
        decode(b"\0\0\0\x20ftypheic" + bytes(100))
