"""What is stored of each kind of picture: the table of marjax/data/prepare/pictures.py, line by line."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, features
from support.pictures import as_file, decoded, exif

from marjax.data.prepare import png
from marjax.data.prepare.pictures import MAX_BYTES, UnreadableError, decode, read_bytes, storable

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)
GREY = RGB[..., 0]
HOLES = np.where(RNG.random((12, 17)) < 0.5, 0, 255).astype(np.uint8)  # an alpha channel
BITS = GREY > 128
DEEP = RNG.integers(0, 65536, (12, 17), dtype=np.uint16)
PALETTE = Image.fromarray(RGB).quantize(16)


def png_of(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def deep_png(pixels, *chunks):
    """A PNG file of 16 bits a channel, which Pillow can read but not write: pixels (H, W, C)."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png_of((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def with_chunks(data, before=(), after=()):
    """A PNG file with further chunks before and after its pixels."""
    found = [(kind, data[first:last]) for kind, first, last in png.chunks(data)]
    pixels = [kind for kind, _ in found].index(b"IDAT")
    return png_of(*found[:pixels], *before, *found[pixels:-1], *after, found[-1])


def over_white(pixels, alpha):
    return np.where(alpha[..., None] if pixels.ndim == 3 else alpha, pixels, 255)


@pytest.mark.parametrize(
    "data",
    [
        as_file(RGB, "JPEG"),
        as_file(GREY, "JPEG"),
        as_file(RGB, "PNG"),
        as_file(GREY, "PNG"),
        as_file(RGB, "JPEG", exif=exif(1)),
        as_file(RGB, "MPO", save_all=True, append_images=[Image.fromarray(RGB)]),
    ],
)
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
    "palette, transparency": (
        as_file(PALETTE, "PNG", transparency=3),
        over_white(PALETTE_RGB, np.asarray(PALETTE) != 3),
    ),
    "transparency": (as_file(np.dstack([RGB, HOLES]), "PNG"), over_white(RGB, HOLES)),
    "transparency ": (as_file(np.dstack([GREY, HOLES]), "PNG"), over_white(GREY, HOLES)),
    "transparency  ": (as_file(GREY, "PNG", transparency=int(GREY[3, 4])), over_white(GREY, GREY[3, 4] != GREY)),
    "CMYK": (CMYK, np.asarray(Image.open(io.BytesIO(CMYK)).convert("RGB"))),
    "BMP": (as_file(RGB, "BMP"), RGB),
    "GIF, palette": (as_file(PALETTE, "GIF"), PALETTE_RGB),
    "GIF, first frame, palette": (
        as_file(PALETTE, "GIF", save_all=True, append_images=[PALETTE.transpose(Image.Transpose.ROTATE_180)]),
        PALETTE_RGB,
    ),
    "TIFF": (as_file(RGB, "TIFF"), RGB),
    "TIFF, rotated": (as_file(RGB, "TIFF", exif=exif(8)), np.rot90(RGB)),
    "TIFF, 16-bit": (as_file(DEEP, "TIFF"), (DEEP >> 8).astype(np.uint8)),
    "PPM": (as_file(RGB, "PPM"), RGB),
}
if features.check("webp"):
    ALL_KINDS["WEBP"] = (as_file(RGB, "WEBP", lossless=True), RGB)
    ALL_KINDS["WEBP, transparency"] = (
        as_file(np.dstack([RGB, HOLES]), "WEBP", lossless=True, exact=True),
        over_white(RGB, HOLES),
    )


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_rest_becomes_png(kind):
    data, expected = ALL_KINDS[kind]
    stored, told = storable(data)
    assert told == kind.rstrip() and stored[:4] == b"\x89PNG"
    np.testing.assert_array_equal(decoded(stored), expected)
    assert storable(stored) == (stored, "PNG")


def test_sixteen_bits_in_colour_and_no_leftovers():
    stored, kind = storable(deep_png(np.array([[[0x1234, 0x5678, 0x9ABC]]])))
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


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "the file is empty"),
        (b"hello, I am a text\n" * 9, "image file that Pillow"),
        (as_file(RGB, "JPEG")[:-60], "OSError"),
        (as_file(RGB, "PNG")[:200], "OSError: Truncated File Read"),
        (as_file(RGB, "PNG")[:60] + b"x" + as_file(RGB, "PNG")[61:], "broken PNG file"),
        (as_file(np.zeros((3, 4), np.float32), "TIFF"), "mode F"),
        (as_file(np.zeros((3, 4), np.int32), "TIFF"), "mode I"),
        (as_file(Image.new("1", (20_000, 20_000)), "PNG"), "too many pixels"),
    ],
)
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


LONG = b"x" * (2 << 20)
TEXTS = {
    "a long text": [(b"zTXt", b"Comment\0\0" + zlib.compress(LONG))],
    "a long international text": [(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LONG))],
    "a long profile": [(b"iCCP", b"name\0\0" + zlib.compress(LONG))],
    "a text packed in another way": [(b"zTXt", b"Comment\0\7what")],
    "a profile packed in another way": [(b"iCCP", b"name\0\1what")],
    "a profile without a name": [(b"iCCP", b"")],
    "65 MiB of text": [(b"tEXt", b"Comment\0" + LONG)] * 33,
    "a text that stands for a colour": [(b"tEXt", b"transparency\0no")],
    "a text that stands for a box": [(b"tEXt", b"bbox\0no")],
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("texts", TEXTS)
def test_png_files_with_any_text_or_profile_are_read(texts, where):
    own = as_file(RGB, "PNG")
    given = with_chunks(own, **{where: TEXTS[texts]})
    np.testing.assert_array_equal(decode(given), RGB)  # from a data set of others
    stored, kind = storable(given)
    assert (stored, kind) == (own, "PNG")
    np.testing.assert_array_equal(decoded(stored), RGB)  # by Pillow alone
    np.testing.assert_array_equal(decoded(storable(given + b"after the end")[0]), RGB)


def test_damaged_pixels_with_a_right_checksum():
    """What zlib finds, and not the checksum of the chunk."""
    header = struct.pack(">IIBBBBB", 17, 12, 8, 2, 0, 0, 0)
    rows = bytearray(zlib.compress(b"".join(b"\0" + row.tobytes() for row in RGB)))
    rows[40] ^= 255
    for upright in (True, False):
        with pytest.raises(UnreadableError, match="OSError"):
            storable(png_of((b"IHDR", header), (b"IDAT", bytes(rows)), (b"IEND", b"")), upright)


def test_harmless_texts_are_kept():
    small = [
        (b"tEXt", b"Software\0x"),
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"y")),
        (b"iCCP", b"name\0\0" + zlib.compress(b"z" * 3000)),
    ]
    given = with_chunks(as_file(RGB, "PNG"), small, small[:1])
    assert storable(given) == (given, "PNG")
    broken = bytearray(given)
    broken[given.index(b"Software")] ^= 1  # its checksum is wrong now, which other readers refuse
    stored, _ = storable(bytes(broken))
    np.testing.assert_array_equal(decoded(stored), RGB)
    xmp = b'<x tiff:Orientation="6"/>'
    turned = with_chunks(as_file(RGB, "PNG"), [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp), *TEXTS["a long text"]])
    stored, kind = storable(turned)
    assert kind == "rotated"
    np.testing.assert_array_equal(decoded(stored), np.rot90(RGB, -1))


def test_more_chunks_than_a_picture_has():
    with pytest.raises(UnreadableError, match="chunks"):
        storable(with_chunks(as_file(RGB, "PNG"), [(b"tEXt", b"")] * 200_001))


SMALL = RNG.integers(0, 1 << 12, (12, 17, 4), dtype=np.uint16)
SMALL[0, 0] = (1 << 12) - 1
BY_VALUES = " of 16 bits by its values"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_ten_and_twelve_bits_in_sixteen(channels, bits):
    values = SMALL[..., :channels] >> (12 - bits)
    if channels in (2, 4):
        values[..., -1] = 65535  # opaque
    stored, kind = storable(deep_png(values))
    assert kind == f"{bits}{BY_VALUES}" + ", transparency" * (channels in (2, 4))
    expected = (values[..., : 3 if channels > 2 else 1] >> (bits - 8)).astype(np.uint8)
    assert expected.max() == 255
    np.testing.assert_array_equal(decoded(stored).reshape(expected.shape), expected)
    if channels in (1, 3):
        np.testing.assert_array_equal(decode(deep_png(values)), expected)
    as_sixteen, kind = storable(deep_png(values), bits=16)
    assert kind.split(",")[0] == "16-bit"
    np.testing.assert_array_equal(decoded(as_sixteen).reshape(expected.shape), values[..., : expected.shape[2]] >> 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_values_over_the_bits_that_are_given_are_white(channels):
    values = SMALL[..., :channels].copy()
    values[2, 3] = 65535
    stored, kind = storable(deep_png(values), bits=12)
    assert kind == "12 of 16 bits"
    expected = np.minimum(values >> 4, 255)
    np.testing.assert_array_equal(decoded(stored).reshape(expected.shape), expected)


def test_grey_with_alpha_stays_grey():
    values = RNG.integers(0, 1 << 16, (12, 17, 2), dtype=np.uint16)
    values[..., 1] = 65535
    stored, kind = storable(deep_png(values))
    assert kind == "16-bit, transparency"
    np.testing.assert_array_equal(decoded(stored), values[..., 0] >> 8)


def test_what_a_file_says_of_its_bits_goes_before_a_guess():
    dark = SMALL[..., :1] >> 3  # 9 bits
    for said, kind in ((12, "12 of 16 bits"), (14, "14 of 16 bits"), (8, "10" + BY_VALUES), (16, "10" + BY_VALUES)):
        stored, told = storable(deep_png(dark, (b"sBIT", bytes([said]))))
        assert told == kind
        np.testing.assert_array_equal(decoded(stored), dark[..., 0] >> (int(kind[:2]) - 8))
    assert storable(deep_png(dark * 128, (b"sBIT", b"\x0c")))[1] == "16-bit"
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 4095
    stored, told = storable(as_file(dark[..., 0], "TIFF", tiffinfo=tags))
    assert told == "TIFF, 12 of 16 bits"
    np.testing.assert_array_equal(decoded(stored), dark[..., 0] >> 4)
    assert storable(deep_png(dark * 0))[1] == "8 of 16 bits"  # black, whatever it means


def test_a_transparent_colour_is_no_value():
    deep = SMALL[..., :1] >> 2
    deep[3, 4] = 65535
    stored, kind = storable(as_file(deep[..., 0], "PNG", transparency=65535))
    assert kind == f"10{BY_VALUES}, transparency"
    np.testing.assert_array_equal(decoded(stored), np.where(deep[..., 0] == 65535, 255, deep[..., 0] >> 2))
    rgb = SMALL[..., :3].copy()
    rgb[5, 6] = (1, 2, 65535)
    stored, kind = storable(deep_png(rgb, (b"tRNS", struct.pack(">HHH", 1, 2, 65535))))
    assert kind == f"12{BY_VALUES}, transparency"
    expected = (rgb >> 4).astype(np.uint8)
    expected[5, 6] = 255
    np.testing.assert_array_equal(decoded(stored), expected)


def test_fully_transparent_pictures():
    nothing = np.zeros_like(HOLES)
    stored, kind = storable(as_file(np.dstack([RGB, nothing]), "PNG"))
    assert kind == "transparency, fully transparent"
    np.testing.assert_array_equal(decoded(stored), RGB)  # the picture, where its alpha says nothing
    stored, kind = storable(as_file(np.dstack([GREY, nothing]), "PNG"))
    assert kind == "transparency, fully transparent"
    np.testing.assert_array_equal(decoded(stored), GREY)
    stored, kind = storable(as_file(Image.new("RGBA", (5, 4)), "PNG"))
    assert kind == "transparency, fully transparent" and (decoded(stored) == 255).all()
    stored, kind = storable(as_file(Image.new("P", (5, 4)), "PNG", transparency=0))
    assert kind == "palette, transparency, fully transparent" and (decoded(stored) == 255).all()
    tall = np.zeros((2100, 2100, 4), np.uint8)  # in several strips, of which one shows something
    tall[2099, 7] = (1, 2, 3, 255)
    stored, kind = storable(as_file(tall, "PNG", compress_level=1))
    assert kind == "transparency" and decoded(stored)[2099, 7].tolist() == [1, 2, 3]
    assert decoded(stored).sum() == (2100 * 2100 - 1) * 765 + 6


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_pictures_of_too_many_pixels(kind):
    """Of a few KB, and hundreds of MB once they are decoded."""
    options = {"compression": "group4"} if kind == "TIFF" else {}
    size = (13_000, 13_000) if kind in ("PNG", "TIFF") else (60_000, 3_000)
    data = bytearray(as_file(Image.new("1", (8, 8) if kind == "GIF" else size), kind, **options))
    if kind == "GIF":
        struct.pack_into("<HH", data, 6, *size)
    data = bytes(data)
    for read in (storable, decode):
        with pytest.raises((UnreadableError, Image.DecompressionBombError), match=r"too many pixels|exceeds limit"):
            read(data)


def test_jpeg_files_that_are_drawn_again_and_again():
    """Each of a million scans costs as much as a picture."""
    data = as_file(RGB, "JPEG", progressive=True, quality=95)
    scan = data[data.rindex(b"\xff\xda") : -2]
    for read in (storable, decode):
        read(data[:-2] + 80 * scan + data[-2:])
        read(data + 200 * scan)  # further pictures or films, after the end of the picture
        with pytest.raises(UnreadableError, match="scans"):
            read(data[:-2] + 200 * scan + data[-2:])


def test_files_that_are_no_pictures_are_not_read(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"")
    os.truncate(path, 8 << 30)  # no room on the disk
    with pytest.raises(UnreadableError, match="8,589,934,592 bytes"):
        read_bytes(path)
    with pytest.raises(UnreadableError, match="bytes, over"):
        read_bytes(path, 17, MAX_BYTES + 1)
    assert read_bytes(path, 17, 3) == b"\0\0\0"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnreadableError, match="cannot be read"):
        read_bytes(path)
    with pytest.raises(UnreadableError, match="cannot be read"):
        read_bytes("/dev/zero")


def test_pictures_run_no_programs(tmp_path, monkeypatch):
    """PostScript is drawn by Ghostscript, which Pillow starts."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "EPS")
    for read in (decode, storable):
        with pytest.raises(ValueError, match="image"):
            read(file.getvalue())
    assert not (tmp_path / "ran").exists()
