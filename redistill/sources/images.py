"""Decoding: from the bytes of a sample to 8-bit RGB pixels, by the same rules for teacher and student.

    format          JPEG, PNG, WebP, GIF and BMP, detected by content, whatever the file name; anything else is bad
    undecodable     bad; found by its header when the source is indexed, else when it is first decoded
    truncated       bad, never half grey: when indexing, an image without its end marker, or a JPEG with several scans,
                    is decoded to decide; decoding is refused while Pillow's global LOAD_TRUNCATED_IMAGES is set; a
                    JPEG that was cut and given an end marker is found unless only its last block is missing
    too large       bad, found without decoding: more than 134,217,728 pixels (Pillow holds them in 4 bytes each), or
                    more than 16,777,216 with over 1,000 for each encoded byte, which no photograph has; a larger
                    number of pixels can be allowed by `max_pixels`; sides of more than 65,535, JPEGs of more than 64
                    scans, and more than 256 MiB encoded are always bad
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
Pillow has an allow-list of formats, and handles every case above; and torchvision 0.29 deprecates its decoders.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from redistill_cache.errors import Refused
from redistill_cache.wording import one_line

from redistill.sources.jpeg import MAX_SCANS, read_scans, with_more_data

if TYPE_CHECKING:
    import torch

__all__ = ["EXTENSIONS", "MAX_ENCODED_BYTES", "MAX_PIXELS", "BadImage", "as_pixels", "decode_image", "image_size"]

# Pillow's loaders. Not Image.open, which has a limit of its own, in a global variable that any library may set.
FORMATS = {
    "JPEG": JpegImagePlugin.jpeg_factory,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
JPEG = ("JPEG", "MPO")
STRIP = 256  # rows compared at a time
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_PIXELS = 1 << 27
MAX_SIDE = 65_535  # as in JPEG and GIF
# An image of more pixels must have an encoded byte for each of so many.
FEW_PIXELS, PIXELS_PER_BYTE = 1 << 24, 1000
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
ALLOW = "; to allow it, add '?max_pixels={}' to the images"
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


def decode_image(payload: bytes | np.ndarray, *, name: str, max_pixels: int | None = None) -> torch.Tensor:
    """The pixels of a sample as a uint8 tensor [3, height, width], by the rules above.

    The tensor owns its memory, in channels-last order: torchvision's resize is faster on that than on separate
    planes. `max_pixels` replaces the limits of pixels for encoded images.
    """
    import torch  # here, so that indexing workers never load it

    return torch.from_numpy(decode_array(payload, name=name, max_pixels=max_pixels)).permute(2, 0, 1)


def decode_array(payload: bytes | np.ndarray, *, name: str, max_pixels: int | None = None) -> np.ndarray:
    """The pixels of a sample as a new uint8 array [height, width, 3]."""
    if isinstance(payload, np.ndarray):
        pixels_HWC = as_pixels(payload, name=name)
        return np.array(np.broadcast_to(pixels_HWC, (*pixels_HWC.shape[:2], 3)))
    image = _open(payload, name, max_pixels)
    loaded = _load(image, name)
    if image.format in JPEG and _ends_gray(image):
        _check_complete(payload, loaded, name, max_pixels)
    if loaded.mode != "RGB":
        gray_HW = (np.asarray(loaded).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(gray_HW[:, :, None], 3, axis=2)
    turn = UPRIGHT.get(_orientation(image))
    return np.array(loaded if turn is None else loaded.transpose(turn))


def image_size(payload: bytes | np.ndarray, *, name: str, max_pixels: int | None = None) -> tuple[int, int]:
    """Height and width of the upright image, from its header; pixels are decoded only to decide if it is truncated."""
    if isinstance(payload, np.ndarray):
        height, width = as_pixels(payload, name=name).shape[:2]
        return height, width
    image = _open(payload, name, max_pixels)
    width, height = image.size
    if not _has_end_marker(payload, image.format):
        decode_array(payload, name=name, max_pixels=max_pixels)
    elif image.format in JPEG and read_scans(payload).number > 1:
        _check_complete(payload, _load(image, name), name, max_pixels)
    return (width, height) if _orientation(image) >= 5 else (height, width)


def as_pixels(array: np.ndarray, *, name: str) -> np.ndarray:
    """An array sample in its canonical shape: uint8 [height, width, 1 or 3]."""
    pixels_HWC = array[:, :, None] if array.ndim == 2 else array
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] not in (1, 3):
        actual = f"{array.dtype} {list(array.shape)}"
        raise BadImage(name, f"expected an array sample to be uint8 [height, width, 3], found {actual}")
    _check_sides(pixels_HWC.shape[0], pixels_HWC.shape[1], name)
    return pixels_HWC


def _open(payload: bytes, name: str, max_pixels: int | None) -> ImageFile.ImageFile:
    """Open an image and check its format, size and number of scans; no pixel is decoded."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise Refused(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this process, so truncated images would not be detected; "
            "set it to False and exclude bad images instead"
        )
    if not payload:
        raise BadImage(name, "the file is empty")
    if len(payload) > MAX_ENCODED_BYTES:
        raise BadImage(name, f"{len(payload)} bytes encoded, more than the limit of {MAX_ENCODED_BYTES}")
    kind = next((kind for kind in FORMATS if _is_of_kind(payload, kind)), None)
    if kind is None:
        raise BadImage(name, f"not an image in any of the formats {', '.join(FORMATS)}")
    if kind == "WEBP":  # its loader allocates the image
        _check_pixels(*_webp_size(payload), len(payload), name, max_pixels)
    try:
        image = FORMATS[kind](io.BytesIO(payload))
    except PILLOW_RAISES as error:
        raise BadImage(name, one_line(error)) from error
    _check_pixels(image.height, image.width, len(payload), name, max_pixels)
    if image.format in JPEG:
        scans = read_scans(payload)
        if scans.number > MAX_SCANS:
            raise BadImage(name, f"expected at most {MAX_SCANS} scans in a JPEG, found more")
        if not scans.complete:
            raise BadImage(name, "truncated: scans are missing")
    return image


def _is_of_kind(payload: bytes, kind: str) -> bool:
    accept = Image.OPEN[kind][1]
    return accept is not None and bool(accept(payload[:16]))


def _load(image: ImageFile.ImageFile, name: str) -> Image.Image:
    """The decoded image, in RGB or in gray of more than 8 bits."""
    try:
        image.load()
        image.info.pop("transparency", None)  # it would be blended in, or warned about
        return image if image.mode == "RGB" or image.mode.startswith("I") else image.convert("RGB")
    except PILLOW_RAISES as error:
        raise BadImage(name, one_line(error)) from error


def _check_sides(height: int, width: int, name: str) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise BadImage(name, f"expected sides of 1 to {MAX_SIDE} pixels, found {width} x {height}")


def _check_pixels(height: int, width: int, encoded: int, name: str, max_pixels: int | None) -> None:
    _check_sides(height, width, name)
    pixels, size = width * height, f"{width} x {height} = {width * height} pixels"
    if pixels > (max_pixels or MAX_PIXELS):
        raise BadImage(name, f"{size}, more than {max_pixels or MAX_PIXELS}{ALLOW.format(pixels)}")
    if max_pixels is None and pixels > FEW_PIXELS and pixels > PIXELS_PER_BYTE * encoded:
        raise BadImage(name, f"{size} in {encoded} bytes, as in a file made to exhaust memory{ALLOW.format(pixels)}")


def _webp_size(payload: bytes) -> tuple[int, int]:
    """Height and width in the header of a WebP image; 1 x 1 if it has none, which its loader refuses."""
    kind, head = payload[12:16], int.from_bytes(payload[20:30].ljust(10, b"\0"), "little")
    if kind == b"VP8X":
        return (head >> 56) + 1, (head >> 32 & 0xFFFFFF) + 1
    if kind == b"VP8L":
        return (head >> 22 & 0x3FFF) + 1, (head >> 8 & 0x3FFF) + 1
    return max(head >> 64 & 0x3FFF, 1), max(head >> 48 & 0x3FFF, 1)


def _ends_gray(image: Image.Image) -> bool:
    """Whether the last pixel is of the middle gray, which libjpeg sets where the data of a JPEG ends early."""
    last = image.crop((image.width - 1, image.height - 1, image.width, image.height))
    middle = 64 if image.mode == "CMYK" else 128
    return abs(last.convert("L").tobytes()[0] - middle) <= 2


def _check_complete(payload: bytes, decoded: Image.Image, name: str, max_pixels: int | None) -> None:
    """Refuse a JPEG whose data ends before its pixels do: data added to it would change them."""
    again = _load(_open(with_more_data(payload), name, max_pixels), name)
    for top in range(0, decoded.height, STRIP):
        box = (0, top, decoded.width, min(top + STRIP, decoded.height))
        if again.crop(box).tobytes() != decoded.crop(box).tobytes():
            raise BadImage(name, "truncated: its data ends before its last pixel")


def _has_end_marker(payload: bytes, kind: str | None) -> bool:
    """Whether the last bytes are those that end the format; a truncated file has them by rare chance only."""
    if kind in JPEG:
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
