"""Rendered pixels against torchvision's own transforms, with the same parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from redistill_cache.errors import Damaged, UsageError
from torchvision.transforms import InterpolationMode, v2

from redistill.views import draw_params, parse_recipe, render_view, render_views
from redistill.views.ops import BINS, OPERATIONS, apply_operation, rand_magnitudes, wide_magnitudes
from redistill.views.recipe import EDGE_UNIT, JITTER_UNIT, WEIGHT_UNIT, edge_pixels
from redistill.views.render import ORDERS, row_params

# torchvision's names, in the order of our numbers.
TORCHVISION = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Waves, an edge and a little noise: every operation changes it."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + c) + seed) + np.cos(y / (5 - c)) + (x > width // 2) for c in range(3)]
    pixels = 110 + 45 * np.stack(waves) + random.normal(0, 8, (3, height, width))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


IMAGE = picture(120, 150)
ROWS = np.arange(24)


def views(text: str, rows: np.ndarray = ROWS, image: torch.Tensor = IMAGE):
    """For each row its parameters and its view."""
    recipe = parse_recipe(text)
    sizes = np.tile(image.shape[1:], (len(rows), 1))
    params = draw_params(recipe, 7, 1, rows, sizes, 1000)
    for position in range(len(rows)):
        one = row_params(params, position)
        yield one, render_view(image, one, recipe)


def crop_as_torchvision(params, recipe_size=64, interpolation="bilinear", antialias=True):
    transform = v2.RandomResizedCrop(recipe_size, interpolation=InterpolationMode(interpolation), antialias=antialias)
    box = dict(zip(("top", "left", "height", "width"), params["crop"].tolist(), strict=True))
    return transform.transform(IMAGE, box)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("antialias", [True, False])
def test_resized_crops_and_flips(interpolation, antialias):
    text = f"rrc?size=64&vflip=0.5&interpolation={interpolation}&antialias={antialias}"
    flips = set()
    for params, view in views(text):
        expected = crop_as_torchvision(params, 64, interpolation, antialias)
        flip = int(params["flip"])
        expected = v2.functional.horizontal_flip(expected) if flip & 1 else expected
        expected = v2.functional.vertical_flip(expected) if flip & 2 else expected
        flips.add(flip)
        assert torch.equal(view, expected)
    assert flips == {0, 1, 2, 3}


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_padded_crops(mode):
    image = picture(32, 32)
    padded = v2.Pad(4, padding_mode=mode)(image)
    for params, view in views(f"cifar?hflip=0&padding_mode={mode}", image=image):
        top, left, _, _ = params["crop"]
        assert torch.equal(view, padded[:, top + 4 : top + 36, left + 4 : left + 36])


def test_color_jitter():
    transform = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    orders = set()
    for params, view in views("rrc?size=64&hflip=0&color_jitter=0.4,0.4,0.4,0.1&color_jitter_prob=0.7"):
        order, *factors = params["jitter"].tolist()
        brightness, contrast, saturation, hue = (factor / JITTER_UNIT for factor in factors)
        expected = crop_as_torchvision(params)
        orders.add(order)
        if order >= 0:
            drawn = {"brightness_factor": brightness, "contrast_factor": contrast}
            drawn |= {"saturation_factor": saturation, "hue_factor": hue, "fn_idx": torch.tensor(ORDERS[order])}
            expected = transform.transform(expected, drawn)
        assert torch.equal(view, expected)
    assert len(orders) > 8
    assert -1 in orders


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("aa", ["rand-m9-n3", "ta_wide"])
def test_augment_operations(aa, interpolation):
    transform = v2.RandAugment()
    mode = InterpolationMode(interpolation)
    seen = set()
    for params, view in views(f"rrc?size=64&hflip=0&aa={aa}&aa_interpolation={interpolation}", rows=np.arange(60)):
        expected = crop_as_torchvision(params)
        for number, stored in params["ops"].tolist():
            name = OPERATIONS[number]
            unit = {"rotate": 2**7, "posterize": 1, "solarize": 255 * 2**7}.get(name, 2**14)
            magnitude = stored / unit * (64 if name.startswith("translate") else 1)
            if name.startswith("translate"):
                assert magnitude == pytest.approx(round(magnitude), abs=0.01)
                magnitude = round(magnitude)
            expected = transform._apply_image_or_video_transform(
                expected, TORCHVISION[number], magnitude, interpolation=mode, fill=transform._fill
            )
            seen.add(name)
        assert torch.equal(view, expected)
    assert len(seen) > 10


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize(
    ("table", "transform"), [(rand_magnitudes, v2.RandAugment), (wide_magnitudes, v2.TrivialAugmentWide)]
)
def test_magnitudes_show_the_pixels_that_torchvision_shows(size, table, transform):
    """Every operation at every magnitude of torchvision's own table.

    The stored number is rounded, and torchvision's own is a float32: an enhanced pixel may land on the other side of a
    rounding, a sheared row on the other side of a tie, a solarized level on the other side of its own threshold.
    """
    image = picture(size, size)
    stored = table(size)
    space = transform._AUGMENTATION_SPACE
    assert {TORCHVISION.index(name) for name in space} == set(range(len(OPERATIONS)))
    for number, name in enumerate(TORCHVISION):
        magnitudes = space[name][0](BINS, size, size)
        for m in range(0, BINS, 1 if size == 32 else 6):
            magnitude = 0.0 if magnitudes is None else float(magnitudes[m])
            if name.startswith("Translate") and abs(magnitude - round(magnitude)) < 1e-5:
                magnitude = round(magnitude)  # float32 makes 15.999999 of 16 pixels, and torchvision 15
            expected = transform()._apply_image_or_video_transform(
                image, name, magnitude, interpolation=InterpolationMode.NEAREST, fill={}
            )
            view = apply_operation(image, number, int(stored[number, m]), InterpolationMode.NEAREST)
            differing = (view != expected).float().mean()
            if name in ("Brightness", "Color", "Contrast", "Sharpness"):
                assert (view.int() - expected.int()).abs().max() <= 1, (name, m)
            else:
                assert differing <= {"ShearX": 0.1, "ShearY": 0.1, "Solarize": 0.02}.get(name, 0.0), (name, m)


def test_grayscale_and_blur():
    blurred = 0
    for params, view in views("rrc?size=64&hflip=0&grayscale_prob=0.5&gaussian_blur_prob=0.5&blur_kernel=7"):
        expected = crop_as_torchvision(params)
        expected = v2.functional.rgb_to_grayscale(expected, 3) if params["gray"] else expected
        if params["blur"]:
            blurred += 1
            expected = v2.functional.gaussian_blur(expected, [7, 7], [int(params["blur"]) / 4096] * 2)
        assert torch.equal(view, expected)
    assert 4 < blurred < 20


def test_erasing():
    erased = 0
    for params, view in views("rrc?size=64&hflip=0&reprob=0.5&revalue=9,99,199"):
        expected = crop_as_torchvision(params)
        top, left, bottom, right = (edge_pixels(edge, 64) for edge in params["erase"].tolist())
        if bottom:
            erased += 1
            colour = torch.tensor([9, 99, 199], dtype=torch.uint8)[:, None, None]
            expected = v2.functional.erase(expected, top, left, bottom - top, right - left, colour)
        assert torch.equal(view, expected)
    assert 4 < erased < 20


def render_mixed(text, size=None):
    recipe = parse_recipe(text)
    other = picture(90, 100, seed=1)
    n = 40
    params = draw_params(recipe, 7, 1, np.arange(n), np.tile(IMAGE.shape[1:], (n, 1)), n)
    partners = draw_params(recipe, 7, 1, params["mix_partner"], np.tile(other.shape[1:], (n, 1)), n)
    plain = parse_recipe(text.partition("&")[0])
    for position in range(n):
        mine, theirs = row_params(params, position), row_params(partners, position)
        pair = torch.stack([render_view(IMAGE, mine, plain, size), render_view(other, theirs, plain, size)])
        yield mine, pair, render_view(IMAGE, mine, recipe, size, partner=(other, theirs))


def test_cutmix():
    transform = v2.CutMix(num_classes=10)
    for params, pair, view in render_mixed("rrc?size=64&cutmix=1"):
        top, left, bottom, right = (edge_pixels(edge, 64) for edge in params["mix_box"].tolist())
        drawn = {"box": (left, top, right, bottom), "labels": None, "batch_size": 2}
        assert torch.equal(view, transform.transform(pair, drawn)[0])
        share = 1 - (bottom - top) * (right - left) / 64**2
        assert int(params["mix_weight"]) / WEIGHT_UNIT == pytest.approx(share, abs=1e-5)


def test_mixup_is_torchvisions_to_the_nearest_level():
    transform = v2.MixUp(num_classes=10)
    for params, pair, view in render_mixed("rrc?size=64&mixup=0.4"):
        drawn = {"lam": int(params["mix_weight"]) / WEIGHT_UNIT, "labels": None, "batch_size": 2}
        exact = transform.transform(pair.double(), drawn)[0]
        assert (view.double() - exact).abs().max() <= 0.5 + 1e-9


def test_a_mixed_view_needs_its_partner_and_an_unmixed_one_does_not():
    recipe = parse_recipe("rrc?mixup=1&mixup_prob=0.5")
    params = draw_params(recipe, 0, 0, ROWS, np.tile(IMAGE.shape[1:], (len(ROWS), 1)), 100)
    alone = params["mix_weight"] == WEIGHT_UNIT
    assert 0 < alone.sum() < len(ROWS)
    for position in ROWS:
        if alone[position]:
            render_view(IMAGE, row_params(params, position), recipe, 32)
        else:
            with pytest.raises(UsageError, match=f"row {params['mix_partner'][position]}"):
                render_view(IMAGE, row_params(params, position), recipe, 32)


def test_boxes_cover_the_same_content_at_other_sizes():
    """An erased or mixed box at half the size is the half-size box, to the nearest pixel."""
    recipe = parse_recipe("center?size=128&reprob=1&crop_pct=1&revalue=255")
    black = torch.zeros(3, 140, 140, dtype=torch.uint8)
    params = draw_params(recipe, 0, 0, ROWS, np.tile([140, 140], (len(ROWS), 1)), 100)
    for position in ROWS:
        one = row_params(params, position)
        for side in (32, 64, 96, 256):
            filled = torch.nonzero(render_view(black, one, recipe, side)[0])
            low, high = filled.min(0).values, filled.max(0).values + 1
            edges = torch.cat([low, high]) / side
            np.testing.assert_allclose(edges, one["erase"] / EDGE_UNIT, atol=0.5 / side + 1e-6)


def test_views_at_two_sizes_show_the_same_picture():
    """Every step at once: averages over an 8 x 8 grid agree between 64 and 128 pixels."""
    text = "rrc?size=64&scale=0.5,1&color_jitter=0.4&aa=ta_wide&aa_interpolation=bilinear&gaussian_blur_prob=0.5"
    recipe = parse_recipe(text)
    image = picture(256, 256)
    params = draw_params(recipe, 3, 0, ROWS, np.tile([256, 256], (len(ROWS), 1)), 100)
    for position in ROWS:
        one = row_params(params, position)
        # By definition relative to the pixels: a 3 x 3 kernel, and two that read the histogram of what was rendered.
        if OPERATIONS[int(one["ops"][0, 0])] in ("sharpness", "autocontrast", "equalize"):
            continue
        small, large = (
            torch.nn.functional.adaptive_avg_pool2d(render_view(image, one, recipe, side).float(), 8)
            for side in (64, 128)
        )
        assert (small - large).abs().mean() < 4.0


def test_several_views_of_one_image():
    recipe = parse_recipe("rrc?size=32")
    params = [row_params(draw_params(recipe, 0, view, [5], [IMAGE.shape[1:]], 10), 0) for view in range(4)]
    together = render_views(IMAGE, params, recipe)
    assert together.shape == (4, 3, 32, 32)
    for view in range(4):
        assert torch.equal(together[view], render_view(IMAGE, params[view], recipe))


@pytest.mark.parametrize("text", ["rrc", "cifar?aa=ta_wide&reprob=0.5", "center?size=32&crop_pct=1"])
def test_rendering_is_pure(text):
    """Equal inputs give equal views; the image is not modified, and the view does not share its memory."""
    image = picture(32, 32)
    before = image.clone()
    first, second = ([view for _, view in views(text, image=image)] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()
        one.zero_()
    assert torch.equal(image, before)


def test_channels_last_images_give_the_same_pixels():
    """Decoders return images with interleaved channels; the memory layout must not change the pixels."""
    interleaved = IMAGE.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for text in ("rrc?size=64", "rrc?size=64&interpolation=bicubic", "rrc?size=224&aa=rand"):
        for (_, one), (_, other) in zip(views(text), views(text, image=interleaved), strict=True):
            assert torch.equal(one, other)


DAMAGED = {
    "crop outside": ("rrc", {"crop": [100, 0, 50, 50]}),
    "crop left of the image": ("rrc", {"crop": [0, -1, 50, 50]}),
    "crop is huge": ("rrc", {"crop": [0, 0, 2**31 - 1, 2**31 - 1]}),
    "crop is empty": ("rrc", {"crop": [0, 0, 0, 5]}),
    "crop beyond the padding": ("cifar?padding=4", {"crop": [-5, 0, 32, 32]}),
    "operation unknown": ("rrc?aa=ta_wide", {"ops": [[14, 0]]}),
    "operation negative": ("rrc?aa=ta_wide", {"ops": [[-1, 0]]}),
    "too many bits": ("rrc?aa=ta_wide", {"ops": [[10, 9]]}),
    "negative enhancement": ("rrc?aa=ta_wide", {"ops": [[6, -20000]]}),
    "order unknown": ("rrc?color_jitter=0.4", {"jitter": [24, 0, 0, 0, 0]}),
    "negative brightness": ("rrc?color_jitter=0.4", {"jitter": [0, -5, 0, 0, 0]}),
    "hue beyond a half turn": ("rrc?color_jitter=0,0,0,0.1", {"jitter": [0, 8192, 8192, 8192, 8000]}),
    "erased box inside out": ("rrc?reprob=0.5", {"erase": [900, 0, 100, 50]}),
    "erased box outside": ("rrc?reprob=0.5", {"erase": [0, 0, 65535, 65535]}),
}


@pytest.mark.parametrize(("text", "change"), DAMAGED.values(), ids=DAMAGED.keys())
def test_parameters_that_no_recipe_draws_are_damage(text, change):
    recipe = parse_recipe(text)
    params = row_params(draw_params(recipe, 0, 0, [0], [IMAGE.shape[1:]], 10), 0)
    damaged = {name: np.array(change.get(name, values), np.asarray(values).dtype) for name, values in params.items()}
    with pytest.raises(Damaged):
        render_view(IMAGE, damaged, recipe)


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)])
def test_images_are_uint8_rgb(image):
    recipe = parse_recipe("center?size=8")
    with pytest.raises(UsageError, match="uint8 image"):
        render_view(image, row_params(draw_params(recipe, 0, 0, [0], [[8, 8]], 1), 0), recipe)
