"""One rule for each kind of unusual image, on small real files; bytes that are not an image are refused by name."""

from __future__ import annotations

import gc
import hashlib
import io
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from redistill_cache.errors import Refused
from torchvision.datasets.folder import pil_loader

from redistill.sources import images
from redistill.sources.base import digest_of
from redistill.sources.images import BadImage, decode_image, image_size

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (5, 7, 3), np.uint8)).resize((30, 20), Image.Resampling.BICUBIC)
)


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(payload: bytes | np.ndarray) -> np.ndarray:
    tensor = decode_image(payload, name="it")
    assert tensor.dtype == torch.uint8
    assert tensor.shape[0] == 3
    assert tuple(tensor.shape[1:]) == image_size(payload, name="it")
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_return_the_pixels(kind: str, options: dict[str, object]):
    assert np.array_equal(pixels(encode(SMOOTH, kind, **options)), SMOOTH)


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 60, "subsampling": 0}, {"progressive": True}])
def test_jpeg_gives_what_torchvisions_loader_gives(options: dict[str, object], tmp_path: Path):
    payload = encode(SMOOTH, "JPEG", **options)
    (tmp_path / "it.jpg").write_bytes(payload)
    assert np.array_equal(pixels(payload), np.asarray(pil_loader(tmp_path / "it.jpg")))


def test_gray_is_repeated():
    gray = SMOOTH[:, :, 0]
    for payload in (encode(gray, "PNG"), gray, gray[:, :, None]):
        assert np.array_equal(pixels(payload), np.repeat(gray[:, :, None], 3, axis=2))
    bits = Image.fromarray(gray > 128)
    assert np.array_equal(pixels(encode(bits, "PNG"))[:, :, 1], np.where(gray > 128, 255, 0))


def test_16_bits_keep_the_high_byte():
    deep = RNG.integers(0, 65536, (9, 11), np.uint16)
    assert np.array_equal(pixels(encode(deep, "PNG"))[:, :, 2], deep >> 8)
    # Pillow writes no 16-bit colour; this is a PNG by hand.
    colour = RNG.integers(0, 65536, (4, 5, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    payload = png(5, 4, depth=16, colour=2, data=zlib.compress(rows))
    assert np.array_equal(pixels(payload), colour >> 8)


def test_cmyk_is_converted_as_pillow_does():
    cmyk = Image.fromarray(SMOOTH).convert("CMYK")
    payload = encode(cmyk, "JPEG", quality=95)
    assert np.array_equal(pixels(payload), np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")))
    assert np.abs(pixels(payload).astype(int) - SMOOTH).mean() < 6


def test_palettes_and_transparency_show_the_colour_underneath():
    palette = Image.fromarray(SMOOTH).quantize(16)
    flat = np.asarray(palette.convert("RGB"))
    assert np.array_equal(pixels(encode(palette, "PNG")), flat)
    assert np.array_equal(pixels(encode(palette, "PNG", transparency=bytes(range(16)))), flat)
    assert np.array_equal(pixels(encode(palette, "PNG", transparency=3)), flat)
    alpha = RNG.integers(0, 256, (20, 30, 1), np.uint8)
    assert np.array_equal(pixels(encode(np.concatenate([SMOOTH, alpha], axis=2), "PNG")), SMOOTH)
    gray_alpha = Image.fromarray(np.concatenate([SMOOTH[:, :, :1], alpha], axis=2), "LA")
    assert np.array_equal(pixels(encode(gray_alpha, "PNG"))[:, :, 0], SMOOTH[:, :, 0])


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_exif_turns_upright(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    payload = encode(SMOOTH, kind, exif=exif)
    plain = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    turned = {
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.transpose(1, 0, 2),
        6: plain[::-1].transpose(1, 0, 2),
        7: plain[::-1, ::-1].transpose(1, 0, 2),
        8: plain[:, ::-1].transpose(1, 0, 2),
    }
    assert np.array_equal(pixels(payload), turned.get(orientation, plain))


def test_exif_of_other_formats_and_broken_exif_count_as_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(pixels(encode(SMOOTH, "PNG", exif=exif)), SMOOTH)
    whole = exif.tobytes()
    for cut in range(6, len(whole)):
        image = Image.open(io.BytesIO(encode(SMOOTH, "WEBP", lossless=True)))
        image.info["exif"] = whole[:cut]
        assert images._orientation(image) in (1, 6)
        image.info["exif"] = whole[:cut] + b"\xff" * 16
        assert 1 <= images._orientation(image) <= 8


def test_animations_show_the_first_frame():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        payload = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (pixels(payload) == 10).all(), kind


def test_the_format_is_detected_by_content_and_must_be_listed():
    for kind in ("TIFF", "PPM", "ICO"):
        with pytest.raises(BadImage, match=r"image 'a/b\.jpg' cannot be used: not an image in any of the formats JPEG"):
            image_size(encode(SMOOTH, kind), name="a/b.jpg")


PAYLOADS: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: encode(SMOOTH, "JPEG", quality=90),
    "progressive JPEG": lambda: encode(SMOOTH, "JPEG", quality=90, progressive=True),
    "PNG": lambda: encode(SMOOTH, "PNG"),
    "WEBP": lambda: encode(SMOOTH, "WEBP"),
    "GIF": lambda: encode(Image.fromarray(SMOOTH).quantize(16), "GIF"),
    "BMP": lambda: encode(SMOOTH, "BMP"),
}


@pytest.mark.parametrize("kind", PAYLOADS)
def test_truncated_images_are_found_when_indexing(kind: str):
    whole = PAYLOADS[kind]()
    image_size(whole, name="it")
    for cut in sorted({0, 1, 10, len(whole) // 4, len(whole) // 2, len(whole) * 3 // 4}):
        with pytest.raises(BadImage, match="'it'"):
            image_size(whole[:cut], name="it")
        with pytest.raises(BadImage, match="'it'"):
            decode_image(whole[:cut], name="it")


def test_a_file_with_bytes_after_its_end_is_complete():
    for kind in ("JPEG", "PNG", "WEBP"):
        payload = PAYLOADS[kind]()
        assert np.array_equal(pixels(payload + b"\0\0trailing"), pixels(payload))


def test_decoding_is_refused_while_pillow_loads_truncated_images(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(Refused, match="LOAD_TRUNCATED_IMAGES is set"):
        decode_image(PAYLOADS["PNG"](), name="it")


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    """A frame of one pixel on a screen of this size."""
    head = b"GIF89a" + struct.pack("<HH", width, height) + bytes([0x80, 0, 0, 0, 0, 0, 255, 255, 255])
    return head + b",\0\0\0\0\1\0\1\0\0" + b"\2\2D\1\0;"


def webp(kind: bytes, width: int, height: int) -> bytes:
    """A header, and data that stops soon after it."""
    sizes = {
        b"VP8X": bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        b"VP8L": b"/" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little"),
        b"VP8 ": bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", width, height),
    }
    body = kind + struct.pack("<I", 3000) + sizes[kind].ljust(3000, b"\0")
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHI", 90, 0, 54, 40, width, height, 1, 24, 0) + bytes(60)


BOMBS = {
    "9,460 x 9,460 PNG": png(9_460, 9_460, data=zlib.compress(b"\0" * 100_000, 9)),
    "2^31 x 2^31 PNG": png(0x7FFFFFFF, 0x7FFFFFFF),
    "89,478,485 x 1 PNG": png(89_478_485, 1, depth=1, colour=0, data=zlib.compress(bytes(11_184_812), 9)),
    "35 bytes of GIF": gif(9_400, 9_400),
    "870 megapixels of GIF": gif(30_000, 29_000),
    "VP8X": webp(b"VP8X", 9_400, 9_400),
    "VP8L": webp(b"VP8L", 9_400, 9_400),
    "VP8": webp(b"VP8 ", 9_400, 9_400),
    "larger VP8X": webp(b"VP8X", 16_384, 16_384),
    "larger VP8L": webp(b"VP8L", 16_383, 16_383),
    "larger VP8": webp(b"VP8 ", 16_383, 16_383),
    "BMP": bmp(9_400, 9_400),
    "JPEG": encode(SMOOTH, "JPEG").replace(struct.pack(">HH", 20, 30), struct.pack(">HH", 9_400, 9_400)),
}


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("name", BOMBS)
def test_images_of_too_many_pixels_are_refused_by_their_header(
    name: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for look in (image_size, decode_image):
        with pytest.raises(BadImage, match=r"max_pixels=\d+' to the images|expected sides of 1 to 65535 pixels"):
            look(BOMBS[name], name="bomb")


def test_refusing_them_takes_little_memory(tmp_path: Path):
    for name, payload in BOMBS.items():
        (tmp_path / name).write_bytes(payload)
    script = f"""if True:
        import resource
        from pathlib import Path
        from redistill.sources.images import BadImage, decode_array, image_size
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        for file in sorted(Path({str(tmp_path)!r}).iterdir()):
            for look in (image_size, decode_array):
                try:
                    look(file.read_bytes(), name=file.name)
                except BadImage:
                    print("refused", peak() - before)"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 2 * len(BOMBS)
    assert max(int(kib) for _, kib in lines) < 30 << 10


def test_photographs_of_100_megapixels_pass_and_larger_images_by_option():
    photograph = encode(Image.new("L", (11_648, 8_736), 9), "JPEG")
    assert image_size(photograph, name="it") == (8_736, 11_648)
    page = encode(Image.new("1", (5_000, 4_000), 1), "PNG")
    for limit in (None, 19_999_999):
        with pytest.raises(BadImage, match=r"5000 x 4000 = 20000000 pixels.*add '\?max_pixels=20000000' to the images"):
            image_size(page, name="it", max_pixels=limit)
    assert image_size(page, name="it", max_pixels=20_000_000) == (4_000, 5_000)
    assert decode_image(page, name="it", max_pixels=20_000_000).shape == (3, 4_000, 5_000)


def test_more_than_256_mib_are_refused():
    with pytest.raises(BadImage, match="limit of 268435456"):
        image_size(b"\xff\xd8" + bytes(images.MAX_ENCODED_BYTES), name="bomb")


def test_other_formats_that_were_cut_and_given_an_end_marker_are_truncated():
    for kind, end in (("PNG", 12), ("WEBP", 0), ("GIF", 1)):
        whole = PAYLOADS[kind]()
        for part in (0.5, 0.7, 0.9):
            cut = whole[: int(len(whole) * part)] + whole[len(whole) - end :]
            if kind == "WEBP":
                cut = cut[:4] + struct.pack("<I", len(cut) - 8) + cut[8:]
            with pytest.raises(BadImage, match="'it'"):
                decode_image(cut, name="it")


def test_hundreds_of_damaged_images_raise_bad_image_or_decode():
    rng = np.random.default_rng(3)
    lines = []
    for make in PAYLOADS.values():
        whole = np.frombuffer(make(), np.uint8)
        for _ in range(100):
            damaged = whole.copy()
            places = rng.integers(0, len(whole), rng.integers(1, 8))
            damaged[places] = rng.integers(0, 256, len(places))
            try:
                decode_image(damaged.tobytes(), name="it")
            except BadImage as error:
                lines.append(str(error))
    assert len(lines) > 100
    assert not any("\n" in line for line in lines)


def test_arrays_of_other_kinds_are_bad():
    for array in (
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ):
        with pytest.raises(BadImage, match="'it'"):
            decode_image(array, name="it")


def test_an_array_is_copied_and_its_digest_is_of_its_canonical_bytes():
    array = SMOOTH.copy()
    array.flags.writeable = False
    decode_image(array, name="it").zero_()
    assert np.array_equal(array, SMOOTH)
    expected = hashlib.sha256(b"uint8[20,30,3]" + SMOOTH.tobytes()).digest()
    assert digest_of(SMOOTH, name="it") == digest_of(np.asfortranarray(SMOOTH), name="it") == expected
    gray = SMOOTH[:, :, 0]
    assert (
        digest_of(gray, name="it")
        == digest_of(gray[:, :, None], name="it")
        == hashlib.sha256(b"uint8[20,30,1]" + gray.tobytes()).digest()
    )


class OneBad(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> torch.Tensor:
        return decode_image(b"no image", name="a/b.jpg")


def test_a_bad_image_in_a_worker_keeps_its_type_and_message():
    again = pickle.loads(pickle.dumps(BadImage("a", "b")))
    assert str(again) == str(BadImage("a", "b"))
    loader = torch.utils.data.DataLoader(OneBad(), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(BadImage) as error:
        next(iter(loader))
    assert str(error.value).startswith("image 'a/b.jpg' cannot be used: not an image")
    del error
    gc.collect()  # the frames of the traceback hold the iterator, and with it the worker
