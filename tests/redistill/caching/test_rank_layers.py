"""The ranking of layers: which layers, which images, and the quality of what the network really computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from redistill_cache.errors import Refused, UsageError
from torch import nn

from redistill.caching import cache_teacher
from redistill.caching import rank_layers as module
from redistill.caching.layer_quality import layer_quality
from redistill.caching.rank_layers import MOST_VALUES, balanced_rows, items_of_containers, rank_layers, shrink
from redistill.models import open_model
from redistill.sources.open_source import open_source
from tests.image_source import ImageSource
from tests.stage1 import DATA, TEACHER, cache_options, file_hashes, five_class_options, odd_teacher

BLOCKS = ["layer1.2", "layer1.3", "layer2.2", "layer2.3", "layer3.2", "layer3.3", "penultimate"]


def images_of(data: str) -> tuple[torch.Tensor, np.ndarray]:
    """The images themselves, which the central crop of images of 32 px leaves as they are."""
    source = open_source(data)
    samples = [source.sample(i) for i in range(len(source))]
    pixels = torch.stack([torch.from_numpy(np.array(sample.payload)).permute(2, 0, 1) for sample in samples])
    return pixels, np.array([sample.label for sample in samples])


def test_the_qualities_are_those_of_the_outputs_of_the_network(tmp_path: Path):
    options = cache_options(tmp_path / "a.zarr")
    ranking = rank_layers(options)
    assert [item.layer for item in ranking.layers] == BLOCKS
    pixels, labels = images_of(DATA)
    model = open_model(TEACHER)
    network, outputs = model.module.eval(), {}
    for name in ("layer1.3", "layer3.2", "avgpool"):
        network.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output.detach().clone()})
        )
    with torch.no_grad():
        network(model.normalise()(pixels))
    by_name = {item.layer: item for item in ranking.layers}
    for layer, output in ("layer1.3", "layer1.3"), ("layer3.2", "layer3.2"), ("penultimate", "avgpool"):
        found, expected = by_name[layer], outputs[output]
        whole = layer_quality(expected.flatten(1).numpy(), labels)
        pooled = layer_quality(expected.mean((2, 3)).numpy(), labels)
        assert tuple(found.quality) == pytest.approx(tuple(whole), rel=1e-4), layer
        assert tuple(found.pooled) == pytest.approx(tuple(pooled), rel=1e-4), layer
    assert by_name["layer1.3"].shape == (32, 16, 16)
    assert (ranking.images, ranking.classes) == (61, 10)
    ranks = {item.rank: item.quality.q for item in ranking.layers}
    assert [ranks[k] for k in range(1, 8)] == sorted(ranks.values(), reverse=True)
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_the_views_and_the_batches_do_not_change_it(tmp_path: Path):
    """The pilot is not augmented, whatever the archive's views are."""
    plain = rank_layers(cache_options(tmp_path / "a.zarr", recipe="center"))
    mixed = rank_layers(cache_options(tmp_path / "a.zarr", recipe="rrc?mixup=0.8&hflip=0.5", views=5, batch_size=32))
    for one, other in zip(plain.layers, mixed.layers, strict=True):
        assert tuple(one.quality) == pytest.approx(tuple(other.quality), rel=1e-4)


def test_signals_say_which_layers_are_ranked(tmp_path: Path):
    ranking = rank_layers(cache_options(tmp_path / "a.zarr", signals=("layer3", "layer2.3.conv1")))
    assert [item.layer for item in ranking.layers] == ["layer3", "layer2.3.conv1"]
    with pytest.raises(UsageError, match="did you mean layer3"):
        rank_layers(cache_options(tmp_path / "a.zarr", signals=("layer9",)))


def test_an_archive_that_exists_changes_nothing(tmp_path: Path):
    options = cache_options(tmp_path / "a.zarr", signals=("logits", "layer3", "penultimate"))
    before = rank_layers(replace(options, signals=("logits",)))
    cache_teacher(options)
    files = file_hashes(options.out)
    assert rank_layers(replace(options, signals=("logits",))) == before
    assert file_hashes(options.out) == files


@pytest.mark.parametrize(
    ("network", "first", "last", "count"),
    [
        ("torchvision:resnet18", "layer1.0", "layer4.1", 8),
        ("torchvision:vit_b_16?size=32", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11", 12),
        ("torchvision:convnext_tiny", "features.0", "features.7.2", 19),
        ("cifar:resnet8x4", "layer1.0", "layer3.0", 3),
    ],
)
def test_the_blocks_of_common_networks(network: str, first: str, last: str, count: int):
    separator = "&" if "?" in network else "?"
    blocks = list(items_of_containers(open_model(f"{network}{separator}num_classes=5").module))
    assert (blocks[0], blocks[-1], len(blocks)) == (first, last, count)


# -- images -----------------------------------------------------------------------------------------------------------


def test_the_pilot_is_balanced_and_bounded():
    labels = np.repeat(np.arange(20), np.arange(1, 21) * 10)
    rows = balanced_rows(labels, 600)
    counts = np.bincount(labels[rows], minlength=20)
    assert counts.tolist() == [10, 20, *[30] * 18]
    assert len(set(rows.tolist())) == len(rows)
    assert (np.diff(rows[labels[rows] == 19]) > 1).all()  # spread over the class
    few = balanced_rows(labels, 40)  # fewer classes, not fewer than five images of each
    assert np.bincount(labels[few])[np.unique(labels[few])].tolist() == [5] * 8
    assert len(balanced_rows(np.repeat([0, 1], 3000), 5000)) == 1000


def test_unlabelled_images_and_classes_of_one_image_are_left_out():
    labels = np.array([-1, 3, 3, 5, 0, 0, -1, 0])
    assert balanced_rows(labels, 5000).tolist() == [4, 5, 7, 1, 2]


def test_what_does_not_fit_into_memory_is_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = five_class_options(tmp_path / "a.zarr")
    values = 16 * 16 * 16 + 32 * 8 * 8 + 64 * 4 * 4 + 64
    monkeypatch.setattr(module, "MEMORY", 4 * values * 40 + 1)
    assert rank_layers(options).images == 40
    monkeypatch.setattr(module, "MEMORY", 4 * values * 9)
    with pytest.raises(Refused, match=r"4 layers take .* for an image, .* fewer with --signals"):
        rank_layers(options)


def test_large_maps_are_max_pooled():
    maps = torch.randn(2, 20, 150, 150, generator=torch.Generator().manual_seed(0))
    expected = maps.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)).flatten(1)
    assert torch.equal(shrink(maps), expected)
    assert torch.equal(shrink(maps.permute(0, 2, 3, 1)), expected)
    tokens = torch.randn(2, 600, 768, generator=torch.Generator().manual_seed(0))
    assert shrink(tokens).shape == (2, 768 * 300)
    assert torch.equal(shrink(tokens)[0].view(768, 300)[:, 7], tokens[0, 14:16].amax(0))
    assert torch.equal(shrink(maps[:, :, :64, :64]), maps[:, :, :64, :64].flatten(1))
    assert shrink(torch.zeros(1, 2 * MOST_VALUES)).shape == (1, 2 * MOST_VALUES)  # rows have nothing to pool


# -- refusals ---------------------------------------------------------------------------------------------------------


class Labelled(ImageSource):
    """Images with these labels."""

    def __init__(self, labels: list[int]) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
        super().__init__(list(pixels))
        self.labels = labels

    def sample(self, i: int):
        sample = super().sample(i)
        return type(sample)(sample.payload, self.labels[i], sample.key)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1] * 8, "found 0 among 8 images, 0 of them labelled"),
        ([2] * 8, "found 1 among 8 images, 8 of them labelled"),
        ([0, 1, 2, 3, 4, -1], "found 0 among 6 images, 5 of them labelled"),
    ],
)
def test_images_without_two_classes_of_two_are_refused(tmp_path: Path, labels: list[int], message: str):
    with pytest.raises(Refused, match=message) as caught:
        rank_layers(five_class_options(tmp_path / "a.zarr", data=Labelled(labels)))
    assert "\n" not in str(caught.value)


def test_a_network_that_cannot_be_traced_or_has_no_blocks_is_refused(tmp_path: Path):
    with pytest.raises(Refused, match="cannot be traced"):
        rank_layers(five_class_options(tmp_path / "a.zarr", teacher=odd_teacher("Branching"), allow_python=True))
    with pytest.raises(Refused, match=r"no blocks were found in .* name the layers to rank with --signals"):
        rank_layers(five_class_options(tmp_path / "a.zarr", teacher=odd_teacher("NoBlocks"), allow_python=True))


def test_layers_that_are_not_finite_are_refused(tmp_path: Path):
    with pytest.raises(Refused, match="NaN or infinity"):
        rank_layers(five_class_options(tmp_path / "a.zarr", teacher=odd_teacher("NanFeatures"), allow_python=True))


def test_the_blocks_are_modules_of_the_network():
    network = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "stages": nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU())})
    assert list(items_of_containers(network)) == ["stages.0.0", "stages.1"]
