"""Decoding: from the bytes of a sample to 8-bit RGB pixels, by the same rules for teacher and student.

    format          JPEG, PNG, WebP, GIF and BMP, detected by content, whatever the file name; anything else is bad
    undecodable     bad; found by its header when the source is indexed, else when it is first decoded
    truncated       bad, never half grey: when indexing, an image without its end marker is decoded to decide, and
                    decoding is refused while Pillow's global LOAD_TRUNCATED_IMAGES is set
    bomb-sized      bad: more than 89,478,485 pixels (Pillow's default MAX_IMAGE_PIXELS, whatever it is set to) or
                    more than 256 MiB encoded; found without decoding
    gray, 1 bit     the value repeated in R, G and B
    16 bits         the high byte of each value (Pillow alone would clip gray at 255)
    CMYK, YCCK      Pillow's conversion to RGB; colour profiles of any image are ignored
    palette         the colours of the palette
    alpha           dropped, as torchvision's loader does: the colour stored under it is used
    EXIF rotation   JPEG and WebP are turned upright, and sizes are those of the upright image; an invalid
                    orientation tag counts as upright; in the other formats it is ignored
    animated        the first frame
    arrays          uint8 [height, width, 3], or [height, width] and [height, width, 1] as gray; used as they are

A bad image raises `BadImage` with its name; `index_source(on_bad_image=...)` fails, or excludes it.

Pillow decodes, not torchvision.io: both wrap libjpeg-turbo and give identical pixels at about the same speed, but only
Pillow has an allow-list of formats, a guard against bombs, and handles every case above; and torchvision 0.29
deprecates its decoders.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from redistill_cache.errors import Refused
from redistill_cache.wording import one_line

if TYPE_CHECKING:
    import torch

__all__ = ["EXTENSIONS", "MAX_ENCODED_BYTES", "MAX_PIXELS", "BadImage", "as_pixels", "decode_image", "image_size"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_PIXELS = 89_478_485
MAX_ENCODED_BYTES = 256 << 20

# What Pillow's parsers raise on bytes that are not an image.
PILLOW_RAISES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# EXIF orientation -> the operation that turns the stored image upright; 5 to 8 swap width and height.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Refused):
    """One image that cannot be used, by name."""

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        if not self.reason:  # rebuilt by a DataLoader from a worker's traceback, which ends with the original message
            return self.name.rstrip().rpartition(f"{type(self).__name__}: ")[2]
        return f"image {self.name!r} cannot be used: {self.reason}; fix or remove it, or exclude bad images"


def decode_image(payload: bytes | np.ndarray, *, name: str) -> torch.Tensor:
    """The pixels of a sample as a uint8 tensor [3, height, width], by the rules above.

    The tensor owns its memory, in channels-last order: torchvision's resize is faster on that than on separate
    planes.
    """
    import torch  # here, so that indexing workers never load it

    return torch.from_numpy(decode_array(payload, name=name)).permute(2, 0, 1)


def decode_array(payload: bytes | np.ndarray, *, name: str) -> np.ndarray:
    """The pixels of a sample as a new uint8 array [height, width, 3]."""
    if isinstance(payload, np.ndarray):
        pixels_HWC = as_pixels(payload, name=name)
        return np.array(np.broadcast_to(pixels_HWC, (*pixels_HWC.shape[:2], 3)))
    image = _open(payload, name)
    try:
        image.load()
        image.info.pop("transparency", None)  # it would be blended in, or warned about
        if image.mode.startswith("I"):
            gray_HW = (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
            return np.repeat(gray_HW[:, :, None], 3, axis=2)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        turn = UPRIGHT.get(_orientation(image))
        return np.array(rgb if turn is None else rgb.transpose(turn))
    except PILLOW_RAISES as error:
        raise BadImage(name, _reason(error)) from error


def image_size(payload: bytes | np.ndarray, *, name: str) -> tuple[int, int]:
    """Height and width of the upright image, from its header; an image without its end marker is decoded."""
    if isinstance(payload, np.ndarray):
        height, width = as_pixels(payload, name=name).shape[:2]
        return height, width
    image = _open(payload, name)
    width, height = image.size
    if not _has_end_marker(payload, image.format):
        decode_array(payload, name=name)
    return (width, height) if _orientation(image) >= 5 else (height, width)


def as_pixels(array: np.ndarray, *, name: str) -> np.ndarray:
    """An array sample in its canonical shape: uint8 [height, width, 1 or 3]."""
    pixels_HWC = array[:, :, None] if array.ndim == 2 else array
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] not in (1, 3):
        actual = f"{array.dtype} {list(array.shape)}"
        raise BadImage(name, f"expected an array sample to be uint8 [height, width, 3], found {actual}")
    if not 0 < pixels_HWC.shape[0] * pixels_HWC.shape[1] <= MAX_PIXELS:
        raise BadImage(name, f"expected 1 to {MAX_PIXELS} pixels, found {pixels_HWC.shape[1]} x {pixels_HWC.shape[0]}")
    return pixels_HWC


def _open(payload: bytes, name: str) -> Image.Image:
    """Open an image and check its format and size; no pixel is decoded."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise Refused(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this process, so truncated images would not be detected; "
            "set it to False and exclude bad images instead"
        )
    if not payload:
        raise BadImage(name, "the file is empty")
    if len(payload) > MAX_ENCODED_BYTES:
        raise BadImage(name, f"{len(payload)} bytes encoded, more than the limit of {MAX_ENCODED_BYTES}")
    try:
        image = Image.open(io.BytesIO(payload), formats=FORMATS)
    except PILLOW_RAISES as error:
        raise BadImage(name, _reason(error)) from error
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise BadImage(name, f"expected 1 to {MAX_PIXELS} pixels, found {width} x {height}")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in any of the formats {', '.join(FORMATS)}"
    return one_line(error)


def _has_end_marker(payload: bytes, kind: str | None) -> bool:
    """Whether the last bytes are those that end the format; a truncated file has them by rare chance only."""
    if kind in ("JPEG", "MPO"):
        return payload.endswith(b"\xff\xd9")
    if kind == "PNG":
        return payload.endswith(b"IEND\xaeB`\x82")
    if kind == "WEBP":
        return len(payload) >= 8 + int.from_bytes(payload[4:8], "little")
    return False  # GIF and BMP are small and rare, so they are always decoded


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. Not Pillow's reader, which loads a whole PNG and warns about invalid tags."""
    exif = image.info.get("exif", b"")
    if image.format not in ("JPEG", "MPO", "WEBP") or not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for i in range(min(count, 512)):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * i)
            if tag == 0x0112:
                return value if kind == 3 and number == 1 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
