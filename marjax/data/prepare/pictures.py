"""How a picture file is stored in a data set: unchanged if every reader decodes it alike, else as a PNG.

Readers are marjax (`sources.py`) and plain `tfds.data_source`, which takes the indices of a palette for pixels, ignores
the orientation and expects one or three channels of eight bits. The rules, in the order in which they apply:

| picture | stored as |
|---|---|
| JPEG or PNG, grey or RGB, 8 bits per channel, upright | unchanged |
| JPEG with more pictures inside (MPO, of phones and cameras) | unchanged; readers see the first picture |
| BMP, GIF, TIFF, WebP, AVIF, JPEG 2000, PPM and PGM | PNG of the same pixels |
| animated (GIF, WebP, PNG) or with several pages (TIFF) | PNG of the first frame |
| EXIF orientation other than upright | PNG, turned upright; with `upright=False` the orientation is ignored |
| 1 bit | 8-bit grey PNG, 0 and 255 |
| 16 bits per channel | 8-bit PNG of the upper bits in use, see `deep.py` |
| palette | RGB PNG |
| alpha, or a transparent colour | PNG, over white; if fully transparent, its colours unless they are all the same |
| PNG with texts or profiles that are damaged or over 1 MiB | the file without them |
| CMYK, YCbCr, HSV | RGB PNG, as Pillow converts it |
| 32-bit integers, floating point, L*a*b* | not stored: unreadable, since their range or meaning is unknown |
| over MAX_PIXELS, MAX_PIXELS_OTHERS, MAX_BYTES or MAX_SCANS | not stored: unreadable, detected before decoding |

Colour profiles are ignored throughout, as the reference ignores them.
"""

import io
import os
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from marjax.data.prepare import deep, jpeg, png
from marjax.data.records import reached_limit
from marjax.errors import first_line
from marjax.files import open_regular

# Decoding takes up to 14 bytes per pixel of JPEG and PNG, 20 of other formats: less than 1.5 GiB.
MAX_PIXELS = 112 << 20  # of a JPEG or PNG file of 8 bits per channel; phones make 108 million
MAX_PIXELS_OTHERS = 1 << 26  # 8192 x 8192
MAX_BYTES = 1 << 29  # of a picture's file

# Without formats that run other programs (EPS), hold drawings, or have no signature (TGA).
_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
_PASSED = {"JPEG": "JPEG", "MPO": "JPEG", "PNG": "PNG"}
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Files with these suffixes are pictures: stored, or unreadable. Pillow may not read the last ones, but ignoring the
# HEIC pictures of a phone silently would be worse than stopping at the first.
_SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .gif .tif .tiff .webp .ppm .pgm .pbm .pnm "
    ".avif .avifs .jp2 .j2k .jpx .heic .heif .hif .jxl"
)
SUFFIXES = frozenset(_SUFFIXES.split())


class UnreadableError(ValueError):
    """The picture cannot be stored; says why."""


# Parts of a kind (see `storable`) that suggest a mistake, with a warning.
DOUBTS = {
    "by its values": "assumed to use 8, 10 or 12 of 16 bits, by their largest values: start with --overwrite "
    "--bits 16 if they are only dark",
    "fully transparent": "fully transparent: remove them if they show nothing",
}


def doubts(kind: str) -> list[str]:
    """The keys of DOUBTS that apply to a kind."""
    return [part for part in DOUBTS if part in kind]


def storable(data: bytes, upright: bool = True, bits: int | None = None) -> tuple[bytes, str]:
    """The file to store for a picture file, which is fully decoded.

    Args:
      data: the file's bytes.
      upright: whether to apply the EXIF orientation.
      bits: how many bits are used of 16 bits per channel; see `deep.py` for None.

    Returns:
      The bytes of a JPEG or PNG file of mode L or RGB with 8 bits per channel; and its kind, "JPEG" or "PNG" if it is
      unchanged, otherwise why it was converted, such as "WEBP" or "palette, transparency".

    Raises:
      UnreadableError: nothing can be stored.
    """
    if not data:
        raise UnreadableError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large or unusual files that can be read
            return _storable(data, upright, bits)
    except UnreadableError:
        raise
    except UnidentifiedImageError:
        raise UnreadableError("not an image file that Pillow can read here") from None
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"too many pixels: {error}") from None
    except MemoryError:
        raise UnreadableError("it needs more memory than there is") from None
    except Exception as error:  # broken files make Pillow raise almost anything
        reason = first_line(error, "")
        raise UnreadableError(f"{type(error).__name__}: {reason}" if reason else type(error).__name__) from None


def decode(encoded: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of an image file: (H, W, 1) if it is grey, else (H, W, 3).

    As in the reference, alpha is dropped and the EXIF orientation ignored; 16 bits become 8 as in `storable`.

    Raises:
      ValueError, OSError and others: it cannot be read.
    """
    data, _ = png.without_texts(encoded)
    try:
        opened = _opened(data)
    except UnidentifiedImageError:
        raise ValueError(f"{len(encoded)} bytes that Pillow cannot identify as an image") from None
    with opened as image:
        pixels: Image.Image = deep.eight_bits(image, data)[0] if deep.is_deep(image, data) else image
        to = "L" if pixels.mode in ("1", "L", "LA") else "RGB"
        array = np.asarray(pixels if pixels.mode == to else pixels.convert(to))
        return array[..., None] if to == "L" else array


def read_bytes(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a picture: a file, or `size` bytes of one from `offset` on.

    Raises:
      UnreadableError: it cannot be read.
      OSError: too many files are open.
    """
    try:
        with open_regular(path) as file:
            if size is None:
                size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise UnreadableError(f"it has {size:,} bytes, over {MAX_BYTES:,}")
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        if reached_limit(error):
            raise
        raise UnreadableError(f"the file cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise UnreadableError("it needs more memory than there is") from None
    if len(data) < size:
        raise UnreadableError(f"the file ends after {len(data)} of {size} bytes")
    return data


def _opened(data: bytes) -> ImageFile.ImageFile:
    """Opens an image of a supported format and size, without decoding it."""
    Image.init()
    image = Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    is_light = image.format in _PASSED and png.channel_bits(data) != 16
    limit = MAX_PIXELS if is_light else MAX_PIXELS_OTHERS
    if image.width * image.height > limit:
        image.close()
        raise UnreadableError(f"too many pixels: {image.width} x {image.height}, over {limit:,}")
    if image.format in ("JPEG", "MPO") and jpeg.has_too_many_scans(data):
        image.close()
        raise UnreadableError(f"a progressive JPEG of more than {jpeg.MAX_SCANS} scans")
    return image


def _storable(given: bytes, upright: bool, bits: int | None) -> tuple[bytes, str]:
    data, is_sound = png.without_texts(given)
    with _opened(data) as image:
        kind, mode = image.format or "", image.mode
        if kind == "PNG":
            # Decoding does not check the checksums of the pixels, but other readers do.
            with Image.open(io.BytesIO(data), formats=["PNG"]) as checked:
                checked.verify()
        is_deep = deep.is_deep(image, data)
        if kind == "PNG":
            image.load()  # otherwise reading its orientation would, and a second load of a damaged file does not fail
        why = [] if kind in _PASSED else [kind]
        # The second picture of an MPO is a depth map or the other eye's view, not a frame. Frames are not counted,
        # since that reads all of them.
        if getattr(image, "is_animated", False) and kind != "MPO":
            why.append("first frame")
        if upright and _orientation(image) not in (0, 1):
            why.append("rotated")
        if is_deep:
            why.append("16-bit")
        elif mode in ("1", "P", "PA"):
            why.append("1-bit" if mode == "1" else "palette")
        elif mode not in ("L", "LA", "La", "RGB", "RGBA", "RGBa"):
            why.append(mode)
        transparent = "transparency" in image.info or mode in ("LA", "La", "PA", "RGBA", "RGBa")
        if transparent:
            why.append("transparency")
        if not why:
            # Decoding to an eighth of the size still reads every byte, so it detects damage at less cost.
            image.draft(None, (1, 1))
            image.load()
            return given if is_sound else data, _PASSED[kind]
        image.load()
        turn = _TURNS.get(_orientation(image)) if upright else None  # loading a TIFF turns it upright
        plain: Image.Image = image
        if is_deep:
            with _opened(data) as again:
                plain, used, guessed = deep.eight_bits(again, data, bits)
            if used != 16:
                why[why.index("16-bit")] = f"{used} of 16 bits" + " by its values" * guessed
        plain = _plain(plain, why)
    return _as_png(plain if turn is None else plain.transpose(turn)), ", ".join(why)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not affect the pixels
        return 1


def _plain(image: Image.Image, why: list[str]) -> Image.Image:
    """The same picture in mode L or RGB."""
    mode = image.mode
    if mode in ("I", "F", "LAB"):
        raise UnreadableError(f"pixels of mode {mode}, whose range is unknown: convert the file to 8 bits per channel")
    to = "L" if mode in ("1", "L", "LA", "La") else "RGB"
    if "transparency" not in image.info and mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert(to)
    shown, is_empty = _flattened(image, to, over_white=True)
    if not is_empty:
        return shown
    why.append("fully transparent")
    del shown
    colours, _ = _flattened(image, to, over_white=False)
    return colours if _varies(colours) else Image.new(to, image.size, "white")


def _varies(image: Image.Image) -> bool:
    """Whether an image of mode L or RGB has more than one colour."""
    extrema: Any = image.getextrema()
    return any(low != high for low, high in ([extrema] if image.mode == "L" else extrema))


def _flattened(image: Image.Image, mode: str, over_white: bool) -> tuple[Image.Image, bool]:
    """The picture without alpha, computed in strips to save memory; and whether it is fully transparent."""
    flat, is_empty = Image.new(mode, image.size), True
    rows = max(1, (1 << 22) // max(1, image.width))
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        # Pillow converts premultiplied modes to RGBA only through their plain form.
        layer = part.convert({"La": "LA", "RGBa": "RGBA"}.get(part.mode, part.mode)).convert("RGBA")
        is_empty = is_empty and layer.getchannel("A").getextrema() == (0, 0)
        if over_white:
            layer = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        flat.paste(layer.convert("RGB").convert(mode), (0, top))
    return flat, is_empty


def _as_png(image: Image.Image) -> bytes:
    image.info.clear()  # profile and transparent colour belong to the old pixels
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
