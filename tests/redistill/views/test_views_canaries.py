"""The alignment check: other decoders pass, other views are refused with a cause; the choice of canary rows."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from redistill_cache.errors import Damaged, Refused

from bench.canaries import by_draft, by_half_draft, by_pillow, by_torchvision, upsampling_chroma
from bench.pictures import jpeg, picture
from redistill.sources.images import decode_array
from redistill.sources.index import index_source
from redistill.sources.join import Join
from redistill.sources.open_source import open_source
from redistill.views import DrawnViews, ViewDataset, parse_recipe
from redistill.views.canaries import (
    Alignment,
    AlteredViews,
    align,
    canary_rows,
    check_canaries,
    fingerprints,
    view_environment,
)
from redistill.views.fingerprint import best_explanation, distance, grid_positions
from tests.image_source import ImageSource
from tests.memory_archive import MemoryArchive

N, SEED = 24, 3


def encoded_images() -> list[bytes]:
    random = np.random.default_rng(4)
    sizes = random.integers(60, 120, (N, 2))
    return [jpeg(picture(i, *sizes[i]), int(random.choice([80, 95]))) for i in range(N)]


ENCODED = encoded_images()
INDEX = index_source(open_source(ImageSource(ENCODED)), workers=0)
PLAIN = "rrc?size=64"
OPERATED = "rrc?size=64&aa=ta_wide&color_jitter=0.4,0.4,0.4,0.1&reprob=0.25"
MIXED = "rrc?size=64&mixup=0.4&cutmix=1"
RECIPES = [PLAIN, OPERATED, MIXED]


def drawn(text: str, seed: int = SEED, num_views: int = 1) -> DrawnViews:
    return DrawnViews(INDEX, parse_recipe(text), seed=seed, num_views=num_views)


def canaries(images: ImageSource, views, view: int = 0, count: int = N) -> tuple[np.ndarray, np.ndarray]:
    """The rows and fingerprints that an archive would store for a view."""
    rows = canary_rows(SEED, view, N, count)
    return rows, fingerprints(ViewDataset(images, views), view, rows)


@cache
def stored(text: str) -> dict:
    return {0: canaries(ImageSource(ENCODED), drawn(text))}


@cache
def decoded(how=by_pillow) -> ImageSource:
    return ImageSource([how(data) for data in ENCODED])


def alignment(text: str, source: ImageSource, views=None) -> Alignment:
    return align(ViewDataset(source, views or drawn(text)), stored(text))


# -- another decoder passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", RECIPES)
@pytest.mark.parametrize("how", [by_pillow, by_torchvision, by_draft])
def test_the_same_pixels_are_exact(text, how):
    result = alignment(text, decoded(how))
    assert (result.verdict, result.drift, result.checked) == ("exact", 0.0, N)
    assert result.require() is result


@pytest.mark.parametrize("text", RECIPES)
@pytest.mark.parametrize("how", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_another_chroma_upsampling_is_tolerated(text, how):
    result = alignment(text, decoded(upsampling_chroma(how)))
    assert result.verdict == "tolerance"
    assert 0.0 < result.drift < 1.0
    assert "drift" in result.message


def test_rounding_noise_is_tolerated():
    """One level up or down at random: what another inverse DCT does."""
    random = np.random.default_rng(0)
    noisy = [np.clip(image.astype(int) + random.integers(-1, 2, image.shape), 0, 255) for image in decoded().payloads]
    assert alignment(PLAIN, ImageSource([image.astype(np.uint8) for image in noisy])).verdict == "tolerance"


# -- another view is refused ------------------------------------------------------------------------------------------


def sizes() -> dict:
    return {i: image.shape[:2] for i, image in enumerate(decoded().payloads)}


def with_interpolation(text, interpolation, antialias):
    return AlteredViews(drawn(text), replace(parse_recipe(text), interpolation=interpolation, antialias=antialias))


def nudged(text, *nudge):
    return AlteredViews(drawn(text), parse_recipe(text), nudge, sizes())


def replaced_by_neighbours() -> ImageSource:
    images = decoded().payloads
    pairs = zip(images, images[1:] + images[:1], strict=True)
    return ImageSource([np.array(Image.fromarray(other).resize(image.shape[1::-1])) for image, other in pairs])


def recompressed(image: np.ndarray) -> np.ndarray:
    return decode_array(jpeg(image, 50), name="recompressed")


WRONG = {
    "bicubic": lambda text: (decoded(), with_interpolation(text, "bicubic", True)),
    "nearest": lambda text: (decoded(), with_interpolation(text, "nearest", True)),
    "no antialiasing": lambda text: (decoded(), with_interpolation(text, "bilinear", False)),
    "one pixel lower": lambda text: (decoded(), nudged(text, 1, 0, 0, 0)),
    "one pixel right": lambda text: (decoded(), nudged(text, 0, 1, 0, 0)),
    "one pixel larger": lambda text: (decoded(), nudged(text, 0, 0, 1, 1)),
    "one pixel smaller": lambda text: (decoded(), nudged(text, 0, 0, -1, -1)),
    "mirrored": lambda _: (ImageSource([image[:, ::-1].copy() for image in decoded().payloads]), None),
    "upside down": lambda _: (ImageSource([image[::-1].copy() for image in decoded().payloads]), None),
    "red and blue swapped": lambda _: (ImageSource([image[..., ::-1].copy() for image in decoded().payloads]), None),
    "shuffled": lambda _: (replaced_by_neighbours(), None),
    "quality 50": lambda _: (
        ImageSource([recompressed(image) for image in decoded().payloads]),
        None,
    ),
    "decoded at half size": lambda _: (decoded(by_half_draft), None),
    "another seed": lambda text: (decoded(), drawn(text, seed=SEED + 1)),
}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        *((PLAIN, wrong) for wrong in WRONG),
        *(pytest.param(text, wrong, marks=pytest.mark.slow) for text in (OPERATED, MIXED) for wrong in WRONG),
    ],
)
def test_other_views_are_refused(text, wrong):
    result = alignment(text, *WRONG[wrong](text))
    assert result.verdict == "refused"
    with pytest.raises(Refused, match="do not match the archive") as caught:
        result.require()
    assert "\n" not in str(caught.value)
    assert len(result.worst) == 3
    assert result.worst[0].drift >= result.worst[1].drift


@pytest.mark.parametrize(
    "other", ["rrc?size=64&scale=0.09,1", "rrc?size=64&color_jitter=0,0,0.3", "rrc?size=64&hflip=0.6"]
)
def test_other_recipes_are_refused(other):
    assert alignment(PLAIN, decoded(), drawn(other)).verdict == "refused"


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ("bicubic", "resized by bilinear interpolation, with antialiasing"),
        ("no antialiasing", "resized by bilinear interpolation, with antialiasing"),
        ("nearest", "resized by bilinear interpolation, with antialiasing"),
        ("shuffled", "canaries show other content"),
        ("quality 50", "detail differs"),
    ],
)
def test_the_cause_is_named(wrong, cause):
    assert cause in alignment(PLAIN, *WRONG[wrong](PLAIN)).message


def test_a_wrong_rendering_is_found_within_the_noise_of_a_decoder():
    """The archive was resized without antialiasing and decoded otherwise: within tolerance, but the cause shows."""
    images = decoded(upsampling_chroma(Image.Resampling.NEAREST))
    archive = {0: canaries(images, with_interpolation(PLAIN, "bilinear", False))}
    apart = distance(archive[0][1], stored(PLAIN)[0][1])
    assert apart.mismatch() is None
    result = align(ViewDataset(ImageSource(ENCODED), drawn(PLAIN)), archive)
    assert result.verdict == "refused"
    assert "bilinear interpolation, without antialiasing" in result.reason


def test_an_option_without_effect_is_exact():
    """Views that are not resized do not depend on the interpolation."""
    text = "cifar?size=32"
    result = alignment(text, decoded(), with_interpolation(text, "bicubic", True))
    assert result.verdict == "exact"


# -- which rows -------------------------------------------------------------------------------------------------------


def test_canary_rows_are_a_uniform_sample_without_repetition():
    counts = np.zeros(50)
    for view in range(400):
        rows = canary_rows(1, view, 50, 10)
        assert rows.dtype == np.uint32
        assert len(set(rows.tolist())) == 10
        assert (np.diff(rows.astype(int)) > 0).all()
        counts[rows] += 1
    assert counts.min() > 40  # of 80 expected, five standard deviations away
    assert counts.max() < 120


def test_canary_rows_are_a_function_of_seed_and_view():
    assert canary_rows(7, 2, 1_281_167, 4).tolist() == canary_rows(7, 2, 1_281_167, 4).tolist() == CANARY_ROWS
    assert canary_rows(7, 3, 1_281_167, 4).tolist() != CANARY_ROWS
    assert canary_rows(8, 2, 1_281_167, 4).tolist() != CANARY_ROWS


CANARY_ROWS = [39485, 191301, 711398, 756932]


def test_fewer_rows_than_canaries_are_all_canaries():
    assert canary_rows(1, 0, 5).tolist() == [0, 1, 2, 3, 4]


def test_fingerprints_are_pixels_of_the_view():
    rows, pixels = canaries(ImageSource(ENCODED), drawn(PLAIN), count=5)
    at = grid_positions(64)
    assert at.tolist() == [4, 12, 20, 28, 36, 44, 52, 60]
    dataset = ViewDataset(ImageSource(ENCODED), drawn(PLAIN))
    for row, fingerprint in zip(rows.tolist(), pixels, strict=True):
        view = dataset[row].pixels
        for y in range(8):
            for x in range(8):
                assert fingerprint[y, x].tolist() == view[:, at[y], at[x]].tolist()


def test_small_views_have_fingerprints_too():
    assert grid_positions(3).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert grid_positions(224).max() < 224


# -- an archive -------------------------------------------------------------------------------------------------------


class CanaryArchive(MemoryArchive):
    """An archive with canaries of ENCODED; `views_read` lists the views whose canaries were read."""

    def __init__(self, text: str, num_views: int) -> None:
        super().__init__(text, INDEX, seed=SEED, num_views=num_views)
        self.spec.canaries_per_view = 16
        self.spec.environment = {**view_environment(), "pillow": "1.0", "seconds": 3}
        self.views = drawn(text, num_views=num_views)
        self.views_read: list[int] = []

    def canaries(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        self.views_read.append(view)
        return canaries(ImageSource(ENCODED), self.views, view, count=16)


def joined(missing=()) -> Join:
    rows = np.arange(N)
    rows[list(missing)] = -1
    return Join(rows)


def check(source: ImageSource, archive: CanaryArchive, joined: Join, **options) -> Alignment:
    return check_canaries(ViewDataset(source, archive, joined=joined, check=False), archive, **options)


def test_an_archive_is_checked_against_the_readers_images():
    result = check(ImageSource(ENCODED), CanaryArchive(MIXED, 3), joined())
    assert (result.verdict, result.checked) == ("exact", 3 * 16)
    assert result.versions == {"pillow": ("1.0", view_environment()["pillow"])}
    result = check(replaced_by_neighbours(), CanaryArchive(MIXED, 3), joined())
    assert result.verdict == "refused"
    assert result.worst[0].key == f"{result.worst[0].row}.jpg"
    assert "pillow 1.0 in the archive" in result.message


def test_many_views_are_checked_evenly():
    archive = CanaryArchive("rrc?size=16", 100)
    result = check(ImageSource(ENCODED), archive, joined())
    assert len(archive.views_read) == 16
    assert result.checked == 256
    assert np.ptp(np.diff(archive.views_read)) <= 1
    archive.views_read.clear()
    check(ImageSource(ENCODED), archive, joined(), views=[5, 7])
    assert archive.views_read == [5, 7]


def test_canaries_without_their_image_are_skipped():
    archive = CanaryArchive(MIXED, 1)
    rows = archive.canaries(0)[0]
    result = check(ImageSource(ENCODED), archive, joined(missing=rows[:8]))
    assert result.verdict == "exact"
    assert 0 < result.checked <= 8
    with pytest.raises(Refused, match="cannot be compared"):
        check(ImageSource(ENCODED), archive, joined(missing=rows))


def test_a_canary_row_beyond_the_archive_is_damage():
    archive = CanaryArchive(PLAIN, 1)
    archive.canaries = lambda _: (np.array([N], np.uint32), np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(Damaged, match="canary of view 0 is row 24"):
        check(ImageSource(ENCODED), archive, joined())


def test_an_alignment_is_plain_json():
    result = check(replaced_by_neighbours(), CanaryArchive(PLAIN, 1), joined())
    data = json.loads(json.dumps(result.to_json()))
    assert (data["verdict"], len(data["worst"]), data["checked"]) == ("refused", 3, 16)


def test_one_outlier_of_many_canaries_is_tolerated():
    """Equalizing an image almost without contrast magnifies the drift of a decoder; two such canaries are too many."""
    rendered = stored(PLAIN)[0][1].repeat(3, axis=0)
    odd = rendered.copy()
    odd[5] = 255 - odd[5]
    assert distance(odd, rendered).mismatch() is None
    odd[6] = 255 - odd[6]
    assert "2 of 72 canaries" in distance(odd, rendered).mismatch()


def test_noise_is_explained_by_no_wrong_rendering():
    random = np.random.default_rng(0)
    rendered = stored(PLAIN)[0][1]
    bicubic = stored("rrc?size=64&interpolation=bicubic")[0][1]
    noisy = np.clip(rendered.astype(int) + random.integers(-1, 2, rendered.shape), 0, 255).astype(np.uint8)
    assert best_explanation(noisy, rendered, {"bicubic": bicubic}) is None
    assert best_explanation(bicubic, rendered, {"bicubic": bicubic}) == "bicubic"


def test_the_environment_has_the_versions_that_decide_pixels():
    environment = view_environment()
    assert {"pillow", "libjpeg", "torchvision", "numpy", "cpu"} <= environment.keys()
    assert environment["torch"] == torch.__version__ or environment["torch"] in torch.__version__
    assert all(isinstance(value, str) and value for value in environment.values())
