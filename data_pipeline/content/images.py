"""Decodes pictures to uint8 arrays (H, W, 3), RGB. Damaged files are errors; orientation, alpha, 16 bits and colour
profiles are handled.

JPEGs are decoded at the smallest DCT scale that still gives `margin` times the pixels needed: the discarded frequencies
are never computed, which saves most of the time of a full decode. All other formats go through Pillow.
Every random choice is a function of (seed, position), see `chance.py`.
"""

from __future__ import annotations

import io
import json
import math
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_pipeline.common.errors import BadSample
from data_pipeline.common.fork_lock import ForkLock
from data_pipeline.content.colors import convert_profile, icc_of_jpeg, jpeg_segments, to_srgb
from data_pipeline.content.members import instead, is_unsupported, picture_kind, unsupported_hint
from data_pipeline.content.resize import box_average, resize_box, resize_square
from data_pipeline.content.webp import decode_still
from data_pipeline.order.chance import hash_below, hash_uniform

__all__ = ["BadSample", "check_size", "decode", "dimensions", "orientation_from_json", "training_pair", "training_view"]

MIN_SIDE = 4
"""Pictures with a shorter side are counters and tracking pixels, not training data: `too_small`."""
MAX_ASPECT = 20.0
"""Pictures more elongated than this have no meaningful square crop: `aspect_ratio`."""
Image.init()
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged EXIF blocks and the like, of pictures that still decode
FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")
    if name in Image.OPEN
)
"""Formats Pillow may open; its other readers start programs (EPS) or read vector graphics."""
LARGE = 16_000_000
"""Pixels above which pictures other than JPEGs are decoded one at a time per process, at up to 16 bytes each."""
_BAND = 256
"""Rows converted at once."""
_ORIENTATION_TAG = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_DCT_EIGHTHS = (1, 2, 4, 8)
"""DCT scales with SIMD code in libjpeg-turbo; without it 3/8 is slower than 4/8, and 5/8 to 7/8 slower than 8/8."""
_EXIF_WORDS = {
    "Horizontal (normal)": 1,
    "Mirrored horizontal": 2,
    "Rotated 180": 3,
    "Mirrored vertical": 4,
    "Mirrored horizontal then rotated 90 CCW": 5,
    "Rotated 90 CW": 6,
    "Mirrored horizontal then rotated 90 CW": 7,
    "Rotated 90 CCW": 8,
}
"""How exifread, and hence img2dataset's .json, spells the orientation tag."""


_large = ForkLock()
_above_pillows_limit = ForkLock()


class View(NamedTuple):
    """What training gets of one picture."""

    high: np.ndarray
    """uint8 (S, S, 3), or (height, width, 3)."""
    low: np.ndarray | None
    """The smaller picture that super-resolution starts from, uint8; None if not asked for."""
    frame: tuple[float, ...]
    """Six numbers in pixels: height and width of the original; top and left of the crop in the whole picture as
    resized; height and width of the crop as resized. The window of `crop_size` inside the crop is not considered."""


def training_pair(data: bytes, **settings: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return `high` and `low` of `training_view`, with the same arguments."""
    view = training_view(data, **settings)
    return view.high, view.low


def training_view(
    data: bytes,
    *,
    size: int,
    low_res_size: int = 0,
    crop_size: int = 0,
    shape: tuple[int, int] | None = None,
    crop: str = "center",
    flip: float = 0.0,
    seed: int = 0,
    position: int = 0,
    margin: float = 2.0,
    max_pixels: int = 64_000_000,
    background: int = 255,
    orientation: int = 1,
    srgb: bool = True,
) -> View:
    """Decode a picture once, for both the target of a stage and the low-res picture it starts from.

    A square of the picture is resized to `size` (antialiased bicubic), and a window of `crop_size` is cut out of it,
    aligned to the low-res pixels. Each low-res pixel is the mean of its block of high-res pixels.

    Args:
        size: side of the whole high-res picture, pixels.
        low_res_size: side of the whole low-res picture; 0: no pair. It must divide `size`.
        crop_size: side of the window, a multiple of size / low_res_size; 0: the whole picture.
        shape: (width, height) in pixels of the crop, instead of a square of `size`; multiples of size / low_res_size.
            Not combined with `crop_size`.
        crop: `random` or `center`, for both the square and the window.
        flip: probability of a horizontal flip, 0 to 1.
        seed, position: determine every random choice.
        margin, max_pixels, background, orientation, srgb: see `decode`.

    Returns:
        `high`, uint8 (S, S, 3) with S = crop_size or size, and `low`, uint8 (S / factor, S / factor, 3) or None, where
        factor = size / low_res_size; with `shape`, (height, width, 3) and the same sides divided by the factor. `frame`
        says where the crop lies in the original.

    Raises:
        BadSample: see `decode`.
        ValueError: the sizes do not fit together.
    """
    factor = size // low_res_size if low_res_size else 1
    if (low_res_size and size % low_res_size) or not 0 <= crop_size <= size or crop_size % factor:
        raise ValueError(
            f"size={size}, low_res_size={low_res_size}, crop_size={crop_size}: low_res_size must divide size, and "
            "crop_size be a multiple of their quotient, up to size"
        )
    target = size if shape is None else min(shape)
    picture, extent, profile, shrunk = _decode(
        data, math.ceil(target * margin), max_pixels, background, orientation, _scratch, srgb
    )
    if shape is None:
        x, y, length = _square(extent, crop, seed, position)
        box = (x, y, x + length, y + length)
        left, top, side = _window(size, crop_size or size, factor, crop, seed, position)
        scale = length / size
        high = to_srgb(resize_square(picture, x + left * scale, y + top * scale, side * scale, side), profile)
    else:
        box = _box(extent, shape, crop, seed, position)
        high = to_srgb(resize_box(picture, box, shape), profile)
    flipped = flip > 0 and hash_uniform(seed, position, "flip") < flip
    if flipped:
        high = np.ascontiguousarray(high[:, ::-1])
    frame = _frame(extent, box, (size, size) if shape is None else shape, shrunk, flipped)
    return View(high, box_average(high, factor) if low_res_size else None, frame)


def decode(
    data: bytes,
    target: int = 0,
    margin: float = 2.0,
    max_pixels: int = 64_000_000,
    background: int = 255,
    orientation: int = 1,
    srgb: bool = True,
) -> np.ndarray:
    """Decode one picture upright, at full size or (JPEG) at a smaller scale that is sufficient for `target`.

    Args:
        data: the encoded picture.
        target: size at which the shorter side will be used, pixels; 0: decode at full size.
        margin: the shorter side of a JPEG is decoded to at least margin * target pixels, if it has as many. 2 costs no
            visible quality (median PSNR of 50 dB against a full decode); 1 is faster and softer.
        max_pixels: larger pictures are rejected by their header, before memory is allocated.
        background: grey value, 0 to 255, behind transparent pixels.
        orientation: EXIF orientation 1 to 8 known from elsewhere, used if the bytes themselves have none.
        srgb: convert the colours of an embedded ICC profile (Adobe RGB, Display P3) to sRGB.

    Returns:
        uint8 (H, W, 3).

    Raises:
        BadSample: `empty_image`, `too_large`, `too_small`, `aspect_ratio`, `unsupported_image` or `decode_error`.
    """
    picture, _, profile, _ = _decode(data, math.ceil(target * margin), max_pixels, background, orientation, None, srgb)
    return to_srgb(picture, profile)


def dimensions(data: bytes) -> tuple[int, int]:
    """Return the stored (width, height), reading only the header; orientation is not applied.

    Raises:
        BadSample: `empty_image`, `decode_error` or `unsupported_image`.
    """
    if not data:
        raise BadSample("empty_image", "the picture has no bytes")
    if data.startswith(b"\xff\xd8\xff"):
        header = _jpeg_header(data)
        if header is not None:
            return header[:2]
    return _open(data).size


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise `BadSample` (`too_large`, `too_small`, `aspect_ratio`) for a picture whose size rules it out."""
    if width * height > max_pixels:
        raise BadSample("too_large", f"{width} x {height} pixels")
    if min(width, height) < MIN_SIDE:
        raise BadSample("too_small", f"{width} x {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample("aspect_ratio", f"{width} x {height} pixels")


def orientation_from_json(member: bytes | None) -> int:
    """Return the EXIF orientation (1 to 8) in img2dataset's .json; 1 if there is none.

    img2dataset resizes pictures without rotating them.
    """
    if not member or b"Image Orientation" not in member:
        return 1
    try:
        exif = json.loads(member).get("exif")
        exif = json.loads(exif) if isinstance(exif, str) else exif
        return _EXIF_WORDS.get(str(exif["Image Orientation"]), 1)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 1


Extent = tuple[float, float, float, float]
"""(left, top, right, bottom) of the picture in decoded pixels; in a scaled JPEG its edge may fall inside a pixel."""


class _Scratch(threading.local):
    """Reusable memory for one decoded picture per thread: page faults of new memory take a third of a decode."""

    limit = 24 << 20
    """Bytes; larger pictures get memory of their own, which is not kept."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray | None:
        """Return at least `size` bytes, valid until this thread's next call; None above the limit."""
        if size > self.limit:
            return None
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory


_scratch = _Scratch()


def _decode(
    data: bytes, least: int, max_pixels: int, background: int, orientation: int, scratch: _Scratch | None, srgb: bool
) -> tuple[np.ndarray, Extent, bytes | None, float]:
    """Decode a picture; the shorter side of a JPEG gets at least `least` pixels if the file has them.

    Returns:
        The upright picture, its extent, the ICC profile still to be applied, and the scale of the decode. With
        `scratch` the picture may lie in memory that this thread's next call overwrites.
    """
    if not data:
        raise BadSample("empty_image", "the picture has no bytes")
    if data.startswith(b"\xff\xd8\xff"):
        jpeg = _decode_jpeg(data, least, max_pixels, orientation, scratch)
        if jpeg is not None:
            return *jpeg[:2], icc_of_jpeg(data) if srgb else None, jpeg[2]
    picture = _decode_any(data, max_pixels, background, orientation, srgb)
    return picture, (0.0, 0.0, float(picture.shape[1]), float(picture.shape[0])), None, 1.0


def _decode_jpeg(
    data: bytes, least: int, max_pixels: int, orientation: int, scratch: _Scratch | None
) -> tuple[np.ndarray, Extent, float] | None:
    """Return the picture, its extent and its scale, or None if only Pillow can decode it (CMYK, rare subsampling)."""
    header = _jpeg_header(data)
    if header is None or header[2] in ("CMYK", "YCCK"):
        return None
    width, height, _ = header
    check_size(width, height, max_pixels)
    eighths = next(n for n in _DCT_EIGHTHS if n == 8 or (least and min(height, width) * n >= 8 * least))
    rows, columns = -(-height * eighths // 8), -(-width * eighths // 8)
    memory = scratch.take(rows * columns * 3) if scratch else None
    try:
        picture = simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns, buffer=memory, strict=True)
    except ValueError as error:
        raise BadSample("decode_error", str(error)) from error
    if _has_exif(data):
        orientation = _exif_orientation(_open(data), orientation)
    scale = eighths / 8  # the decoder rounds the sides up to whole pixels
    return _upright(picture, orientation), _upright_extent(picture, width * scale, height * scale, orientation), scale


def _jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """Return (width, height, colour space) of a JPEG; None if only Pillow may be able to read it."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # the latter for subsampling that simplejpeg has no name for, such as 4:4:1
        return None
    return width, height, space


def _decode_any(data: bytes, max_pixels: int, background: int, orientation: int, srgb: bool) -> np.ndarray:
    image = _open(data)
    check_size(*image.size, max_pixels)
    with _large if image.width * image.height > LARGE else nullcontext():
        return _decode_opened(image, data, background, orientation, srgb)


def _decode_opened(image: Image.Image, data: bytes, background: int, orientation: int, srgb: bool) -> np.ndarray:
    try:
        if image.format == "WEBP" and image.mode in ("RGB", "RGBA"):
            still = decode_still(data, *image.size, image.mode)
            if still is not None:
                return _upright(
                    _still_to_rgb(still, image.info, background, srgb), _exif_orientation(image, orientation)
                )
        turned = image.format == "TIFF" and _exif_orientation(image, 0) > 0  # Pillow applies it to TIFFs itself
        try:
            image.load()
        except ValueError:
            lean = without_text(data)  # Pillow rejects text chunks above 1 MB; they may follow the pixels
            if len(lean) == len(data):
                raise
            image = _open(lean)
            image.load()
        orientation = 1 if turned else _exif_orientation(image, orientation)
        if image.width * image.height <= LARGE:
            rgb = to_rgb(image, background, srgb)
            del image  # together with its decoder it takes several times the memory of the pixels
            return _upright(np.asarray(rgb), orientation)
        width = image.width
        bands = _bands(image.height, lambda top, end: to_rgb(image.crop((0, top, width, end)), background, srgb))
        return _upright(bands, orientation)
    except BadSample:
        raise
    except Exception as error:  # Pillow's readers raise all kinds of errors on damaged files
        raise BadSample("decode_error", f"{type(error).__name__}: {error}") from error


def _still_to_rgb(still: np.ndarray, info: dict[Any, Any], background: int, srgb: bool) -> np.ndarray:
    """Convert a decoded RGB or RGBA picture, of which Pillow read `info`, as `to_rgb` does."""
    if still.shape[2] == 3:
        return to_srgb(still, info.get("icc_profile") if srgb else None)

    def convert(top: int, end: int) -> Image.Image:
        band = Image.fromarray(still[top:end])
        band.info.update(info)
        return to_rgb(band, background, srgb)

    return _bands(len(still), convert)


def _bands(height: int, convert: Callable[[int, int], Image.Image]) -> np.ndarray:
    """Convert a picture some rows at a time, because converting a large one at once holds it several times.

    Args:
        height: of the picture, pixels.
        convert: first and end row -> these rows as RGB.
    """
    rows = [(top, min(top + _BAND, height)) for top in range(0, height, _BAND)]
    first = np.asarray(convert(*rows[0]))
    picture = np.empty((height, *first.shape[1:]), np.uint8)
    picture[: len(first)] = first
    for top, end in rows[1:]:
        picture[top:end] = np.asarray(convert(top, end))
    return picture


def _open(data: bytes) -> Image.Image:
    """Open a picture, reading only its header. Raises `BadSample`."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        return _open_any_size(data)
    except UnidentifiedImageError as error:
        kind = picture_kind(data)
        if is_unsupported(kind):
            raise BadSample("unsupported_image", f"{kind}: {unsupported_hint(str(kind))}") from error
        words = instead(data[:99]) or f"not a picture in a known format ({', '.join(FORMATS)})"
        raise BadSample("decode_error", words) from error
    except Exception as error:
        lean = without_text(data) if isinstance(error, ValueError) else data
        if len(lean) < len(data):
            return _open(lean)
        raise BadSample("decode_error", f"{type(error).__name__}: {error}") from error


def _open_any_size(data: bytes) -> Image.Image:
    """Open a picture above the limit of Pillow: here, `data.max_pixels` is the limit, and may be above it."""
    with _above_pillows_limit:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def without_text(data: bytes) -> bytes:
    """Return a PNG without its text and colour profile, which may be larger than Pillow accepts; other data as is."""
    if not data.startswith(_PNG):
        return data
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def to_rgb(image: Image.Image, background: int = 255, srgb: bool = True) -> Image.Image:
    """Convert an image to 8-bit RGB in sRGB, with 16-bit grey rescaled and transparency composed on grey.

    Args:
        background: grey value, 0 to 255, behind transparent pixels.
        srgb: convert the colours of an embedded ICC profile.

    Raises:
        BadSample: floating-point pixels, or integers of more than 16 bits.
    """
    profile = image.info.get("icc_profile") if srgb else None
    if image.mode.startswith("I"):
        return _grey_from_16_bit(image)
    if image.mode == "F":
        raise BadSample("decode_error", "floating-point pixels have no agreed range")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        above = convert_profile(layers.convert("RGB"), profile)
        above.putalpha(layers.getchannel("A"))
        behind = Image.new("RGBA", image.size, (background, background, background, 255))
        return Image.alpha_composite(behind, above).convert("RGB")
    return convert_profile(image, profile)


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255; Pillow's own conversion clips, which turns most such pictures white."""
    values = np.asarray(image).astype(np.int64)
    if values.max() > 65535:
        raise BadSample("decode_error", "integers above 65535 have no agreed range")
    return Image.fromarray(((np.maximum(values, 0) + 128) // 257).astype(np.uint8)).convert("RGB")


def _has_exif(data: bytes) -> bool:
    """Return whether a JPEG has an EXIF block before its image data; reads only segment headers."""
    return any(marker == 0xE1 and data[begin : begin + 6] == b"Exif\0\0" for marker, begin, _ in jpeg_segments(data))


def _exif_orientation(image: Image.Image, default: int) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, default))
    except Exception:  # a damaged EXIF block does not make the pixels bad
        return default


def _upright(picture: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (values outside 2..8 change nothing)."""
    if orientation in (5, 6, 7, 8):
        picture = picture.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    return np.ascontiguousarray(picture)


def _upright_extent(stored: np.ndarray, width: float, height: float, orientation: int) -> Extent:
    """Return where the upper left `width` x `height` part of the stored array lies after `_upright`."""
    rows, columns = stored.shape[:2]
    if orientation in (5, 6, 7, 8):
        rows, columns, width, height = columns, rows, height, width
    left = columns - width if orientation in (2, 3, 6, 7) else 0.0
    top = rows - height if orientation in (3, 4, 7, 8) else 0.0
    return left, top, left + width, top + height


def _square(extent: Extent, crop: str, seed: int, position: int) -> tuple[float, float, float]:
    """Return the square crop (left, top, side) in decoded pixels.

    A random crop starts at a whole pixel, where resizing is fastest; a centred one is exact.
    """
    left, top, right, bottom = extent
    side = min(right - left, bottom - top)
    room = right - left - side, bottom - top - side
    if crop == "center":
        return left + room[0] / 2, top + room[1] / 2, side
    share = hash_uniform(seed, position, "crop")
    x, y = (math.floor(share * (math.floor(free) + 1)) for free in room)
    return left + x, top + y, side


def _box(
    extent: Extent, shape: tuple[int, int], crop: str, seed: int, position: int
) -> tuple[float, float, float, float]:
    """Return the largest crop (left, top, right, bottom) with the proportions of `shape` (width, height), in decoded
    pixels."""
    left, top, right, bottom = extent
    scale = min((right - left) / shape[0], (bottom - top) / shape[1])
    width, height = shape[0] * scale, shape[1] * scale
    share = 0.5 if crop == "center" else hash_uniform(seed, position, "crop")
    x, y = left + share * (right - left - width), top + share * (bottom - top - height)
    return x, y, x + width, y + height


def _frame(
    extent: Extent, box: Extent, shape: tuple[int, int], shrunk: float, flipped: bool
) -> tuple[float, float, float, float, float, float]:
    """Return the `View.frame` of the crop `box`, resized to `shape` (width, height), of a picture decoded at the scale
    `shrunk`. In a flipped picture, left is measured after the flip."""
    left, top, right, bottom = extent
    scale = shape[0] / (box[2] - box[0])
    aside = right - box[2] if flipped else box[0] - left
    return (bottom - top) / shrunk, (right - left) / shrunk, (box[1] - top) * scale, aside * scale, shape[1], shape[0]


def bucket_shape(ratio: float, size: int, multiple: int) -> tuple[int, int]:
    """Return (width, height), multiples of `multiple`, of about size x size pixels and about this width / height."""
    width, height = (max(round(size * side / multiple), 1) * multiple for side in (ratio**0.5, ratio**-0.5))
    return width, height


def _window(size: int, window: int, factor: int, crop: str, seed: int, position: int) -> tuple[int, int, int]:
    """Return (left, top, side) of the training window inside the resized picture, aligned to `factor`."""
    places = (size - window) // factor + 1
    if crop == "random":
        column, row = (hash_below(places, seed, position, f"window {axis}") for axis in "xy")
    else:
        column = row = (places - 1) // 2
    return column * factor, row * factor, window
