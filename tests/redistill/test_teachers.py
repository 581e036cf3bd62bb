"""The frozen teacher: its outputs, what is refused, and that correct teachers are never refused."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from redistill_cache.errors import RedistillError, Refused, UsageError
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from redistill.devices import TF32_SWITCHES, pick_amp, pick_device, refuse_out_of_memory
from redistill.models import OpenedModel, open_model
from redistill.signals import pool
from redistill.teachers import Teacher, check_teacher

CPU = torch.device("cpu")
# Four families: residual, pre-activation, without shortcuts, and the demo's.
ARCHITECTURES = ["cifar:resnet8", "cifar:wrn_10_1", "cifar:vgg8", "demo:large"]


def images(n: int = 6, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def opened(spec: str = "demo:tiny", num_classes: int = 5) -> OpenedModel:
    """Random weights with running statistics as after some training: the initial ones would hide mistakes."""
    model = open_model(f"{spec}?num_classes={num_classes}&weights=random")
    noise = torch.Generator().manual_seed(1)
    for part in model.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.3, generator=noise)
            part.running_var.uniform_(0.5, 1.5, generator=noise)
    return model


def teacher(model: OpenedModel | None = None, **options) -> Teacher:
    return Teacher(model or opened(), device=CPU, **options)


def of_module(module: nn.Module, num_classes: int = 5) -> OpenedModel:
    return replace(opened(), module=module, num_classes=num_classes)


def test_a_teacher_returns_the_outputs_of_its_module():
    model = opened("cifar:resnet8", 9)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.mean, model.std))
    with torch.no_grad():
        expected = model.module.eval()((images() / 255 - mean) / std)
    outputs = teacher(model)(images())
    assert outputs.keys() == {"logits"}
    assert outputs["logits"].dtype == torch.float32
    torch.testing.assert_close(outputs["logits"], expected, rtol=1e-4, atol=1e-5)


def test_normalisation_equals_torchvisions():
    from torchvision.transforms.v2 import functional as V

    model = opened("cifar:resnet8")
    expected = V.normalize(V.to_dtype(images(), torch.float32, scale=True), list(model.mean), list(model.std))
    normalised = model.normalise()(images())
    torch.testing.assert_close(normalised, expected, rtol=0, atol=2e-6)
    last = model.normalise()(images().contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, normalised)
    assert not model.normalise().state_dict()


def test_outputs_can_be_used_in_a_students_loss():
    student = nn.Linear(5, 5)
    logits = teacher()(images())["logits"]
    F.mse_loss(student(logits), logits).backward()
    assert not logits.requires_grad
    assert student.weight.grad is not None


def test_options_do_not_change_the_logits_beyond_rounding():
    plain = teacher(channels_last=False)(images())["logits"]
    torch.testing.assert_close(teacher(channels_last=True)(images())["logits"], plain, rtol=1e-4, atol=1e-5)
    half = teacher(amp=torch.bfloat16)(images())["logits"]
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < 0.1 * plain.std()


@pytest.mark.parametrize("layers", [(), ("penultimate",)])
def test_the_final_layer_runs_in_float32_whatever_the_precision(layers: tuple[str, ...]):
    """Rounded logits have ties at the top, and errors that no basis of few directions holds."""
    mixed = teacher(opened("cifar:resnet8", 40), amp=torch.bfloat16, layers=layers)
    logits = mixed(images(64))["logits"]
    assert not torch.equal(logits, logits.bfloat16().float())
    assert mixed.precision == "bfloat16, final layer float32"
    exact = teacher(opened("cifar:resnet8", 40))
    assert exact.precision == "float32"
    assert (logits - exact(images(64))["logits"]).abs().max() < 0.05 * logits.std()


class NoFinalLayer(nn.Module):
    """Logits that are not the output of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


def test_without_a_final_linear_layer_the_recorded_precision_is_that_of_the_network():
    mixed = teacher(of_module(NoFinalLayer()), amp=torch.bfloat16)
    assert mixed(images())["logits"].dtype == torch.float32
    assert mixed.precision == "bfloat16"


class SeesTF32(NoFinalLayer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = [getattr(place, name) for place, name, _ in TF32_SWITCHES]
        return super().forward(x)


def test_float32_is_not_rounded_to_tf32():
    before = [getattr(place, name) for place, name, _ in TF32_SWITCHES]
    module = SeesTF32()
    teacher(of_module(module))(images())
    assert module.seen == [off for _, _, off in TF32_SWITCHES]
    assert [getattr(place, name) for place, name, _ in TF32_SWITCHES] == before
    assert before != module.seen, "torch rounds convolutions by default"


def test_a_model_without_weights_is_refused():
    with pytest.raises(Refused, match="has no weights; add weights=PATH"):
        teacher(open_model("demo:tiny?num_classes=3"))


@pytest.mark.parametrize("pixels", [images().float(), images()[0], images()[:, :1]], ids=["float", "one", "grey"])
def test_pixels_of_another_dtype_or_shape_are_refused(pixels: torch.Tensor):
    with pytest.raises(UsageError, match="expected uint8 pixels"):
        teacher()(pixels)


# -- layers and head ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["cifar:resnet8", "torchvision:squeezenet1_1"])
def test_layers_are_pooled_and_do_not_change_the_logits(spec: str):
    layer = "layer3" if spec == "cifar:resnet8" else "features.12"
    pixels = images(3, 64)
    plain = teacher(opened(spec))(pixels)["logits"]
    outputs = teacher(opened(spec), layers=(layer,))(pixels)
    assert torch.equal(outputs["logits"], plain)
    means: list[torch.Tensor] = []
    hooked = opened(spec)
    hooked.module.get_submodule(layer).register_forward_hook(lambda _m, _i, out: means.append(out.mean((2, 3))))
    teacher(hooked)(pixels)
    torch.testing.assert_close(outputs[layer], means[0])


@pytest.mark.parametrize("layers", [("penultimate",), ("penultimate", "layer2"), ("logits", "layer2", "penultimate")])
def test_penultimate_and_head_give_the_logits(layers: tuple[str, ...]):
    one = teacher(opened("cifar:resnet8"), layers=layers)
    outputs = one(images())
    assert list(outputs) == list(one.signals)
    head = one.head()
    assert head is not None
    torch.testing.assert_close(outputs["penultimate"] @ head.weight.T + head.bias, outputs["logits"])
    assert torch.equal(outputs["logits"], teacher(opened("cifar:resnet8"))(images())["logits"])


class Returns(nn.Module):
    """A network whose output is wrapped."""

    def __init__(self, wrap: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.inner, self.wrap = opened().module, wrap

    def forward(self, x: torch.Tensor) -> object:
        return self.wrap(self.inner(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"loss": None, "logits": logits, "aux": 2 * logits},
        lambda logits: SimpleNamespace(logits=logits, hidden_states=None),
        lambda logits: UserDict(logits=logits),
    ],
    ids=["dict", "object", "mapping"],
)
def test_logits_are_taken_from_the_outputs_of_other_libraries(wrap: Callable[[torch.Tensor], object]):
    """Hugging Face's models return an object that is a mapping with attributes."""
    plain = teacher(opened())
    one = teacher(of_module(Returns(wrap)), layers=("penultimate",))
    assert torch.equal(one(images())["logits"], plain(images())["logits"])
    head = one.head()
    assert head is not None
    assert torch.equal(head.weight, opened().module.get_parameter("fc.weight"))
    with pytest.raises(Refused, match="does not return a tensor; use penultimate"):
        teacher(of_module(Returns(wrap)), layers=("inner.layer2",))


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda logits: {"out": logits, "aux": logits}, "found dict with the keys out, aux"),
        (lambda logits: (logits, logits), "found tuple"),
        (lambda logits: SimpleNamespace(logits=[logits]), "found SimpleNamespace"),
    ],
)
def test_other_outputs_are_refused_in_one_line(wrap: Callable[[torch.Tensor], object], found: str):
    with pytest.raises(Refused, match=found):
        teacher(of_module(Returns(wrap)))(images())


def test_a_head_is_found_only_if_its_output_is_the_logits():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()), nn.Linear(48, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.fc(self.body(x))

    assert teacher(of_module(Scaled())).head() is None
    with pytest.raises(Refused, match="one final linear layer"):
        teacher(of_module(Scaled()), layers=("penultimate",))
    without_bias = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5, bias=False))
    head = teacher(of_module(without_bias)).head()
    assert head is not None
    assert head.bias.tolist() == [0] * 5
    assert teacher(opened("torchvision:squeezenet1_1")).head() is None


def test_tokens_and_maps_with_channels_last_are_pooled():
    vit = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=5)
    assert teacher(of_module(vit), layers=("encoder.ln",))(images(2))["encoder.ln"].shape == (2, 24)
    maps = torch.rand(2, 7, 7, 5)
    torch.testing.assert_close(pool(maps, "x"), pool(maps.permute(0, 3, 1, 2), "x"))
    with pytest.raises(Refused, match="square map"):
        pool(torch.rand(2, 3, 4, 5), "x")


@pytest.mark.parametrize(
    ("layer", "message"),
    [("layer9", "did you mean layer"), ("zzz", "known: .*avgpool"), ("fc", "is the network's output")],
)
def test_an_unknown_layer_is_refused_in_one_line(layer: str, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        teacher(layers=(layer,))
    assert "\n" not in str(caught.value)


def test_a_layer_is_the_same_whichever_layers_are_stored_beside_it():
    """A stage and its last block have one output."""
    alone = {layer: teacher(layers=(layer,))(images())[layer] for layer in ("layer2", "layer2.2", "layer3")}
    for layers in (("layer2", "layer2.2", "layer3"), ("layer3", "layer2.2", "penultimate", "layer2")):
        rows = teacher(layers=layers)(images())
        for layer in {*layers} & {*alone}:
            assert torch.equal(rows[layer], alone[layer]), (layer, layers)


def test_a_network_that_cannot_be_traced_still_has_penultimate():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()), nn.Linear(48, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.body(x) if x.sum() > 0 else self.body(-x))

    assert teacher(of_module(Branching()), layers=("penultimate",))(images())["penultimate"].shape == (6, 48)
    with pytest.raises(Refused, match="cannot be traced"):
        teacher(of_module(Branching()), layers=("body",))


# -- the check ---------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A correct network inside a faulty one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class AlwaysTraining(Wrapped):
    def train(self, mode: bool = True) -> nn.Module:
        del mode
        return super().train(True)


class AlwaysDropping(Wrapped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.inner(x), 0.1, training=True)


class Counting(Wrapped):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x)


class Overflowing(Wrapped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.inner(x)
        return torch.where(logits == logits.max(), torch.inf, logits)


def batch_statistics(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
    return module


FAULTS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "train mode": (AlwaysTraining, "train mode"),
    "dropout": (AlwaysDropping, "give different logits"),
    "batch statistics": (batch_statistics, "other images of the batch"),
    "own state": (Counting, "changes the teacher's state: .*calls"),
    "overflow": (Overflowing, "NaN or infinity for 1 of 6"),
}


@pytest.mark.parametrize("spec", ARCHITECTURES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_teacher_is_refused(spec: str, fault: str):
    make_faulty, message = FAULTS[fault]
    model = opened(spec)
    faulty = teacher(replace(model, module=make_faulty(model.module)))
    with pytest.raises(Refused, match=message) as caught:
        check_teacher(faulty, images())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", ARCHITECTURES)
def test_a_correct_teacher_is_never_refused(spec: str, amp: torch.dtype | None):
    for channels_last in (True, False):
        check, _ = check_teacher(teacher(opened(spec), amp=amp, channels_last=channels_last), images(8))
        assert check.images == 8
        assert check.repeat == 0
        assert check.relative_batch_difference < (1e-4 if amp is None else 0.05)


def test_a_large_batch_is_run_once_and_some_of_it_again():
    """Its outputs can be stored, so a small archive needs no other pass over them."""
    module, sizes = opened().module, []
    checked = teacher(of_module(module))
    module.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    check, outputs = check_teacher(checked, images(40))
    assert check.images == 32
    assert sizes == [40, 2, 30, 2, 30]
    assert torch.equal(outputs["logits"], checked(images(40))["logits"])


def test_the_difference_between_batch_compositions_is_measured():
    class BatchSizeDependent(Wrapped):
        """Logits depend a little on the size of the batch."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 1e-4 * len(x)

    check, _ = check_teacher(teacher(of_module(BatchSizeDependent(opened().module))), images(6))
    assert check.batch_difference == pytest.approx(4e-4, rel=1e-2)  # a batch of six against one of two


def test_the_wrong_number_of_classes_is_refused():
    with pytest.raises(Refused, match=r"expected logits \[6, 7\] .* found \[6, 5\]"):
        teacher(replace(opened(), num_classes=7))(images())


# -- devices and memory ------------------------------------------------------------------------------------------------


def test_out_of_memory_suggests_a_batch_size():
    class Greedy(Wrapped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + torch.empty(len(x), 1 << 50).sum()

    greedy = teacher(of_module(Greedy(opened().module)))
    with pytest.raises(Refused, match="cpu ran out of memory on a batch of 6; try --batch-size 3"):
        greedy(images())
    with pytest.raises(Refused, match="not even one image fits"):
        greedy(images(1))
    with pytest.raises(Refused, match="try --batch-size 64"), refuse_out_of_memory(128, CPU):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), refuse_out_of_memory(128, CPU):
        raise RuntimeError("something else")


def test_devices_are_picked_by_name():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_amp(CPU, None) is None
    assert pick_amp(CPU, False) is None
    assert pick_amp(CPU, True) == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "unknown device"), ("cuda:99", "was requested, but"), ("meta", "not supported")]
)
def test_a_missing_device_is_refused_in_one_line(device: str, message: str):
    with pytest.raises(RedistillError, match=message) as caught:
        pick_device(device)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(Refused, match="finds no GPU; use --device cpu"):
        pick_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_teacher_on_a_gpu():
    device = pick_device("cuda")
    for amp in (None, pick_amp(device, None)):
        on_gpu = Teacher(opened("cifar:resnet8"), device=device, amp=amp, layers=("penultimate",))
        check, _ = check_teacher(on_gpu, images(8))
        exact = teacher(opened("cifar:resnet8"))(images(8))["logits"]
        assert (on_gpu(images(8))["logits"].cpu() - exact).abs().max() < 0.1 * exact.std()
        assert check.relative_batch_difference < 0.1


@pytest.mark.slow  # a compiler runs for half a minute
def test_a_compiled_teacher_has_the_same_logits():
    plain = teacher(opened("demo:large"))(images())["logits"]
    compiled = teacher(opened("demo:large"), compile=True, layers=("penultimate", "layer2"))
    torch.testing.assert_close(compiled(images())["logits"], plain, rtol=1e-4, atol=1e-5)
    assert check_teacher(compiled, images())[0].repeat == 0
