"""Counts the scans of a JPEG file: progressive files have about ten, decompression bombs a million."""

import re

MAX_SCANS = 100

_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # not a stuffed zero or a restart, which occur inside pixels
_SOS, _EOI, _LONE = 0xDA, 0xD9, (0x01, 0xD8)


def has_too_many_scans(data: bytes) -> bool:
    """Whether a JPEG file has more than MAX_SCANS scans; each takes as long as decoding a whole picture."""
    if data.count(b"\xff\xda") <= MAX_SCANS:  # quick
        return False
    scans, place = 0, 2
    while (found := _MARKER.search(data, place)) and found[1][0] != _EOI:
        place, kind = found.end(), found[1][0]
        scans += kind == _SOS
        if scans > MAX_SCANS:
            return True
        if kind not in _LONE:
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
    return False
