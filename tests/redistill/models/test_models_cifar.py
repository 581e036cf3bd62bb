"""CIFAR networks of the literature: parameter counts, and names of published checkpoints; the demo's networks."""

from __future__ import annotations

import hashlib

import pytest
import torch
from redistill_cache.errors import UsageError

from redistill.models import cifar, demo

# Parameters for 100 classes, counted by instantiating the networks of CRD's public code (HobbitLong/RepDistiller) and,
# for ResNet18, of megvii-research/mdistiller; and the first 16 hex digits of sha256 over repr of the sorted
# [(name, shape), ...] of their state_dicts. Their checkpoints load only if names and shapes are equal.
PUBLISHED = {
    "resnet8": (83_892, "39c6acc1ba29ecf6"),
    "resnet14": (181_108, "7454acde5e53f392"),
    "resnet20": (278_324, "cf710a76243f2b8c"),
    "resnet32": (472_756, "4c790dcab5eb9028"),
    "resnet44": (667_188, "5f33431aeb46da76"),
    "resnet56": (861_620, "5d442f2912af2aaf"),
    "resnet110": (1_736_564, "8f50cd07f82e75cb"),
    "resnet8x4": (1_233_540, "6cfd514df58b28af"),
    "resnet32x4": (7_433_860, "86c2084be49fc2a3"),
    "ResNet18": (11_220_132, "691c4b32b04b1a42"),
    "ResNet50": (23_705_252, "13bb09321c5b6498"),
    "wrn_16_1": (180_916, "65c1b36538de17ed"),
    "wrn_16_2": (703_284, "26f9310b77cb672d"),
    "wrn_40_1": (569_780, "80b07f9efab3be01"),
    "wrn_40_2": (2_255_156, "961658504d5ec9da"),
    "vgg8": (3_965_028, "0a387e34dd845714"),
    "vgg11": (9_277_284, "88383b98d4479b4b"),
    "vgg13": (9_462_180, "86b9c338b9dbc6c7"),
    "vgg16": (14_774_436, "817ffe596a8f2690"),
    "vgg19": (20_086_692, "5a8e42f17ae643c5"),
    "MobileNetV2": (812_836, "4f50e9ebb8f90a54"),
    "ShuffleV1": (949_258, "0d87b45d0a9e89ab"),
    "ShuffleV2": (1_355_528, "d2c6860f03cc1a5d"),
}


def meta(name: str, num_classes: int = 100) -> torch.nn.Module:
    with torch.device("meta"):
        return cifar.build(name, num_classes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_names_are_those_of_the_literature(name: str):
    network = meta(name)
    count, names = PUBLISHED[name]
    assert sum(p.numel() for p in network.parameters()) == count
    state = sorted((key, tuple(value.shape)) for key, value in network.state_dict().items())
    assert hashlib.sha256(repr(state).encode()).hexdigest()[:16] == names


def test_every_network_is_in_the_table():
    assert set(PUBLISHED) == set(cifar.NAMES)


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet8x4", "wrn_16_1", "wrn_10_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"]
)
def test_every_parameter_of_a_network_gets_a_gradient(name: str):
    torch.manual_seed(0)
    network = cifar.build(name, 7)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 6])
    loss = torch.nn.functional.cross_entropy(network(images), labels)
    loss.backward()
    assert loss.isfinite()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50", "resnet32x4", "vgg19"])
def test_a_large_network_has_the_right_shape(name: str):
    with torch.device("meta"):
        assert cifar.build(name, 100)(torch.empty(2, 3, 32, 32)).shape == (2, 100)


def test_vgg_pools_once_more_for_larger_images():
    with torch.device("meta"):
        network = cifar.build("vgg8", 10, input_size=64)
        sides = []
        network.get_submodule("block4").register_forward_hook(lambda _m, _i, out: sides.append(out.shape[-1]))
        network(torch.empty(1, 3, 64, 64))
    assert sides == [4]


def test_names_are_not_case_sensitive():
    assert cifar.canonical("shufflev2") == "ShuffleV2"
    assert cifar.canonical("WRN-16-2") == "wrn_16_2"
    assert cifar.canonical("wrn_28_10") == "wrn_28_10"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet9", "did you mean"),
        ("wrn_17_2", r"D = 6n \+ 4"),
        ("wrn_16_0", "K >= 1"),
        ("wrn_16_x", "unknown network"),
    ],
)
def test_an_unknown_name_is_refused_in_one_line(name: str, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        cifar.build(name, 10)
    assert "\n" not in str(caught.value)


def test_pre_activation_shortcuts_start_from_the_activated_input():
    torch.manual_seed(0)
    block = meta("wrn_16_2").get_submodule("block1.layer.0").to_empty(device="cpu")
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data = torch.rand_like(tensor.float()).to(tensor.dtype)
    block.eval()
    torch.nn.init.zeros_(block.get_submodule("conv2").weight)
    x = torch.randn(1, 16, 8, 8)
    active = torch.relu(block.get_submodule("bn1")(x))
    torch.testing.assert_close(block(x), block.get_submodule("convShortcut")(active))


def test_demo_networks_are_small_and_ordered():
    counts = {name: sum(p.numel() for p in demo.build(name, 10).parameters()) for name in demo.NAMES}
    assert counts == {"tiny": 6418, "small": 24346, "large": 482730}
    for name in demo.NAMES:
        assert demo.build(name, 10)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["demo:large", "resnet8x4"])
def test_channels_last_does_not_change_the_output(name: str):
    torch.manual_seed(0)
    network = (demo.build("large", 10) if name == "demo:large" else cifar.build(name, 10)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = network(x)
        last = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-4)
