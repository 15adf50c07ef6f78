"""Reads the chunks of a PNG file before Pillow does.

Pillow refuses texts and profiles that decompress to more than 1 MiB or in an unknown way, and lets texts with names
such as "transparency" override what the file says about its pixels. They do not affect the pixels, so they are removed,
except those that may hold the orientation.
"""

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_MAX_TEXT = 1 << 20  # bytes, decompressed; the limit of Pillow
_MAX_TEXTS = 16 << 20  # of all
_MAX_CHUNKS = 200_000


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of body of every complete chunk; none if this is not a PNG file.

    Raises:
      ValueError: there are more chunks than in any picture.
    """
    position, count = len(SIGNATURE), 0
    while data.startswith(SIGNATURE) and position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data):
            return
        yield kind, position + 8, position + 8 + length
        position, count = position + 12 + length, count + 1
        if kind == b"IEND":
            return
        if count > _MAX_CHUNKS:
            raise ValueError(f"a PNG file of more than {_MAX_CHUNKS} chunks")


def without_texts(data: bytes) -> tuple[bytes, bool]:
    """Removes texts and profiles from a PNG file; returns the same object if there is nothing to remove.

    Returns:
      The file; and whether other programs can be expected to read the given file.
    """
    parts, kept, start, total, harmless = [], 0, 0, 0, True
    for kind, first, last in chunks(data):
        if kind not in _TEXTS:
            continue
        body = data[first:last]
        size = _unpacked_size(kind, body)
        total += last - first if size is None else size
        sound = (
            size is not None
            and size <= _MAX_TEXT
            and total <= _MAX_TEXTS
            and (zlib.crc32(kind + body) == struct.unpack_from(">I", data, last)[0])
        )
        harmless = harmless and sound and not body.startswith(_PIXEL_NAMES)
        if sound and kind != b"iCCP" and body.startswith(_ORIENTED):
            kept += 1
        else:
            parts.append(data[start : first - 8])
            start = last + 4
    return (b"".join([*parts, data[start:]]) if parts else data), harmless


# Texts of these names override what Pillow knows about the pixels.
_NAMES = b"transparency bbox interlace default_image blend disposal icc_profile exif dpi gamma"
_PIXEL_NAMES = tuple(name + b"\0" for name in _NAMES.split())


def _unpacked_size(kind: bytes, body: bytes) -> int | None:
    """Bytes of a text or profile, counted up to _MAX_TEXT + 1; None if its compression is unknown."""
    rest = body.partition(b"\0")[2]
    if kind == b"tEXt":
        return len(rest)
    if kind == b"iTXt":
        if rest[:1] in (b"", b"\0"):
            return len(rest)
        rest = rest[1:2] + rest[2:].split(b"\0", 2)[-1]
    if rest[:1] != b"\0":
        return None
    unpacker = zlib.decompressobj()
    try:
        return len(unpacker.decompress(rest[1:], _MAX_TEXT)) + len(unpacker.unconsumed_tail[:1])
    except zlib.error:
        return None


def significant_bits(data: bytes) -> int | None:
    """The largest number of significant bits per channel (sBIT); None if the file does not have it."""
    for kind, first, last in chunks(data):
        if kind == b"sBIT":
            return max(data[first:last], default=None)
        if kind == b"IDAT":
            break
    return None


def channel_bits(data: bytes) -> int | None:
    """Bits per channel; None if this is not a PNG file."""
    return data[24] if data.startswith(SIGNATURE) and len(data) > 24 else None
