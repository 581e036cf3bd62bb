"""JPEGs of too many scans, and JPEGs that were cut and given an end marker."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from redistill.sources.images import BadImage, decode_image, image_size
from redistill.sources.jpeg import MAX_SCANS

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (9, 13, 3), np.uint8)).resize((150, 107), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def start_of_last_scan(payload: bytes) -> int:
    return payload.rindex(b"\xff\xda")


KINDS = {
    "4:2:0": jpeg(PHOTO, quality=90),
    "4:4:4": jpeg(PHOTO, quality=75, subsampling=0),
    "gray": jpeg(PHOTO.convert("L")),
    "CMYK": jpeg(PHOTO.convert("CMYK")),
    "restarts": jpeg(PHOTO, restart_marker_blocks=3),
    "turned": jpeg(PHOTO, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "progressive": jpeg(PHOTO, progressive=True),
    "progressive gray": jpeg(PHOTO.convert("L"), progressive=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_jpeg_with_an_end_marker_is_truncated(kind: str):
    whole = KINDS[kind]
    image_size(whole, name="it")
    pixels = decode_image(whole, name="it")
    first = whole.index(b"\xff\xda") + 20
    found = missed = 0
    for cut in range(first, len(whole) - 2, 29):
        if whole[cut - 1] == 0xFF:
            continue
        try:
            image_size(whole[:cut] + b"\xff\xd9", name="it")
            again = decode_image(whole[:cut] + b"\xff\xd9", name="it")
        except BadImage:
            found += 1
        else:
            different = (again != pixels).any(dim=0).nonzero()
            assert kind == "progressive gray" or len(different) <= 17 * 32  # in the last block and around it
            missed += 1
    assert found > 20
    assert missed <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_no_meaning_before_the_end_do_not_make_a_jpeg_truncated(kind: str):
    whole = KINDS[kind]
    longer = whole[:-2] + b"\x12\x34" * 9 + whole[-2:]
    assert image_size(longer, name="it") == image_size(whole, name="it")
    assert decode_image(longer, name="it").equal(decode_image(whole, name="it"))


def test_an_image_that_is_gray_at_its_end_is_complete():
    for value in range(120, 136):
        gray = Image.new("RGB", (40, 30), (value,) * 3)
        for payload in (jpeg(gray), jpeg(gray, "MPO", save_all=True, append_images=[PHOTO])):
            assert image_size(payload, name="it") == (30, 40)
            assert int(decode_image(payload, name="it")[0, -1, -1]) == value


@pytest.mark.parametrize("kind", ["progressive", "progressive gray"])
def test_a_jpeg_of_thousands_of_scans_is_refused_undecoded(kind: str):
    whole = KINDS[kind]
    last = whole[start_of_last_scan(whole) : -2]
    for count in (MAX_SCANS, 3000):
        with pytest.raises(BadImage, match=f"expected at most {MAX_SCANS} scans in a JPEG, found more"):
            image_size(whole[:-2] + last * count + whole[-2:], name="it")


def test_scans_of_thumbnails_and_of_data_after_the_end_do_not_count():
    many = b"\xff\xda" * 1000
    comment = b"\xff\xfe" + (len(many) + 2).to_bytes(2, "big") + many
    for whole in KINDS.values():
        payload = whole[:2] + comment + whole[2:] + many
        assert decode_image(payload, name="it").equal(decode_image(whole, name="it"))
        assert image_size(payload, name="it") == image_size(whole, name="it")
