"""Shards with four good samples and one kind of damage each, as found in the wild.

`CASES` maps a name to (a function that gives the bytes of the shard, samples that must be delivered, reasons that must
be counted as dropped, findings that must be counted as warnings).
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable

from PIL import Image

from tests.data_pipeline.photos import samples

Sample = tuple[str, dict[str, bytes]]
Case = tuple[Callable[[], bytes], int, dict[str, int], dict[str, int]]
BAD = "000000500"


def good(count: int = 4) -> list[Sample]:
    return [(key, dict(members)) for key, members in list(samples().items())[:count]]


def bad(**changes: bytes | None) -> Sample:
    """A fifth sample with some members replaced, or left out (None)."""
    members = {**list(samples().values())[4], **changes}
    return BAD, {name: data for name, data in members.items() if data is not None}


def archive(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of members, given by their full names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members:
            add(file, name, data)
    return buffer.getvalue()


def tar(entries: Iterable[Sample], kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for key, members in entries:
            for extension, data in members.items():
                add(archive, f"{key}.{extension}", data)
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), 1.5  # a fraction makes a pax header, as img2dataset's members have
    archive.addfile(info, io.BytesIO(data))


def around(sample: Sample) -> Callable[[], bytes]:
    return lambda: tar([*good()[:2], sample, *good()[2:]])


def photo() -> Image.Image:
    return Image.open(io.BytesIO(bad()[1]["jpg"])).convert("RGB")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(image: Image.Image) -> Sample:
    return BAD, {"png": encoded(image, "PNG"), "txt": b"a picture", "json": b"{}"}


def jpeg(data: bytes) -> Sample:
    return bad(jpg=data)


def text(data: bytes) -> Sample:
    return bad(txt=data)


def promised(width: int, height: int) -> bytes:
    """A PNG whose header claims this size."""
    data = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def pax_size(value: str) -> bytes:
    """A last member whose pax header says that its size is `value`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key, members in [*good(), bad()]:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.pax_headers = len(data), {"size": value} if key == BAD else {}
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zero_tail() -> bytes:
    """The last sample and the 20 kB after it are zero bytes: a file that was allocated at full size and never
    finished."""
    whole = tar([*good(), bad()])
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        begin = archive.getmembers()[12].offset
    return whole[: begin - begin % 512] + bytes(20_480)


def zero_hole() -> bytes:
    return tar(good()).rstrip(b"\0") + bytes(102_400 - len(tar(good()).rstrip(b"\0")) % 512) + tar([bad()])


def gzip_of_wrong_checksum() -> bytes:
    data = bytearray(gzip.compress(tar([*good(), bad()])))
    data[-8] ^= 0xFF
    return bytes(data)


def gzip_of_wrong_block() -> bytes:
    """The last picture contains a deflate block of an invalid type."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(cut_inside_member()) + packer.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 2000


def transparent() -> Image.Image:
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def grey_16_bit() -> Image.Image:
    import numpy as np

    return Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 257)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(), "JPEG", exif=exif)


def broken_scan() -> bytes:
    data = bytearray(bad()[1]["jpg"])
    data[len(data) // 2 : len(data) // 2 + 60] = bytes(60)
    return bytes(data)


def with_member(kind: bytes) -> bytes:
    """A link or device with a picture's name in place of the picture."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, (key, members) in enumerate(good()):
            for extension, data in members.items():
                add(archive, f"{key}.{extension}", data)
            if number == 1:
                info = tarfile.TarInfo(f"{BAD}.jpg")
                info.type, info.linkname = kind, "/etc/passwd"
                archive.addfile(info)
                add(archive, f"{BAD}.txt", b"a link")
    return buffer.getvalue()


def broken_header() -> bytes:
    """The third sample's first header (after its pax records) is overwritten."""
    whole = bytearray(tar([*good(), bad()], tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        header = archive.getmembers()[6].offset
    whole[header : header + 512] = b"\xa5" * 512
    return bytes(whole)


def cut_inside_member() -> bytes:
    whole = tar([*good(), bad()])
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        return whole[: archive.getmembers()[9].offset_data + 1000]


def without_end() -> bytes:
    whole = tar([*good(), bad()])
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = archive.getmembers()[-1]
        return whole[: last.offset_data + -(-last.size // 512) * 512]


def concatenated() -> bytes:
    return tar(good()) + tar([bad()])


CASES: dict[str, Case] = {
    "image_truncated": (around(jpeg(bad()[1]["jpg"][:9000])), 4, {"decode_error": 1}, {}),
    "image_broken_scan": (around(jpeg(broken_scan())), 4, {"decode_error": 1}, {}),
    "image_zero_bytes": (around(jpeg(b"")), 4, {"empty_image": 1}, {}),
    "image_is_a_page": (around(jpeg(b"<html>not found</html>")), 4, {"decode_error": 1}, {}),
    "image_cmyk": (around(jpeg(encoded(photo().convert("CMYK"), "JPEG"))), 5, {}, {}),
    "image_16_bit": (around(png(grey_16_bit())), 5, {}, {}),
    "image_transparent": (around(png(transparent())), 5, {}, {}),
    "image_rotated": (around(jpeg(rotated())), 5, {}, {}),
    "image_sliver": (around(png(Image.new("RGB", (1200, 1)))), 4, {"too_small": 1}, {}),
    "image_banner": (around(png(Image.new("RGB", (1200, 20)))), 4, {"aspect_ratio": 1}, {}),
    "image_dot": (around(png(Image.new("RGB", (1, 1)))), 4, {"too_small": 1}, {}),
    "image_progressive": (around(jpeg(encoded(photo(), "JPEG", progressive=True))), 5, {}, {}),
    "image_bomb": (around((BAD, {"png": promised(10**5, 10**5), "txt": b"boom"})), 4, {"too_large": 1}, {}),
    "image_wider_than_32_bits": (around((BAD, {"png": promised(2**32 - 1, 8), "txt": b"x"})), 4, {"too_large": 1}, {}),
    "image_trailing_garbage": (around(jpeg(bad()[1]["jpg"] + b"\0junk" * 99)), 5, {}, {}),
    "image_missing": (around(bad(jpg=None)), 4, {"missing_image": 1}, {}),
    "json_missing": (around(bad(json=None)), 5, {}, {}),
    "json_invalid": (around(bad(json=b'{"caption": ')), 5, {}, {"bad_json": 1}),
    "json_deep": (around(bad(json=b"[" * 200_000)), 5, {}, {"bad_json": 1}),
    "json_huge_score": (around(bad(json=b'{"punsafe": 1' + b"0" * 400 + b"}")), 5, {}, {"bad_score": 1}),
    "json_word_as_score": (around(bad(json=b'{"punsafe": "high"}')), 5, {}, {"bad_score": 1}),
    "boxes_as_caption": (around(bad(txt=b"0 .5 .5 .1 .1\n", json=None)), 4, {"missing_caption": 1}, {"box_labels": 1}),
    "text_is_nan": (around(bad(txt=b"nan\n", json=b'{"caption": "None"}')), 4, {"missing_caption": 1}, {}),
    "text_is_json": (around(bad(txt=b'{"caption": "x"}')), 5, {}, {"json_as_caption": 1}),
    "image_32_bit": (around(jpeg(encoded(Image.new("I", (64, 64), 70_000), "TIFF"))), 4, {"decode_error": 1}, {}),
    "json_failed": (around(bad(json=json.dumps({"status": "failed_to_download"}).encode())), 5, {}, {}),
    "text_missing": (around(bad(txt=None)), 5, {}, {}),
    "text_nowhere": (around(bad(txt=None, json=b'{"caption": " "}')), 4, {"missing_caption": 1}, {}),
    "text_utf16": (around(text("ein Hügel".encode("utf-16"))), 5, {}, {}),
    "text_latin1": (around(text("ein Hügel".encode("latin-1"))), 4, {"bad_text": 1}, {}),
    "text_nul": (around(text(b"a\0cat\0")), 5, {}, {}),
    "text_100k": (around(text(b"x" * 100_000)), 5, {}, {}),
    "text_white_space": (around(text(b" \n\t ")), 5, {}, {}),
    "text_html": (around(text(b"<p>two\nlines</p>")), 5, {}, {}),
    "key_again": (lambda: tar([*good(), bad(), (good()[0][0], bad()[1])]), 6, {}, {"duplicate_key": 1}),
    "key_dots": (around(("photo.v1.2", bad()[1])), 5, {}, {}),
    "key_jpeg": (around((BAD, {"JPEG": bad()[1]["jpg"], "txt": b"x"})), 5, {}, {}),
    "key_unicode": (around(("ein Bild 東京", bad()[1])), 5, {}, {}),
    "tar_long_name": (around(("d/" * 120 + BAD, bad()[1])), 5, {}, {}),
    "tar_long_name_gnu": (lambda: tar([*good(), ("x" * 150, bad()[1])], tarfile.GNU_FORMAT), 5, {}, {}),
    "tar_dotdot": (around(("../../evil", bad()[1])), 5, {}, {}),
    "tar_absolute": (around(("/tmp/evil", bad()[1])), 5, {}, {}),
    "tar_symlink": (lambda: with_member(tarfile.SYMTYPE), 4, {"missing_image": 1}, {"link_outside": 1}),
    "tar_device": (lambda: with_member(tarfile.CHRTYPE), 4, {"missing_image": 1}, {}),
    "tar_broken_header": (broken_header, 4, {"corrupt_shard": 1, "missing_image": 1}, {}),
    "tar_cut_inside_member": (cut_inside_member, 3, {"truncated_shard": 1}, {}),
    "tar_zero_tail": (zero_tail, 4, {"truncated_shard": 1}, {}),
    "tar_zero_hole": (zero_hole, 5, {"corrupt_shard": 1}, {}),
    "tar_pax_size_superscript": (lambda: pax_size("²"), 5, {}, {}),
    "tar_pax_size_huge": (lambda: pax_size("9" * 5000), 5, {}, {}),
    "tar_no_end": (without_end, 5, {}, {"missing_end_blocks": 1}),
    "tar_concatenated": (concatenated, 5, {}, {}),
    "tar_gzip": (lambda: gzip.compress(tar([*good(), bad()])), 5, {}, {}),
    "tar_gzip_cut": (lambda: gzip.compress(tar([*good(), bad()]))[:-2000], 4, {"truncated_shard": 1}, {}),
    "tar_gzip_wrong_checksum": (gzip_of_wrong_checksum, 5, {"corrupt_shard": 1}, {}),
    "tar_gzip_wrong_block": (gzip_of_wrong_block, 3, {"truncated_shard": 1}, {}),
    "tar_zero_bytes": (lambda: b"", 0, {"empty_shard": 1}, {}),
    "tar_without_samples": (lambda: archive([("README", b"x")]), 0, {"empty_shard": 1}, {}),
    "tar_only_end": (lambda: bytes(10240), 0, {"empty_shard": 1}, {}),
    "tar_error_page": (lambda: b'<?xml version="1.0"?><Error>AccessDenied</Error>', 0, {"corrupt_shard": 1}, {}),
    "tar_noise": (lambda: bytes(range(1, 256)) * 200, 0, {"corrupt_shard": 1}, {}),
}
