"""Spec strings to models: precedence of options, file headers, published metadata and defaults; required options."""

from __future__ import annotations

import argparse
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from redistill_cache.errors import RedistillError, Refused, UsageError
from torch import nn

import redistill
from redistill.models import open_model, open_weights, save_weights, state_digest
from redistill.models.model_info import CIFAR10, CIFAR100, IMAGENET, ModelInfo


def refusal(text: str, **options) -> str:
    with pytest.raises(RedistillError) as caught:
        open_model(text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_student_uses_the_conventions_of_its_family():
    student = open_model("cifar:resnet8", num_classes=100)
    assert (student.name, student.num_classes, student.input_size) == ("resnet8", 100, 32)
    assert (student.mean, student.std) == CIFAR100
    assert student.weights_digest is None
    assert student.weights_source is None
    assert (open_model("cifar:resnet8?num_classes=10").mean, open_model("demo:tiny?num_classes=3").input_size) == (
        CIFAR10.mean,
        32,
    )
    resnet = open_model("torchvision:resnet18?num_classes=4")
    assert (resnet.mean, resnet.std, resnet.input_size) == (*IMAGENET, None)


def test_options_have_precedence(tmp_path: Path):
    by_options = open_model("demo:tiny?num_classes=4&size=48&mean=0.1,0.2,0.3&std=1,2,3")
    assert (by_options.num_classes, by_options.input_size, by_options.mean, by_options.std) == (
        4,
        48,
        (0.1, 0.2, 0.3),
        (1, 2, 3),
    )
    save_weights(by_options.module, tmp_path / "w.safetensors", by_options.metadata())
    by_header = open_model(f"demo:tiny?weights={tmp_path / 'w.safetensors'}", num_classes=99)
    assert by_header.info == by_options.info
    by_both = open_model(f"demo:tiny?weights={tmp_path / 'w.safetensors'}&norm=half&size=32")
    assert (by_both.mean, by_both.input_size) == ((0.5, 0.5, 0.5), 32)


def test_random_weights_depend_only_on_the_seed():
    torch.manual_seed(1)
    one = open_model("demo:tiny?num_classes=3", seed=5)
    state = torch.random.get_rng_state()
    other = open_model("demo:tiny?num_classes=3", seed=5)
    assert state_digest(one.module.state_dict()) == state_digest(other.module.state_dict())
    assert torch.equal(state, torch.random.get_rng_state())
    third = open_model("demo:tiny?num_classes=3&seed=6", seed=5)
    assert state_digest(one.module.state_dict()) != state_digest(third.module.state_dict())


def test_random_weights_can_be_requested():
    opened = open_model("demo:tiny?num_classes=3&weights=random&seed=4")
    assert opened.weights_source == "random"
    assert opened.weights_digest == state_digest(opened.module.state_dict())
    assert opened.portable_spec == "demo:tiny?num_classes=3"


def test_published_checkpoints_need_no_options(tmp_path: Path):
    module = open_model("cifar:resnet8?num_classes=100").module
    torch.save({"epoch": 240, "model": module.state_dict()}, tmp_path / "ckpt_epoch_240.pth")
    opened = open_model(f"cifar:resnet8?weights={tmp_path / 'ckpt_epoch_240.pth'}")
    assert (opened.num_classes, (opened.mean, opened.std)) == (100, CIFAR100)


@pytest.mark.parametrize("family", ["cifar:resnet8?num_classes=10", "torchvision:squeezenet1_1?num_classes=10"])
def test_the_normalisation_of_a_file_without_a_header_must_be_given(tmp_path: Path, family: str):
    module = open_model(family).module
    torch.save(module.state_dict(), tmp_path / "w.pth")
    text = f"{family.partition('?')[0]}?weights={tmp_path / 'w.pth'}"
    assert "add norm=imagenet" in refusal(text)
    opened = open_model(f"{text}&norm=cifar10")
    # The number of classes is the shape of the last layer, a convolution in SqueezeNet.
    assert (opened.num_classes, opened.mean) == (10, CIFAR10.mean)


def test_torchvision_weights_come_with_their_preprocessing():
    from torchvision.models import get_model_weights

    from redistill.models.libraries import torchvision_info

    info = torchvision_info(get_model_weights("resnet50")["IMAGENET1K_V2"])
    assert info == ModelInfo(
        num_classes=1000, input_size=224, norm=IMAGENET, interpolation="bilinear", resize=232, top1=0.80858
    )
    assert torchvision_info(get_model_weights("vit_b_16")["IMAGENET1K_SWAG_E2E_V1"]).input_size == 384


def test_a_failed_download_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The connection always fails, so that the test does not depend on the machine's network."""

    def closed(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", closed)
    monkeypatch.setattr("torch.hub.urlopen", closed)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = refusal("torchvision:resnet18?weights=DEFAULT")
    assert "cannot download DEFAULT of torchvision:resnet18" in message
    assert "https://download.pytorch.org/models/resnet18" in message


def test_published_weights_are_read_from_torchs_own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A file in torch's cache replaces the download; torch checks its hash only when it downloads."""
    from torchvision.models import get_model, get_model_weights

    weights = get_model_weights("squeezenet1_1")["DEFAULT"]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    module = get_model("squeezenet1_1", weights=None)
    torch.save(module.state_dict(), tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    opened = open_model("torchvision:squeezenet1_1?weights=DEFAULT")
    assert (opened.num_classes, opened.input_size, opened.resize) == (1000, 224, 256)
    assert opened.weights_source == "torchvision:SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert opened.weights_digest == state_digest(module.state_dict())
    assert "found 1000 classes" in refusal("torchvision:squeezenet1_1?weights=DEFAULT&num_classes=10")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet50", "expected KIND:NAME"),
        ("torchvison:resnet50", "did you mean torchvision"),
        ("torchvision:resnet5O", "did you mean resnet5"),
        ("torchvision:", "has no network name"),
        ("torchvision:fcn_resnet50?num_classes=3", "unknown network"),
        ("cifar:resnet21?num_classes=3", "did you mean"),
        ("demo:huge?num_classes=3", "known: large, small, tiny"),
        ("demo:tiny", "add weights=PATH for trained weights, or num_classes=N"),
        ("demo:tiny?num_clases=3", "did you mean num_classes"),
        ("demo:tiny?num_classes=0", "from 1 to"),
        ("demo:tiny?num_classes=-2", "from 1 to"),
        ("demo:tiny?num_classes=ten", "option num_classes must be an integer, found 'ten'"),
        ("demo:tiny?num_classes=3&size=1e3", "option size must be an integer, found '1e3'"),
        ("demo:tiny?num_classes=3&mean=0,0,0", "'std' is missing"),
        ("demo:tiny?num_classes=3&mean=0,0,0&std=1,1", "a list of 3 finite numbers, found list of 2"),
        ("demo:tiny?num_classes=3&mean=0,0,zero&std=1,1,1", "option mean must be numbers"),
        ("demo:tiny?num_classes=3&mean=0,0,0&std=1,1,0", "above 0"),
        ("demo:tiny?num_classes=3&mean=0,0,nan&std=1,1,1", "finite"),
        ("demo:tiny?num_classes=3&norm=imagenett", "did you mean imagenet"),
        ("demo:tiny?num_classes=3&norm=half&mean=0,0,0", "found both"),
        ("demo:tiny?num_classes=3&seed=x", "option seed must be an integer, found 'x'"),
        ("demo:tiny?num_classes=3&weights=/nowhere/w.pt", "no weights file at"),
        ("demo:tiny?num_classes=3&weights=/", "cannot read weights"),
        ("demo:tiny?num_classes=3&weights=DEFAULT", "neither a file nor the name"),
        ("torchvision:resnet18?weights=DEFALT", "did you mean DEFAULT"),
        ("python:redistill.models.demo:build", "command line only"),
        ("torchvision:vit_b_16?num_classes=3&size=33", "indivisible"),
    ],
)
def test_an_invalid_spec_is_refused_with_the_reason(text: str, message: str):
    assert message in refusal(text)


def test_python_models_run_only_when_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "mine_for_redistill.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))\n"
        "def fixed():\n    return build(4)\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "python:mine_for_redistill"
    opened = open_model(f"{name}:build?num_classes=4&norm=half&size=2", allow_python=True)
    assert opened.module(torch.zeros(1, 3, 2, 2)).shape == (1, 4)
    assert (opened.weights_source, opened.name) == ("python", "mine_for_redistill.build")
    torch.save(opened.module.state_dict(), tmp_path / "w.pt")
    filled = open_model(f"{name}:fixed?num_classes=4&norm=half&weights={tmp_path / 'w.pt'}", allow_python=True)
    assert filled.weights_digest == opened.weights_digest
    assert "add norm=" in refusal(f"{name}:fixed?num_classes=4", allow_python=True)
    assert "add num_classes=" in refusal(f"{name}:fixed?norm=half", allow_python=True)
    assert "expected a torch.nn.Module, found int" in refusal(
        f"{name}:wrong?num_classes=4&norm=half", allow_python=True
    )
    assert "not a callable" in refusal(f"{name}:absent", allow_python=True)
    assert "PYTHONPATH" in refusal("python:no_such_module_here:build", allow_python=True)
    assert "module:callable" in refusal("python:mine_for_redistill", allow_python=True)


def test_a_network_of_your_own_opens_with_its_weights():
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    opened = redistill.open_model(module, num_classes=4, size=2, norm="half")
    assert opened.module is module
    assert (opened.input_size, opened.mean, opened.weights_source) == (2, (0.5, 0.5, 0.5), "python")
    assert opened.weights_digest == state_digest(module.state_dict())
    by_numbers = redistill.open_model(module, num_classes=4, norm=((0.1, 0.2, 0.3), (1, 2, 3)))
    assert (by_numbers.mean, by_numbers.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    with pytest.raises(UsageError, match="normalisation these weights were trained with is not known; add norm="):
        redistill.open_model(module, num_classes=4)
    with pytest.raises(UsageError, match="number of classes is not known; add num_classes=N"):
        redistill.open_model(module, norm="half")
    with pytest.raises(UsageError, match="as options of the spec"):
        redistill.open_model("demo:tiny?num_classes=3", norm="half")


def test_the_error_without_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # makes the import fail as if timm were not installed
    with pytest.raises(UsageError, match=r"pip install 'redistill\[timm\]'"):
        open_model("timm:resnet18?num_classes=3")


def test_timm_models_open_when_timm_is_installed(tmp_path: Path):
    pytest.importorskip("timm", reason="the extra `timm` is not installed")
    opened = open_model("timm:resnet18?num_classes=3", seed=1)
    assert (opened.num_classes, opened.input_size, opened.mean) == (3, 224, IMAGENET.mean)
    torch.save(opened.module.state_dict(), tmp_path / "w.pt")
    again = open_model(f"timm:resnet18?weights={tmp_path / 'w.pt'}")
    assert (again.num_classes, again.weights_digest) == (3, state_digest(opened.module.state_dict()))
    assert "unknown network" in refusal("timm:hf-hub:someone/model?num_classes=3")
    assert "did you mean" in refusal("timm:resnett18?num_classes=3")
    assert "did you mean resnet18.a1_in1k" in refusal("timm:resnet18.a1_in2k?num_classes=3")


def test_timm_builds_vision_transformers_for_another_size(tmp_path: Path):
    """Their position embedding has the size; timm resamples it where weights are loaded at another one."""
    timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")
    opened = open_model("timm:vit_tiny_patch16_224?num_classes=3&size=64")
    assert opened.input_size == 64
    assert opened.module.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert (opened.mean, opened.std, opened.interpolation) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
    save_weights(opened.module, tmp_path / "w.safetensors", opened.metadata())
    again = open_weights(tmp_path / "w.safetensors")
    assert (again.input_size, again.module.eval()(torch.zeros(1, 3, 64, 64)).shape) == (64, (1, 3))
    native = open_model("timm:vit_tiny_patch16_224?num_classes=3").module
    assert native.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 3)
    assert open_model("timm:resnet18?num_classes=3&size=64").module.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert timm.is_model("vit_tiny_patch16_224")


def test_training_checkpoints_that_timm_writes_open(tmp_path: Path):
    """Of timm's own CheckpointSaver, with an average of the weights beside them."""
    pytest.importorskip("timm", reason="the extra `timm` is not installed")
    from timm.utils import CheckpointSaver, ModelEmaV2

    module = open_model("timm:resnet18?num_classes=3").module
    saver = CheckpointSaver(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
        args=argparse.Namespace(model="resnet18", mean=None, scale=[0.08, 1.0]),
        model_ema=ModelEmaV2(module),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(1, metric=50.0)
    text = f"timm:resnet18?weights={tmp_path / 'last.pth.tar'}"
    assert "several networks: state_dict, state_dict_ema" in refusal(text)
    for key in ("state_dict", "state_dict_ema"):
        assert open_model(f"{text}&key={key}").weights_digest == state_digest(module.state_dict())


def test_describe_contains_no_path(tmp_path: Path):
    model = open_model("demo:tiny?num_classes=3")
    save_weights(model.module, tmp_path / "w.safetensors", model.metadata())
    described = open_model(f"demo:tiny?weights={tmp_path / 'w.safetensors'}&norm=half").describe()
    assert described["spec"] == "demo:tiny?norm=half&num_classes=3"
    assert str(tmp_path) not in repr(described)
    with pytest.raises(Refused):
        open_model(f"demo:tiny?weights={tmp_path / 'absent.safetensors'}")
