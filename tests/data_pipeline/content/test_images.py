"""Decoding of good, odd and damaged files; crops and pairs."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipeline.common.errors import BadSample
from data_pipeline.content.images import decode, dimensions, orientation_from_json, training_pair, training_view
from data_pipeline.content.resize import box_average
from data_pipeline.shards.samples import image_size
from tests.data_pipeline.damage import promised
from tests.data_pipeline.photos import jpegs


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(number: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(jpegs()[number])).convert("RGB")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def plain_resize(image: Image.Image, size: int) -> np.ndarray:
    """A full decode and one antialiased resize of the central square, as a simple reader does it."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


def refused(data: bytes, **options: int) -> str:
    with pytest.raises(BadSample) as caught:
        decode(data, **options)
    return caught.value.reason


def test_scaled_decoding_costs_no_visible_quality() -> None:
    """On pictures enlarged to the size of real ones, the default margin stays at 50 dB of a full decode."""
    quality, scaled = [], 0
    for number in range(12):
        image = photo(number)
        times = 3 + number % 3
        large = image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
        data = encoded(large, "JPEG", quality=92)
        reference = plain_resize(Image.open(io.BytesIO(data)), 64)
        quality.append(psnr(training_pair(data, size=64)[0], reference))
        scaled += min(decode(data, target=64).shape[:2]) <= min(large.size) / 3
    assert scaled == 12
    assert np.median(quality) >= 50
    assert min(quality) >= 45


@pytest.mark.parametrize(("target", "margin"), [(64, 2.0), (64, 1.0), (100, 2.0), (16, 3.0)])
def test_the_decoded_side_is_at_least_margin_times_the_target(target: int, margin: float) -> None:
    for data in jpegs():
        full, scaled = decode(data), decode(data, target, margin)
        assert min(scaled.shape[:2]) >= min(target * margin, min(full.shape[:2]))
        assert scaled.shape[0] <= full.shape[0]


def test_small_pictures_are_enlarged() -> None:
    high, low = training_pair(encoded(photo().resize((20, 30)), "PNG"), size=64)
    assert high.shape == (64, 64, 3) and low is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_comes_from_the_file_or_from_outside(orientation: int) -> None:
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, "PNG", exif=exif)))))
    assert np.array_equal(decode(encoded(image, "PNG", exif=exif)), upright)
    assert np.array_equal(decode(encoded(image, "PNG"), orientation=orientation), upright)
    jpeg = encoded(image, "JPEG", quality=95, exif=exif)
    assert psnr(decode(jpeg), upright) > 30
    assert np.array_equal(decode(jpeg, orientation=3), decode(jpeg)), "the file's own tag wins"


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP", "JPEG"])
def test_every_format_is_turned_once_whoever_else_knows_the_orientation(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (30, 40)), kind, exif=exif)
    assert decode(data).shape == decode(data, orientation=6).shape == (30, 40, 3)


@pytest.mark.parametrize("sizes", [(256, 100, 0), (64, 0, 65), (64, 16, 30), (64, 16, -4)])
def test_sizes_that_do_not_fit_together_are_refused(sizes: tuple[int, int, int]) -> None:
    size, low, window = sizes
    with pytest.raises(ValueError, match=f"size={size}, low_res_size={low}, crop_size={window}"):
        training_pair(jpegs()[0], size=size, low_res_size=low, crop_size=window)


@pytest.mark.parametrize("as_text", [True, False])
def test_orientation_of_img2dataset_json(as_text: bool) -> None:
    exif = {"Image Orientation": "Rotated 90 CW"}
    assert orientation_from_json(json.dumps({"exif": json.dumps(exif) if as_text else exif}).encode()) == 6


@pytest.mark.parametrize(
    "member",
    [
        None,
        b"",
        b"{}",
        b'{"exif": null, "x": "Image Orientation"}',
        b'{"exif": "Image Orientation"}',
        b'["Image Orientation"]',
        b'{"exif": {"Image Orientation": [6]}}',
        b'{"exif": "{\\"Image Orientation\\"',
    ],
)
def test_orientation_is_upright_where_the_json_does_not_say(member: bytes | None) -> None:
    assert orientation_from_json(member) == 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_show_the_background_not_what_is_hidden(mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    decoded = decode(encoded(image.convert(mode), "PNG"), background=200)
    assert np.all(decoded[:, :16] == 200)
    assert np.all(decoded[:, 16:, 0] != 200)


def test_palette_and_colour_key_transparency() -> None:
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(1, (16, 0, 32, 32))
    decoded = decode(encoded(palette, "PNG", transparency=0), background=99)
    assert np.all(decoded[:, :16] == 99) and np.all(decoded[:, 16:] == (200, 100, 50))
    keyed = Image.new("RGB", (32, 32), (1, 2, 3))
    assert np.all(decode(encoded(keyed, "PNG", transparency=(1, 2, 3)), background=7) == 7)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.asarray(photo().convert("L")).astype(np.uint16)
    decoded = decode(encoded(Image.fromarray(grey * 257), "PNG"))
    assert np.array_equal(decoded[..., 0], grey) and np.array_equal(decoded[..., 2], grey)


def test_sixteen_bit_colour_is_scaled() -> None:
    pixels = np.asarray(photo().resize((32, 32)))
    wide = (pixels.astype(">u2") * 257).tobytes()
    rows = b"".join(b"\0" + wide[i * 192 : (i + 1) * 192] for i in range(32))
    header = (32).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in chunks)
    assert np.array_equal(decode(png), pixels)


def _chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def test_cmyk_keeps_its_colours() -> None:
    decoded = decode(encoded(photo().convert("CMYK"), "JPEG", quality=95))
    assert psnr(decoded, np.asarray(photo())) > 30


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"progressive": True}),
        ("JPEG", {"keep_rgb": True}),
        ("JPEG", {"subsampling": "4:4:4"}),
        ("PNG", {}),
        ("WEBP", {"quality": 95}),
        ("BMP", {}),
        ("TIFF", {}),
        ("GIF", {}),
    ],
)
def test_every_usual_format_is_read(kind: str, options: dict[str, object]) -> None:
    assert psnr(decode(encoded(photo(), kind, **options)), np.asarray(photo())) > (20 if kind == "GIF" else 30)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_modes_without_colour_become_rgb(mode: str) -> None:
    image = photo().convert(mode)
    assert np.array_equal(decode(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_subsampling_that_simplejpeg_has_no_name_for_is_read() -> None:
    square = np.ascontiguousarray(np.asarray(photo())[:64, :64])
    data = bytearray(simplejpeg.encode_jpeg(square, colorsubsampling="411"))
    place = data.index(b"\xff\xc0") + 11
    assert data[place] == 0x41
    data[place] = 0x14  # 4:4:1, as a lossless rotation of 4:1:1 has it
    jpeg = bytes(data)
    with pytest.raises(KeyError):
        simplejpeg.decode_jpeg_header(jpeg)
    assert np.array_equal(decode(jpeg), np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))
    assert dimensions(jpeg) == image_size(jpeg) == (64, 64)


def test_bytes_after_the_end_of_a_jpeg_are_not_damage() -> None:
    assert np.array_equal(decode(jpegs()[0] + b"\xff\x00garbage" * 100), decode(jpegs()[0]))


def test_damaged_files_are_refused_with_the_reason() -> None:
    data = jpegs()[0]
    flipped = bytearray(data)
    flipped[len(data) // 2 : len(data) // 2 + 80] = bytes(80)
    assert refused(data[: len(data) // 2]) == "decode_error"
    assert refused(data[: len(data) // 2], target=16) == "decode_error"
    assert refused(bytes(flipped)) == "decode_error", "Pillow takes this one silently"
    assert refused(b"") == "empty_image"
    assert refused(b"<html><body>404</body></html>") == "decode_error"
    assert refused(encoded(photo(), "PNG")[:5000]) == "decode_error"
    assert refused(encoded(photo(), "WEBP")[:2000]) == "decode_error"
    assert refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n") == "decode_error"
    assert refused(encoded(Image.new("F", (16, 16), 0.5), "TIFF")) == "decode_error"


def test_sizes_that_cannot_be_training_data() -> None:
    assert refused(encoded(Image.new("RGB", (1, 1)), "PNG")) == "too_small"
    assert refused(encoded(Image.new("RGB", (1, 12000)), "JPEG")) == "too_small"
    assert refused(encoded(Image.new("RGB", (500, 8)), "PNG")) == "aspect_ratio"
    assert refused(jpegs()[0], max_pixels=1000) == "too_large"
    assert refused(encoded(photo(), "PNG"), max_pixels=1000) == "too_large"


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    bomb = encoded(Image.new("1", (30_000, 8_000)), "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(bomb) == "too_large"
    assert refused(promised(100_000, 100_000)) == "too_large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_max_pixels_may_be_above_pillows_own_limit() -> None:
    picture = encoded(Image.new("1", (20_000, 10_000)), "TIFF", compression="group4")
    assert dimensions(picture) == image_size(picture) == (20_000, 10_000)
    assert refused(picture) == "too_large"
    assert refused(promised(20_000, 10_000), max_pixels=200_000_000) == "decode_error"
    assert Image.MAX_IMAGE_PIXELS, "a program's own pictures keep Pillow's limit"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 3), st.data())
def test_any_damage_is_a_bad_sample_or_a_picture(kind: int, data: st.DataObject) -> None:
    name = ("JPEG", "PNG", "WEBP", "GIF")[kind]
    body = bytearray(encoded(photo(1).resize((48, 40)), name))
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = decode(bytes(body[: data.draw(st.integers(1, len(body)))]))
    except BadSample:
        return
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3


def test_dimensions_read_the_header_only() -> None:
    assert dimensions(jpegs()[0]) == photo(0).size
    assert dimensions(encoded(photo(), "WEBP")) == photo(0).size
    with pytest.raises(BadSample, match="empty_image"):
        dimensions(b"")


def test_pictures_own_their_memory() -> None:
    """Decoding reuses a thread's memory; returned pictures must not change."""
    data = encoded(photo().resize((64, 64)), "JPEG")
    kept = [training_pair(data, size=64), training_pair(jpegs()[0], size=64, low_res_size=16), (decode(data), None)]
    copies = [tuple(None if part is None else part.copy() for part in pair) for pair in kept]
    for other in jpegs():
        training_pair(other, size=64)
        decode(other)
    for pair, copy in zip(kept, copies, strict=True):
        assert all(a is b is None or np.array_equal(a, b) for a, b in zip(pair, copy, strict=True))


def test_threads_do_not_share_that_memory() -> None:
    from concurrent.futures import ThreadPoolExecutor

    alone = [training_pair(data, size=64)[0] for data in jpegs()]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: training_pair(data, size=64)[0], jpegs() * 20))
    assert all(np.array_equal(picture, alone[number % 12]) for number, picture in enumerate(together))


def test_an_exif_block_is_found_wherever_it_stands_before_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(photo(), "JPEG", exif=exif, comment=b"x" * 60_000, icc_profile=b"y" * 60_000)
    end_of_jfif = 4 + int.from_bytes(data[4:6], "big")
    segment = b"\xff\xe2" + (50_000).to_bytes(2, "big") + bytes(49_998)
    for variant in (data, data[:end_of_jfif] + segment + b"\xff" + data[end_of_jfif:]):
        assert psnr(decode(variant), np.asarray(photo())[::-1, ::-1]) > 30
    unrotated = encoded(photo(), "JPEG", comment=b"Exif\0\0")
    assert psnr(decode(unrotated), np.asarray(photo())) > 30


def test_a_damaged_exif_block_prints_nothing() -> None:
    """Pillow would print two lines, with a path of its own, into the output of a training."""
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0")
    program = "import sys; from data_pipeline.content.images import decode; decode(sys.stdin.buffer.read())"
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("size", "low", "window"), [(64, 16, 0), (128, 32, 64), (96, 32, 48)])
def test_the_low_res_picture_is_the_box_average_of_the_high_res_one(size: int, low: int, window: int) -> None:
    factor = size // low
    for position in range(6):
        high, small = training_pair(
            jpegs()[position], size=size, low_res_size=low, crop_size=window, crop="random", flip=0.5, position=position
        )
        assert small is not None
        assert high.shape == ((window or size),) * 2 + (3,)
        assert np.array_equal(small, box_average(high, factor))


@pytest.mark.parametrize("crop", ["random", "center"])
@pytest.mark.parametrize("size", [64, 512])
def test_a_window_is_cut_from_the_whole_picture_on_the_low_res_grid(crop: str, size: int) -> None:
    places = set()
    for position in range(8):
        common = {"size": size, "crop": crop, "seed": 3, "position": position}
        whole = training_pair(jpegs()[2], low_res_size=size // 4, **common)[0].astype(int)
        window = training_pair(jpegs()[2], low_res_size=size // 4, crop_size=size // 2, **common)[0]
        half, every = size // 2, size // 64
        errors = {  # of every n-th pixel; of all pixels at the best place
            (x, y): np.abs(whole[y : y + half : every, x : x + half : every] - window[::every, ::every]).max()
            for x in range(0, half + 1, 4)
            for y in range(0, half + 1, 4)
        }
        place = x, y = min(errors, key=lambda at: errors[at])
        error = np.abs(whole[y : y + half, x : x + half] - window).max()
        assert error <= 8, "Pillow may resize columns or rows first, and rounds in between"
        places.add(place)
    assert len(places) == (1 if crop == "center" else len(places)) and (crop == "center" or len(places) > 4)


def test_crops_and_flips_depend_on_seed_and_position_alone() -> None:
    def pictures(seed: int) -> list[bytes]:
        return [
            training_pair(jpegs()[0], size=32, crop="random", flip=0.5, seed=seed, position=p)[0].tobytes()
            for p in range(20)
        ]

    assert pictures(1) == pictures(1)
    assert len(set(pictures(1))) > 15
    assert pictures(1) != pictures(2)


def test_flips_happen_with_their_probability_and_only_mirror() -> None:
    straight = training_pair(jpegs()[0], size=16)[0]
    flipped = 0
    for position in range(300):
        picture = training_pair(jpegs()[0], size=16, flip=0.3, position=position)[0]
        assert np.array_equal(picture, straight) or np.array_equal(picture, straight[:, ::-1])
        flipped += np.array_equal(picture, straight[:, ::-1])
    assert 60 < flipped < 120


def test_the_random_square_moves_along_the_longer_side_only() -> None:
    gradient = np.zeros((40, 200, 3), np.uint8)
    gradient[..., 0] = np.arange(200)
    gradient[..., 1] = np.arange(40)[:, None]
    data = encoded(Image.fromarray(gradient), "PNG")
    pictures = [training_pair(data, size=40, crop="random", position=p)[0] for p in range(60)]
    assert all(np.abs(picture[:, 5, 1].astype(int) - np.arange(40)).max() <= 1 for picture in pictures)
    lefts = [int(picture[20, 0, 0]) for picture in pictures]
    assert min(lefts) < 20 and max(lefts) > 140


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_frame_says_where_the_picture_lies_in_its_original(kind: str) -> None:
    """A JPEG of 640 x 320 is decoded at a quarter for 64 px; the original size is that of the file nevertheless."""
    wide = photo().resize((640, 320))
    data = encoded(wide, kind)
    assert training_view(data, size=32).frame == (320, 640, 0, 16, 32, 32), "the middle of 64 x 32"
    assert training_view(data, size=32, low_res_size=16, crop_size=16).frame == (320, 640, 0, 16, 32, 32)
    assert training_view(data, size=32, shape=(40, 24)).frame == pytest.approx((320, 640, 0, 4, 24, 40))
    frames = [training_view(data, size=32, crop="random", position=p).frame for p in range(20)]
    assert all(0 <= frame[3] <= 32 and frame[2] == 0 for frame in frames) and len({*frames}) > 10
    flipped = [training_view(data, size=32, crop="random", position=p, flip=1.0).frame for p in range(20)]
    assert all(a[3] + b[3] == pytest.approx(32) for a, b in zip(frames, flipped, strict=True))


def test_the_frame_of_a_turned_picture_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo().resize((640, 320)), "JPEG", exif=exif)
    assert training_view(data, size=32).frame == (640, 320, 16, 0, 32, 32)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<html>404", "error page"),
        (b"\0\1", "JPEG"),
    ],
)
def test_content_that_is_not_a_picture_is_identified(data: bytes, words: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode(data)
    assert caught.value.reason == "decode_error" and words in caught.value.detail
