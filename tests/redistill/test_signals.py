"""A student's layers: rows with gradient beside the logits, the ends of stages by name, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from redistill_cache.errors import Refused, UsageError
from torch import nn

import redistill
from redistill.models import open_model
from redistill.models.open_model import meta_network
from redistill.signals import HEAD_LOGITS, Signals, Taps, look_into, stage_ends, tap
from redistill.teachers import Teacher

LAYERS = ("layer1", "layer2", "penultimate")


def small(seed: int = 0) -> nn.Module:
    return open_model("demo:small", num_classes=10, seed=seed).module


def batch(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_a_student_and_a_teacher_of_one_network_have_the_same_rows():
    """Layers have the same names and the same values, though a teacher is traced and a student is not."""
    network = small().eval()
    rows = tap(network, LAYERS)(batch())
    expected = Signals(copy.deepcopy(network), LAYERS, "fc")(batch())
    assert {*rows} == {*expected} == {"logits", *LAYERS}
    for name, value in expected.items():
        assert torch.equal(rows[name], value), name


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def test_a_layer_that_the_next_one_changes_in_place():
    """Both sides see the changed output, with the gradient through the change."""
    network = InPlace().eval()
    rows = tap(network, ["conv", "penultimate"])(batch())
    expected = Signals(copy.deepcopy(network), ["conv", "penultimate"], "fc")(batch())
    assert torch.equal(rows["conv"], expected["conv"])
    assert torch.equal(rows["conv"], rows["penultimate"])
    rows["conv"].sum().backward()
    assert network.conv.weight.grad.any()


@pytest.mark.parametrize("spec", ["cifar:wrn_10_1", "cifar:MobileNetV2", "torchvision:resnet18"])
def test_rows_at_the_stage_ends_are_those_of_a_teacher(spec: str):
    network = open_model(spec, num_classes=5).module.eval()
    layers = [*stage_ends(network, batch(2, 64)), "penultimate"]
    rows = tap(network, layers)(batch(2, 64))
    head = look_into(network, (), batch(2, 64)).head
    for name, value in Signals(copy.deepcopy(network), layers, head)(batch(2, 64)).items():
        torch.testing.assert_close(rows[name], value, msg=name)


def test_the_network_is_not_changed():
    network = small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    taps = tap(network, LAYERS)
    assert network.training
    assert {*network.state_dict()} == {*before}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert isinstance(network(batch()), torch.Tensor)
    assert isinstance(taps, redistill.signals.Taps)


def test_gradients_reach_the_layers_before_a_tap_and_no_others():
    taps = tap(small(), ["layer1"])
    taps(batch())["layer1"].sum().backward()
    grads = {name for name, p in taps.network.named_parameters() if p.grad is not None}
    assert grads == {name for name, _ in taps.network.named_parameters() if name.startswith("layer1")}
    assert taps.head is taps.network.fc


def test_logits_of_the_head_are_the_logits_with_another_gradient():
    taps = Taps(small(), (), "fc", outputs=("logits", HEAD_LOGITS))
    rows = taps(batch())
    assert torch.equal(rows["logits"], rows[HEAD_LOGITS])
    rows[HEAD_LOGITS].square().sum().backward()
    assert {name for name, p in taps.network.named_parameters() if p.grad is not None} == {"fc.weight", "fc.bias"}


def test_a_copy_of_taps_has_its_own_rows():
    taps = tap(small(), LAYERS)
    other = copy.deepcopy(taps)
    with torch.no_grad():
        other.network.layer1[0].weight.zero_()
    assert not torch.equal(taps(batch())["layer1"], other(batch())["layer1"])


@pytest.mark.parametrize(
    ("spec", "side", "ends"),
    [
        ("torchvision:resnet18", 64, "layer1 layer2 layer3 layer4"),
        ("torchvision:convnext_tiny", 64, "features.1 features.3 features.5 features.7"),
        ("torchvision:swin_t", 64, "features.1 features.3 features.5 features.7"),
        ("torchvision:mobilenet_v2", 64, "features.1 features.3 features.6 features.13 features.18"),
        ("torchvision:efficientnet_b0", 64, "features.1 features.2 features.3 features.5 features.8"),
        (
            "torchvision:densenet121",
            64,
            "features.denseblock1 features.denseblock2 features.denseblock3 features.denseblock4",
        ),
        (
            "torchvision:vit_b_16",
            64,
            "encoder.layers.encoder_layer_2 encoder.layers.encoder_layer_5 encoder.layers.encoder_layer_8 "
            "encoder.layers.encoder_layer_11",
        ),
        ("cifar:resnet8x4", 32, "layer1 layer2 layer3"),
        ("cifar:ResNet18", 32, "layer1 layer2 layer3 layer4"),
        ("cifar:wrn_16_1", 32, "block1 block2 block3"),
        ("cifar:vgg8", 32, "block0 block1 block2 block4"),
        ("cifar:MobileNetV2", 32, "blocks.1 blocks.2 blocks.4 conv2"),
        ("cifar:ShuffleV1", 32, "layer1 layer2 layer3"),
        ("demo:large", 32, "layer1 layer2 layer3"),
    ],
)
def test_stage_ends(spec: str, side: int, ends: str):
    """Found without memory for weights, as an archive's teacher is looked at."""
    network = meta_network(spec, 10, side)
    assert stage_ends(network, torch.zeros(2, 3, side, side, device="meta")) == tuple(ends.split())


@pytest.mark.parametrize("spec", ["cifar:vgg8", "torchvision:mobilenet_v3_small", "cifar:ShuffleV2", "demo:tiny"])
def test_penultimate_is_what_the_last_layer_sees(spec: str):
    network = open_model(spec, num_classes=7).module.eval()
    taps = tap(network, ["penultimate"])
    rows = taps(batch(2, 64))
    assert torch.equal(taps.head(rows["penultimate"]), rows["logits"])


class Shared(nn.Module):
    """One activation that runs twice, and logits that are not those of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x)))).mean((2, 3))


def test_what_is_refused():
    with pytest.raises(UsageError, match="no layer 'layr1'; did you mean layer1"):
        tap(small(), ["layr1"])
    with pytest.raises(UsageError, match="'relu': expected a tensor once in a forward pass, found 2 outputs"):
        tap(Shared(), ["relu"])
    with pytest.raises(Refused, match="not the output of one final linear layer, so there is no 'penultimate'"):
        tap(Shared(), ["penultimate"])
    with pytest.raises(Refused, match="not the output of one final linear layer"):
        _ = tap(Shared(), ["conv1"]).head


def test_a_teacher_of_the_same_layers_is_unchanged():
    """Teachers still run through a traced network, so that archives keep their bytes."""
    teacher = Teacher(
        open_model("demo:small?weights=random", num_classes=10), device=torch.device("cpu"), layers=("logits", *LAYERS)
    )
    outputs = teacher((batch() * 255).to(torch.uint8))
    assert tuple(outputs) == ("logits", *LAYERS)
