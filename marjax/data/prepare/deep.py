"""Converts pictures of 16 bits per channel to 8 bits.

Cameras and scanners of 10 or 12 bits often leave the upper bits of 16 empty: the high bytes alone would be black. The
number of used bits is, in this order,

1. what the caller gives;
2. what the file gives (PNG: sBIT; TIFF: BitsPerSample, MaxSampleValue), unless a value is larger;
3. the smallest of 8, 10, 12 and 16 that holds every value of the picture: a guess, unless it is 16.
"""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from marjax.data.prepare import png

_GREY = ("I;16", "I;16B", "I;16L", "I;16N")
_GUESSES = (8, 10, 12)
_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 258, 281  # TIFF tags
# The raw mode that reads the low bytes: the same with the opposite byte order.
_OTHER_BYTE = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBA;16N": "RGBA;16B",
    "LA;16B": "RGBA",
}


def is_deep(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether an opened picture has 16 bits per channel; older Pillows open such grey PNG files in mode I."""
    return (
        image.mode in _GREY
        or (image.mode == "I" and image.format in ("PNG", "PPM"))
        or png.channel_bits(data) == 16
        or any(_raw_mode(tile) in _OTHER_BYTE for tile in image.tile)
    )


def eight_bits(image: ImageFile.ImageFile, data: bytes, bits: int | None = None) -> tuple[Image.Image, int, bool]:
    """Converts a picture from 16 to 8 bits per channel.

    Args:
      image: opened but not loaded; it is loaded here.
      data: its file.
      bits: how many of the 16 are used; see the module for None.

    Returns:
      The picture in mode L, LA, RGB or RGBA, with a transparent colour as alpha; the number of used bits; and whether
      that is a guess.
    """
    raw_mode = _raw_mode(image.tile[0]) if image.tile else ""
    said = _claimed(image, data)
    image.load()
    high, low = np.asarray(image), None
    if image.mode in ("RGB", "RGBA"):
        mode = "LA" if raw_mode == "LA;16B" else image.mode
        is_full = bits is None and int(high[..., :3].max(initial=0)) >> (max(said or 0, *_GUESSES) - 8) > 0
        if "transparency" not in image.info and (bits == 16 or is_full):
            return image.convert(mode), 16, False  # the low bytes do not matter
        low = _low_bytes(data, raw_mode)
        if low is None or low.shape != high.shape:
            return image.convert(mode), 16, False
        if raw_mode == "LA;16B":  # grey and alpha, each as its high and its low byte
            high, low = low[..., 0::2], low[..., 1::2]
    else:
        high = high[..., None]
    height, width, channels = high.shape
    num_colours = 1 if channels < 3 else 3
    through = image.info.get("transparency")
    most = 0
    for rows in _strips(height, width):
        deep, shown = _deep(high, low, rows, through)
        most = max(most, int(deep[..., :num_colours][shown].max(initial=0)))
    needed, guessed = most.bit_length(), False
    if bits is None:
        bits = said if said is not None and needed <= said else next((n for n in _GUESSES if needed <= n), 16)
        guessed = bits != said and bits != 16 and most > 0
    has_alpha = channels > num_colours or through is not None
    made = np.empty((height, width, num_colours + has_alpha), np.uint8)
    for rows in _strips(height, width):
        deep, shown = _deep(high, low, rows, through)
        made[rows, :, :num_colours] = np.minimum(deep[..., :num_colours] >> (bits - 8), 255)
        if has_alpha:
            made[rows, :, -1] = deep[..., -1] >> 8 if channels > num_colours else np.where(shown, 255, 0)
    return Image.fromarray(made[..., 0] if made.shape[2] == 1 else made), bits, guessed


def _deep(
    high: npt.NDArray[Any], low: npt.NDArray[Any] | None, rows: slice, through: Any
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """Values of 16 bits, (rows, W, C), and which pixels, (rows, W), do not have the transparent colour."""
    deep = high[rows].astype(np.uint16)
    if low is not None:
        deep = deep << 8 | low[rows]
    if through is None:
        return deep, np.ones(deep.shape[:2], np.bool_)
    return deep, (deep != np.asarray(through, np.uint16)).any(-1)


def _strips(height: int, width: int) -> list[slice]:
    """Rows of a few million pixels at a time."""
    rows = max(1, (1 << 22) // max(1, width))
    return [slice(first, first + rows) for first in range(0, height, rows)]


def _claimed(image: ImageFile.ImageFile, data: bytes) -> int | None:
    """How many bits are used, according to the file."""
    if image.format == "PPM":
        return 16  # Pillow scales the file's maximum to it
    tags: Any = getattr(image, "tag_v2", {})
    most = [int(value) for value in np.atleast_1d(tags.get(_MAX_SAMPLE_VALUE, ())).tolist()]
    bits = [
        png.significant_bits(data),
        *np.atleast_1d(tags.get(_BITS_PER_SAMPLE, ())).tolist(),
        *(value.bit_length() for value in most if value & (value + 1) == 0),
    ]
    return min((int(n) for n in bits if n is not None and 8 <= n < 16), default=None)


def _raw_mode(tile: Any) -> str:
    """The raw mode in which a tile is decoded."""
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _low_bytes(data: bytes, raw_mode: str) -> npt.NDArray[np.uint8] | None:
    """The low bytes of all channels, if Pillow only returns the high bytes; else None."""
    other = _OTHER_BYTE.get(raw_mode)
    if other is None:
        return None
    with Image.open(io.BytesIO(data)) as image:
        image.tile = [
            tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other)
            for tile in image.tile
        ]
        image.load()
        return np.asarray(image)
