"""Drawn parameters: functions of only (seed, view, row), in range, and the same in every version."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from redistill_cache.errors import Refused, UsageError

from redistill.views import draw_params, parse_recipe
from redistill.views.counter import draw_words
from redistill.views.draw import DRAW_ROWS
from redistill.views.ops import OPERATIONS
from redistill.views.recipe import EDGE_UNIT, WEIGHT_UNIT

EVERYTHING = (
    "rrc?color_jitter=0.4,0.4,0.4,0.1&color_jitter_prob=0.8&aa=rand-m9-n2&grayscale_prob=0.2&gaussian_blur_prob=0.5"
    "&reprob=0.5&mixup=0.2&cutmix=1&mixup_prob=0.8"
)
N = 5000
SIZES = np.random.default_rng(3).integers(20, 600, (N, 2))


def draw(text=EVERYTHING, rows=None, seed=11, view=2):
    rows = np.arange(N) if rows is None else rows
    return draw_params(parse_recipe(text), seed, view, rows, SIZES[rows], N)


def test_the_arrays_are_those_the_recipe_declares():
    for spec, (name, values) in zip(parse_recipe(EVERYTHING).arrays(), draw().items(), strict=True):
        assert (name, values.dtype, values.shape) == (spec.name, np.dtype(spec.dtype), (N, *spec.row_shape))


def test_rows_can_be_drawn_in_any_order_and_batch():
    whole = draw()
    order = np.random.default_rng(1).permutation(N)
    shuffled = draw(rows=order)
    alone = draw(rows=np.array([77]))
    for name, values in whole.items():
        assert (shuffled[name] == values[order]).all()
        assert (alone[name] == values[77:78]).all()


def test_rows_do_not_depend_on_the_block_they_are_drawn_in():
    rows = np.arange(DRAW_ROWS + 100)
    sizes = np.tile([300, 400], (len(rows), 1))
    recipe = parse_recipe("rrc?reprob=0.3")
    whole = draw_params(recipe, 1, 0, rows, sizes, len(rows))
    tail = draw_params(recipe, 1, 0, rows[-150:], sizes[-150:], len(rows))
    for name, values in whole.items():
        assert (tail[name] == values[-150:]).all()


def test_seeds_and_views_differ():
    for other in (draw(seed=12), draw(view=3)):
        for name, values in draw().items():
            assert (other[name] != values).any()


def test_all_parameters_are_in_range():
    params = draw()
    crop = params["crop"].astype(int)
    assert (crop[:, :2] >= 0).all()
    assert (crop[:, 2:] >= 1).all()
    assert (crop[:, :2] + crop[:, 2:] <= SIZES).all()
    assert set(np.unique(params["flip"])) == {0, 1}
    assert params["jitter"][:, 0].min() == -1
    assert params["jitter"][:, 0].max() == 23
    assert params["ops"][..., 0].min() == 0
    assert params["ops"][..., 0].max() == len(OPERATIONS) - 1
    for box in (params["erase"].astype(int), params["mix_box"].astype(int)):
        assert (box[:, :2] <= box[:, 2:]).all()
        assert box.max() <= EDGE_UNIT
        assert ((box[:, :2] < box[:, 2:]).all(axis=1) | (box == 0).all(axis=1)).all()


def test_partners_are_other_rows_unless_nothing_is_mixed():
    params = draw("cifar?padding=300&mixup=0.2&cutmix=1&mixup_prob=0.7")
    itself = params["mix_partner"] == np.arange(N)
    assert (itself == (params["mix_weight"] == WEIGHT_UNIT)).all()
    assert (params["mix_box"][itself] == 0).all()
    assert params["mix_partner"].max() < N
    assert 0.25 < itself.mean() < 0.45


def test_a_single_sample_mixes_with_nothing():
    params = draw_params(parse_recipe("cifar?mixup=1"), 0, 0, [0], [[32, 32]], 1)
    assert (params["mix_partner"][0], params["mix_weight"][0]) == (0, WEIGHT_UNIT)


def test_extreme_images_fall_back_to_the_central_box_of_torchvision():
    recipe = parse_recipe("rrc")
    sizes = np.array([[1000, 10], [10, 1000], [1, 1], [1, 5000]])
    crop = draw_params(recipe, 0, 0, np.arange(4), sizes, 4)["crop"]
    assert crop.tolist() == [[493, 0, 13, 10], [0, 493, 10, 13], [0, 0, 1, 1], [0, 2499, 1, 1]]


def test_center_crops():
    crop = draw_params(parse_recipe("center?crop_pct=0.875"), 0, 0, [0, 1, 2], [[256, 300], [100, 81], [1, 1]], 3)[
        "crop"
    ]
    assert crop.tolist() == [[16, 38, 224, 224], [14, 5, 71, 71], [0, 0, 1, 1]]


def test_images_too_small_for_a_padded_crop_are_named():
    with pytest.raises(Refused, match=r"row 1: .* 20 x 32 padded by 4"):
        draw_params(parse_recipe("cifar"), 0, 0, [0, 1], [[32, 32], [20, 32]], 2)
    with pytest.raises(Refused, match="reflecting 40 pixels"):
        draw_params(parse_recipe("cifar?padding=40&padding_mode=reflect"), 0, 0, [0], [[32, 32]], 2)


@pytest.mark.parametrize(
    ("seed", "view", "rows", "sizes"),
    [
        (-1, 0, [0], [[9, 9]]),
        (2**64, 0, [0], [[9, 9]]),
        (0, -1, [0], [[9, 9]]),
        (0, 0, [5], [[9, 9]]),
        (0, 0, [0], [9]),
    ],
)
def test_invalid_arguments_are_refused(seed, view, rows, sizes):
    with pytest.raises(UsageError):
        draw_params(parse_recipe("rrc"), seed, view, rows, sizes, 5)


def test_no_rows_is_no_parameters():
    assert draw(rows=np.arange(0))["crop"].shape == (0, 4)


def test_draws_never_change():
    """A changed digest means that a released recipe draws other views; such a change needs a new op name."""
    digests = {}
    for text in ("rrc", "cifar?padding=300", EVERYTHING, "center", "rrc?aa=ta_wide&size=32&vflip=0.5"):
        digest = hashlib.sha256()
        for spec, values in zip(parse_recipe(text).arrays(), draw(text).values(), strict=True):
            digest.update(values.astype(np.dtype(spec.dtype).newbyteorder("<")).tobytes())
        digests[text] = digest.hexdigest()[:16]
    assert digests == DIGESTS


DIGESTS = {
    "center": "756d22b68ab34e40",
    "cifar?padding=300": "968c8a5e14341642",
    "rrc": "5d82e1432244cb4f",
    "rrc?aa=ta_wide&size=32&vflip=0.5": "517d289e27d736a5",
    EVERYTHING: "8f8c65409d285d92",
}


def test_purposes_never_share_a_counter(monkeypatch):
    """Two steps that used the same random words would be dependent; each (purpose, index) is used by one step only."""
    used = []

    def recording(seed, view, rows, purpose, index=0):
        used.append((purpose, index))
        return draw_words(seed, view, rows, purpose, index)

    monkeypatch.setattr("redistill.views.draw.draw_words", recording)
    draw(rows=np.arange(50))
    assert len(used) == len(set(used))
