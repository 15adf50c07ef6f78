"""The chunks of a PNG file, read before Pillow reads the file.

Pillow refuses texts and profiles that grow over 1 MiB when they are unpacked, or are packed in a way it does not know,
and lets texts with names such as "transparency" stand for what the file says of its pixels. None of them says anything
about the pixels, so they are cut out; only where programs keep the orientation are they left.
"""

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_MAX_TEXT = 1 << 20  # bytes, unpacked: what Pillow takes
_MAX_TEXTS = 16 << 20  # of all
_MAX_CHUNKS = 200_000


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of every chunk that is there as a whole, with where its body begins and ends; none in another file.

    Raises:
      ValueError: there are more than any picture has.
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
    """A file without texts and profiles, the same object if it has none or is no PNG file.

    Returns:
      The file; and whether every program that reads pictures can be expected to read the one that was given.
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


# Texts of these names take the place of what Pillow keeps of the pixels.
_PIXEL_NAMES = tuple(
    name + b"\0"
    for name in (
        b"transparency",
        b"bbox",
        b"interlace",
        b"default_image",
        b"blend",
        b"disposal",
        b"icc_profile",
        b"exif",
        b"dpi",
        b"gamma",
    )
)


def _unpacked_size(kind: bytes, body: bytes) -> int | None:
    """Bytes of a text or profile, more than _MAX_TEXT if there are more; None if it is packed in no known way."""
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
    """The most bits of a channel that the file says are significant (sBIT), None if it does not."""
    for kind, first, last in chunks(data):
        if kind == b"sBIT":
            return max(data[first:last], default=None)
        if kind == b"IDAT":
            break
    return None


def channel_bits(data: bytes) -> int | None:
    """Bits of a channel, None if this is no PNG file."""
    return data[24] if data.startswith(SIGNATURE) and len(data) > 24 else None
