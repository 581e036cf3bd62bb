"""What libjpeg does not check: how many scans a JPEG has, and whether all of its data is there.

libjpeg decodes each scan over the whole image, so a small file of thousands of empty scans takes minutes. It also
decodes a file that was cut and given an end marker: what is missing becomes gray, or less sharp in a progressive JPEG.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["MAX_SCANS", "Scans", "read_scans", "with_more_data"]

# Encoders write one scan, or about ten for a progressive JPEG.
MAX_SCANS = 64
SOS, EOI = 0xDA, 0xD9
PROGRESSIVE, SEQUENTIAL = (0xC2, 0xCA), (0xC0, 0xC1, 0xC3, 0xC9)
# The markers outside of the coded data, in which 0xFF is followed by 0 or is a restart marker.
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
NO_BODY = (0xD8, 0x01)
# Coded data of no meaning, without 0xFF; and the same after each restart marker, for where one is missing.
NOISE = bytes(i * 97 % 255 for i in range(1020))
FILLER = NOISE + b"".join(bytes([0xFF, 0xD0 + i]) + NOISE for i in range(8))


class Scans(NamedTuple):
    """The scans of a JPEG, and whether they hold every bit of every coefficient."""

    number: int
    complete: bool


def read_scans(jpeg: bytes) -> Scans:
    """The scans up to the first that is too many. Of a JPEG that can have one only, no more than its head is read."""
    missing: dict[int, list[bool]] = {}  # by component, whether bits of each of the 64 coefficients are missing
    scans, progressive = 0, False
    for kind, _, body in _segments(jpeg):
        if kind in PROGRESSIVE + SEQUENTIAL and len(body) >= 6:
            progressive = kind in PROGRESSIVE
            missing = {component: [True] * 64 for component in body[6::3][: body[5]]}
        if kind != SOS or not body:
            continue
        scans += 1
        components = body[1 : 1 + 2 * body[0] : 2]
        if scans > MAX_SCANS or (not progressive and set(components) >= set(missing)):
            return Scans(scans, complete=True)
        first, last, bits = body[1 + 2 * body[0] :][:3].ljust(3, b"\0") if progressive else (0, 63, 0)
        for component in components:
            coefficients = missing.get(component, [])
            coefficients[first : last + 1] = [bits & 15 > 0] * len(coefficients[first : last + 1])
    return Scans(scans, not any(map(any, missing.values())))


def with_more_data(jpeg: bytes) -> bytes:
    """The JPEG with coded data added at its end: it decodes to the same pixels only if none of its own was missing."""
    end = next((at for kind, at, _ in _segments(jpeg) if kind == EOI), len(jpeg))
    return jpeg[:end] + FILLER + jpeg[end:]


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Marker, position and body of each segment, up to the end of the image."""
    at = 2
    while (match := MARKER.search(jpeg, at)) is not None:
        kind, at = jpeg[match.start() + 1], match.end()
        if kind in NO_BODY:
            continue
        length = 0 if kind == EOI else int.from_bytes(jpeg[at : at + 2], "big")
        yield kind, match.start(), jpeg[at + 2 : at + length]
        if kind == EOI:
            return
        at += length
