"""What of a picture file goes into a data set: its own bytes where every reader agrees about them, else a PNG.

Readers are marjax (`sources.py`) and plain `tfds.data_source`, which takes the indices of a palette for pixels, knows
no orientation and wants one or three channels of eight bits. The rules, in the order in which they are applied:

| picture | stored as |
|---|---|
| JPEG or PNG, grey or RGB, 8 bits a channel, upright | the file's own bytes |
| JPEG with further pictures inside (MPO, of phones and cameras) | the file's own bytes; readers see the first picture |
| BMP, GIF, TIFF, WebP, AVIF, JPEG 2000, PPM and PGM | PNG of the same pixels |
| animated (GIF, WebP, PNG) or with several pages (TIFF) | PNG of the first frame |
| EXIF orientation other than upright | PNG, turned upright; with `upright=False` the orientation is ignored |
| 1 bit | 8-bit grey PNG, 0 and 255 |
| 16 bits a channel | 8-bit PNG of the high bytes |
| palette | RGB PNG |
| alpha, or a transparent colour | PNG, laid over white |
| CMYK, YCbCr, HSV | RGB PNG, as Pillow converts it |
| 32-bit integers, floating point, L*a*b* | none: unreadable, since their range or meaning is not known |

Colour profiles are ignored throughout, as the reference ignores them.
"""

import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What Pillow may try. Left out are formats that run other programs (EPS), hold drawings, or have no signature (TGA).
_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
_PASSED = {"JPEG": "JPEG", "MPO": "JPEG", "PNG": "PNG"}
_ORIENTATION = 0x0112  # the EXIF tag

# A file of such a name is taken for a picture: stored, or unreadable. Of the last row Pillow knows none or only some;
# leaving a phone's HEIC pictures out without a word would be worse than stopping at the first.
SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".ppm",
    ".pgm", ".pbm", ".pnm",
    ".avif", ".avifs", ".jp2", ".j2k", ".jpx", ".heic", ".heif", ".hif", ".jxl",
})


class UnreadableError(ValueError):
    """A file that holds no picture which can be stored; says why."""


def storable(data: bytes, upright: bool = True) -> tuple[bytes, str]:
    """What is stored of a picture file, after decoding all of it.

    Args:
      data: the file's bytes.
      upright: whether to turn the picture as its EXIF orientation says.

    Returns:
      The bytes of a JPEG or PNG file of mode L or RGB with 8 bits a channel; and its kind, "JPEG" or "PNG" for the
      file's own bytes, otherwise what made another file necessary, such as "WEBP" or "palette, transparency".

    Raises:
      UnreadableError: nothing can be stored.
    """
    if not data:
        raise UnreadableError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large or odd files that can be read all the same
            return _storable(data, upright)
    except UnreadableError:
        raise
    except UnidentifiedImageError:
        raise UnreadableError("no image file that Pillow can read here") from None
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"too many pixels: {error}") from None
    except Exception as error:  # broken files make Pillow raise almost anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UnreadableError(f"{type(error).__name__}: {reason}" if reason else type(error).__name__) from None


def _storable(data: bytes, upright: bool) -> tuple[bytes, str]:
    Image.init()
    with Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
        kind, mode = image.format or "", image.mode
        if kind == "PNG":
            # Decoding does not look at the checksums of the pixels. Other readers do, and refuse the file.
            with Image.open(io.BytesIO(data), formats=["PNG"]) as checked:
                checked.verify()
        why = [] if kind in _PASSED else [kind]
        # The second picture of an MPO is not an animation's: a depth map, or the other eye's.
        if getattr(image, "n_frames", 1) > 1 and kind != "MPO":
            why.append("first frame")
        if upright and _orientation(image) not in (0, 1):
            why.append("rotated")
        if mode in ("I;16", "I;16B", "I;16L", "I;16N", "I") or _has_deep_channels(data):
            why.append("16-bit")
        elif mode in ("1", "P", "PA"):
            why.append("1-bit" if mode == "1" else "palette")
        elif mode not in ("L", "LA", "La", "RGB", "RGBA", "RGBa"):
            why.append(mode)
        transparent = "transparency" in image.info or mode in ("LA", "La", "PA", "RGBA", "RGBa")
        if transparent:
            why.append("transparency")
        if not why:
            # Decoding to an eighth of the size reads every byte, so it finds what is missing, with less to compute.
            image.draft(None, (1, 1))
            image.load()
            return data, _PASSED[kind]
        turned = ImageOps.exif_transpose(image) if upright else image.copy()
    return _as_png(_plain(turned, kind, transparent)), ", ".join(why)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing, and does not spoil the pixels
        return 1


def _has_deep_channels(data: bytes) -> bool:
    """Whether this is a PNG file of 16 bits a channel, which Pillow does not tell for more than one channel."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 24 and struct.unpack_from("B", data, 24)[0] == 16


def _plain(image: Image.Image, kind: str, transparent: bool) -> Image.Image:
    """The same picture in mode L or RGB."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and kind == "PNG"):  # older Pillows open 16-bit PNG files as "I"
        deep = np.asarray(image).astype(np.uint32)
        pixels = (deep >> 8).astype(np.uint8)
        if isinstance(through := image.info.get("transparency"), int):  # the value that stands for nothing
            pixels[deep == through] = 255
        return Image.fromarray(pixels)
    if mode in ("I", "F", "LAB"):
        raise UnreadableError(f"pixels of mode {mode}, whose range is not known: convert the file to 8 bits a channel")
    grey = mode in ("1", "L", "LA", "La")
    if transparent:
        # Premultiplied modes have no way to RGBA but through their own plain form.
        layer = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("L" if grey else "RGB")


def _as_png(image: Image.Image) -> bytes:
    image.info.clear()  # a profile or a transparent colour of the old file does not belong to the new pixels
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
