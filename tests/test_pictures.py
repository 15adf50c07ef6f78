"""What is stored of each kind of picture: the table of marjax/data/pictures.py, line by line."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from marjax.data.pictures import UnreadableError, storable

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)
GREY = RGB[..., 0]
HOLES = np.where(RNG.random((12, 17)) < 0.5, 0, 255).astype(np.uint8)  # an alpha channel
BITS = GREY > 128
DEEP = RNG.integers(0, 65536, (12, 17), dtype=np.uint16)
PALETTE = Image.fromarray(RGB).quantize(16)


def exif(orientation):
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def as_file(image, kind, **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data):
    with Image.open(io.BytesIO(data)) as image:
        assert image.format in ("JPEG", "MPO", "PNG") and image.mode in ("L", "RGB")
        return np.asarray(image)


def over_white(pixels, alpha):
    return np.where(alpha[..., None] if pixels.ndim == 3 else alpha, pixels, 255)


@pytest.mark.parametrize("data", [
    as_file(RGB, "JPEG"), as_file(GREY, "JPEG"), as_file(RGB, "PNG"), as_file(GREY, "PNG"),
    as_file(RGB, "JPEG", exif=exif(1)), as_file(RGB, "MPO", save_all=True, append_images=[Image.fromarray(RGB)]),
])
def test_what_all_readers_read_is_passed_through(data):
    stored, kind = storable(data)
    assert stored == data and kind in ("JPEG", "PNG")
    assert decoded(stored).shape[:2] == (12, 17)


PALETTE_RGB = np.asarray(PALETTE.convert("RGB"))
CMYK = as_file(Image.fromarray(RGB).convert("CMYK"), "JPEG")
ALL_KINDS = {
    "rotated": (as_file(RGB, "PNG", exif=exif(6)), np.rot90(RGB, -1)),
    "rotated ": (as_file(RGB, "PNG", exif=exif(2)), RGB[:, ::-1]),
    "1-bit": (as_file(Image.fromarray(BITS), "PNG"), BITS * np.uint8(255)),
    "16-bit": (as_file(DEEP, "PNG"), (DEEP >> 8).astype(np.uint8)),
    "palette": (as_file(PALETTE, "PNG"), PALETTE_RGB),
    "palette, transparency": (as_file(PALETTE, "PNG", transparency=3),
                              over_white(PALETTE_RGB, np.asarray(PALETTE) != 3)),
    "transparency": (as_file(np.dstack([RGB, HOLES]), "PNG"), over_white(RGB, HOLES)),
    "transparency ": (as_file(np.dstack([GREY, HOLES]), "PNG"), over_white(GREY, HOLES)),
    "transparency  ": (as_file(GREY, "PNG", transparency=int(GREY[3, 4])), over_white(GREY, GREY[3, 4] != GREY)),
    "CMYK": (CMYK, np.asarray(Image.open(io.BytesIO(CMYK)).convert("RGB"))),
    "BMP": (as_file(RGB, "BMP"), RGB),
    "GIF, palette": (as_file(PALETTE, "GIF"), PALETTE_RGB),
    "GIF, first frame, palette": (as_file(PALETTE, "GIF", save_all=True,
                                          append_images=[PALETTE.transpose(Image.Transpose.ROTATE_180)]), PALETTE_RGB),
    "TIFF": (as_file(RGB, "TIFF"), RGB),
    "TIFF, rotated": (as_file(RGB, "TIFF", exif=exif(8)), np.rot90(RGB)),
    "TIFF, 16-bit": (as_file(DEEP, "TIFF"), (DEEP >> 8).astype(np.uint8)),
    "PPM": (as_file(RGB, "PPM"), RGB),
}
if features.check("webp"):
    ALL_KINDS["WEBP"] = (as_file(RGB, "WEBP", lossless=True), RGB)
    ALL_KINDS["WEBP, transparency"] = (as_file(np.dstack([RGB, HOLES]), "WEBP", lossless=True, exact=True),
                                       over_white(RGB, HOLES))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_rest_becomes_png(kind):
    data, expected = ALL_KINDS[kind]
    stored, told = storable(data)
    assert told == kind.rstrip() and stored[:4] == b"\x89PNG"
    np.testing.assert_array_equal(decoded(stored), expected)
    assert storable(stored) == (stored, "PNG")


def test_sixteen_bits_in_colour_and_no_leftovers():
    # A PNG file of one pixel with 16 bits a channel, which Pillow can read but not write.
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0\x12\x34\x56\x78\x9a\xbc")), (b"IEND", b"")]
    deep = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks)
    stored, kind = storable(deep)
    assert kind == "16-bit" and decoded(stored).tolist() == [[[0x12, 0x56, 0x9A]]]
    stored, _ = storable(as_file(Image.fromarray(RGB).convert("CMYK"), "JPEG", icc_profile=b"of another ink"))
    assert b"iCCP" not in stored


def test_sixteen_bits_of_grey_with_a_transparent_value():
    deep = np.array([[0x1234, 0xABCD], [7, 0x1234]], np.uint16)
    data = as_file(Image.fromarray(deep), "PNG", transparency=0x1234)
    assert Image.open(io.BytesIO(data)).info["transparency"] == 0x1234
    stored, kind = storable(data)
    assert kind == "16-bit, transparency" and decoded(stored).tolist() == [[255, 0xAB], [0, 255]]


def test_orientation_may_be_ignored():
    data = as_file(RGB, "JPEG", exif=exif(6))
    assert storable(data, upright=False) == (data, "JPEG")
    turned, kind = storable(data)
    assert kind == "rotated"
    np.testing.assert_array_equal(decoded(turned), np.rot90(decoded(data), -1))


@pytest.mark.parametrize("data, says", [
    (b"", "the file is empty"),
    (b"hello, I am a text\n" * 9, "no image file that Pillow can read"),
    (as_file(RGB, "JPEG")[:-60], "OSError"),
    (as_file(RGB, "PNG")[:200], "OSError: Truncated File Read"),
    (as_file(RGB, "PNG")[:60] + b"x" + as_file(RGB, "PNG")[61:], "broken PNG file"),
    (as_file(np.zeros((3, 4), np.float32), "TIFF"), "mode F, whose range is not known"),
    (as_file(np.zeros((3, 4), np.int32), "TIFF"), "mode I, whose range is not known"),
    (as_file(Image.new("1", (20_000, 20_000)), "PNG"), "too many pixels"),
])
def test_unreadable(data, says):
    with pytest.raises(UnreadableError) as caught:
        storable(data)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_quick_check_finds_every_truncation():
    rough = np.asarray(Image.fromarray(RGB).resize((160, 120)))
    for whole in (as_file(rough, "JPEG"), as_file(rough, "JPEG", progressive=True), as_file(rough, "PNG")):
        found = 0
        for size in range(1, len(whole), max(1, len(whole) // 40)):
            try:
                decoded(whole[:size])
            except Exception:
                found += 1
                with pytest.raises(UnreadableError):
                    storable(whole[:size])
        assert found > 30
