"""Drawn parameters compared with those that torchvision v2 draws: two samples of one distribution.

All seeds are fixed, so a test either always passes or always fails; a wrong distribution
of this many samples has a p-value far below P, which `test_a_slightly_different_distribution_is_detected` shows.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from redistill.views import draw_params, parse_recipe
from redistill.views.ops import OPERATIONS
from redistill.views.recipe import BLUR_UNIT, EDGE_UNIT, JITTER_UNIT, WEIGHT_UNIT

N = 30_000  # of ours
THEIRS = 4_000
P = 1e-3


@pytest.fixture(autouse=True)
def fixed_torch_seed():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def draw(text: str, height: int, width: int, n: int = N) -> dict[str, np.ndarray]:
    return draw_params(parse_recipe(text), 5, 3, np.arange(n), np.tile([height, width], (n, 1)), n)


def their_params(transform: v2.Transform, height: int, width: int, n: int = THEIRS) -> list[dict]:
    inputs = [tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))]
    return [transform.make_params(inputs) for _ in range(n)]


def assert_same_numbers(ours, theirs):
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    assert scipy.stats.ks_2samp(ours, theirs).pvalue > P


def assert_same_counts(ours, theirs):
    """Chi-square test that two collections were drawn from the same distribution."""
    ours, theirs = Counter(ours), Counter(theirs)
    kinds = sorted(ours | theirs)
    table = np.array([[ours[kind] for kind in kinds], [theirs[kind] for kind in kinds]])
    frequent = table.sum(axis=0) >= 10
    assert table[:, ~frequent].sum() <= 0.02 * table.sum()
    assert scipy.stats.chi2_contingency(table[:, frequent]).pvalue > P


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 120), (32, 32)])
@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.4, 0.9), (0.5, 3.0))])
def test_random_resized_crop(height, width, scale, ratio):
    text = f"rrc?scale={scale[0]},{scale[1]}&ratio={ratio[0]!r},{ratio[1]!r}"
    top, left, high, wide = draw(text, height, width)["crop"].astype(float).T
    drawn = their_params(v2.RandomResizedCrop(224, scale=scale, ratio=ratio), height, width)
    theirs = np.array([[one[key] for key in ("top", "left", "height", "width")] for one in drawn], float)
    assert_same_numbers(high, theirs[:, 2])
    assert_same_numbers(wide, theirs[:, 3])
    assert_same_numbers(high * wide, theirs[:, 2] * theirs[:, 3])
    assert_same_numbers(wide / high, theirs[:, 3] / theirs[:, 2])
    assert_same_numbers(top, theirs[:, 0])
    assert_same_numbers(left, theirs[:, 1])
    assert_same_numbers(top / (height - high + 1), theirs[:, 0] / (height - theirs[:, 2] + 1))


def test_padded_crop():
    crop = draw("cifar", 32, 32)["crop"] + [4, 4, 0, 0]
    drawn = their_params(v2.RandomCrop(32, padding=4), 32, 32)
    assert_same_counts(map(tuple, crop[:, :2].tolist()), [(one["top"], one["left"]) for one in drawn])


@pytest.mark.parametrize(("name", "text"), [("hflip", "hflip=0.3"), ("vflip", "hflip=0&vflip=0.3")])
def test_flips(name, text):
    bits = draw(f"rrc?{text}", 64, 64)["flip"]
    happened = bits >> (name == "vflip") & 1
    assert scipy.stats.binomtest(int(happened.sum()), N, 0.3).pvalue > P


def test_flips_crops_and_rows_are_independent():
    params = draw("cifar", 32, 32)
    pairs = zip(params["crop"][:, 0].tolist(), params["flip"].tolist(), strict=True)
    table = Counter(pairs)
    assert scipy.stats.chi2_contingency([[table[top, bit] for top in range(-4, 5)] for bit in (0, 1)]).pvalue > P
    flips = params["flip"].astype(float)
    assert abs(np.corrcoef(flips[:-1], flips[1:])[0, 1]) < 4 / N**0.5


def test_color_jitter():
    jitter = draw("rrc?color_jitter=0.4,0.3,0.2,0.1", 64, 64)["jitter"]
    drawn = their_params(v2.ColorJitter(0.4, 0.3, 0.2, 0.1), 64, 64)
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for position, name in enumerate(names, 1):
        assert_same_numbers(jitter[:, position] / JITTER_UNIT, [one[name] for one in drawn])
    assert scipy.stats.chisquare(np.bincount(jitter[:, 0], minlength=24)).pvalue > P


def recorded(kind: type[v2.Transform], n: int, side: int, **options) -> list[list[tuple[str, float]]]:
    """The operations and magnitudes that torchvision's automatic augmentation applies."""
    calls: list[tuple[str, float]] = []

    class Recorder(kind):
        def _apply_image_or_video_transform(self, image, transform_id, magnitude, **_):
            calls.append((transform_id, magnitude))
            return image

    transform, image = Recorder(**options), tv_tensors.Image(torch.zeros(3, side, side, dtype=torch.uint8))
    lists = []
    for _ in range(n):
        transform(image)
        lists.append(calls.copy())
        calls.clear()
    return lists


# Ours -> torchvision's, and the unit in which the magnitude is stored, for a view of 96 pixels.
THEIR_NAMES = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
NAMES = dict(zip(OPERATIONS, THEIR_NAMES, strict=True))
UNITS = {"posterize": 1, "rotate": 2**7, "solarize": 255 * 2**7, "translate_x": 2**14 / 96, "translate_y": 2**14 / 96}


def ours_as_theirs(ops: np.ndarray) -> list[tuple[str, float]]:
    """Operation and magnitude in torchvision's terms, shifts in whole pixels; rounded, to be counted."""
    calls = []
    for number, stored in ops.tolist():
        name = OPERATIONS[number]
        calls.append((NAMES[name], round(stored / UNITS.get(name, 2**14), 2)))
    return calls


def counted(calls: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """A shift applies as a whole number of pixels, cut off towards zero (float32 makes 15.999999 of 16)."""
    return [
        (name, float(int(value + np.copysign(1e-4, value))) if name.startswith("Translate") else round(value, 2) + 0.0)
        for name, value in calls
    ]


@pytest.mark.parametrize("magnitude", [9, 14])
def test_rand_augment(magnitude):
    ops = draw(f"rrc?size=96&aa=rand-m{magnitude}-n2", 96, 96)["ops"]
    theirs = recorded(v2.RandAugment, 2000, 96, num_ops=2, magnitude=magnitude)
    for position in (0, 1):
        their_calls = counted([calls[position] for calls in theirs])
        assert_same_counts(ours_as_theirs(ops[:, position]), their_calls)
    # Two operations of one view are drawn independently.
    table = np.zeros((len(OPERATIONS), len(OPERATIONS)))
    np.add.at(table, (ops[:, 0, 0], ops[:, 1, 0]), 1)
    assert scipy.stats.chi2_contingency(table).pvalue > P


def test_trivial_augment_wide():
    ours = ours_as_theirs(draw("rrc?size=96&aa=ta_wide", 96, 96)["ops"][:, 0])
    theirs = counted([calls[0] for calls in recorded(v2.TrivialAugmentWide, THEIRS, 96)])
    assert_same_counts([name for name, _ in ours], [name for name, _ in theirs])
    for name in NAMES.values():
        mine, others = ([value for kind, value in calls if kind == name] for calls in (ours, theirs))
        assert_same_numbers(mine, others)
        nearest = np.abs(np.subtract.outer(np.abs(others), np.unique(np.abs(mine)))).min(axis=1)
        assert nearest.max() <= 0.011  # both are rounded to hundredths


def test_grayscale_and_blur():
    params = draw("rrc?grayscale_prob=0.2&gaussian_blur_prob=0.4&blur_sigma=0.3,1.7", 64, 64)
    assert scipy.stats.binomtest(int(params["gray"].sum()), N, 0.2).pvalue > P
    blurred = params["blur"] > 0
    assert scipy.stats.binomtest(int(blurred.sum()), N, 0.4).pvalue > P
    drawn = their_params(v2.GaussianBlur(5, sigma=(0.3, 1.7)), 64, 64)
    assert_same_numbers(params["blur"][blurred] / BLUR_UNIT, [one["sigma"][0] for one in drawn])


@pytest.mark.parametrize(("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.2, 0.9), (0.2, 1.5))])
def test_erasing(scale, ratio):
    text = f"rrc?size=64&reprob=0.5&rescale={scale[0]},{scale[1]}&reratio={ratio[0]},{ratio[1]}"
    boxes = np.rint(draw(text, 64, 64)["erase"] / EDGE_UNIT * 64)
    drawn = their_params(v2.RandomErasing(p=1, scale=scale, ratio=ratio), 64, 64)
    without_box = np.mean([one["v"] is None for one in drawn])
    boxes = boxes[boxes[:, 2] > 0]
    assert abs(len(boxes) / N - 0.5 * (1 - without_box)) < 0.02
    theirs = np.array([[one[key] for key in "ijhw"] for one in drawn if one["v"] is not None])
    assert_same_numbers(boxes[:, 0], theirs[:, 0])
    assert_same_numbers(boxes[:, 1], theirs[:, 1])
    assert_same_numbers(boxes[:, 2] - boxes[:, 0], theirs[:, 2])
    assert_same_numbers(boxes[:, 3] - boxes[:, 1], theirs[:, 3])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup(alpha):
    params = draw(f"rrc?mixup={alpha}", 64, 64)
    drawn = their_params(v2.MixUp(alpha=alpha, num_classes=2), 64, 64)
    # On the same grid: at small alphas many weights are nearer to 0 or 1 than a stored weight can represent.
    assert_same_numbers(params["mix_weight"], np.rint([one["lam"] * WEIGHT_UNIT for one in drawn]))
    assert scipy.stats.kstest(params["mix_partner"] / N, "uniform").pvalue > P


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmix(alpha):
    params = draw(f"rrc?size=64&cutmix={alpha}", 64, 64)
    drawn = their_params(v2.CutMix(alpha=alpha, num_classes=2), 64, 64)
    assert_same_numbers(params["mix_weight"] / WEIGHT_UNIT, [one["lam_adjusted"] for one in drawn])
    boxes = np.rint(params["mix_box"] / EDGE_UNIT * 64)
    boxes = boxes[boxes[:, 2] > 0]
    theirs = np.array([one["box"] for one in drawn if one["lam_adjusted"] < 1])
    for mine, their in enumerate((1, 0, 3, 2)):
        assert_same_numbers(boxes[:, mine], theirs[:, their])


def test_mixing_follows_its_probabilities():
    params = draw("rrc?size=64&mixup=0.8&cutmix=1&mixup_prob=0.7&mixup_switch_prob=0.25", 64, 64)
    cut = params["mix_box"][:, 2] > 0
    mixed = params["mix_partner"] != np.arange(N)
    assert abs(mixed.mean() - 0.7) < 0.03  # a few drawn weights round to the whole view
    assert abs(cut.mean() - 0.7 * 0.25) < 0.01


def test_a_slightly_different_distribution_is_detected():
    """Detected: a ratio range 5 % too wide, an operation missing, a sign never drawn."""
    crop = draw("rrc?ratio=0.7125,1.4", 375, 500)["crop"]
    drawn = their_params(v2.RandomResizedCrop(224), 375, 500)
    with pytest.raises(AssertionError):
        assert_same_numbers(crop[:, 3] / crop[:, 2], [one["width"] / one["height"] for one in drawn])
    ops = draw("rrc?size=96&aa=rand-m9-n1", 96, 96)["ops"][:, 0]
    theirs = counted([calls[0] for calls in recorded(v2.RandAugment, 2000, 96, num_ops=1)])
    with pytest.raises(AssertionError):
        assert_same_counts(ours_as_theirs(ops[ops[:, 0] != 13]), theirs)
    with pytest.raises(AssertionError):
        assert_same_counts(ours_as_theirs(np.abs(ops)), theirs)
