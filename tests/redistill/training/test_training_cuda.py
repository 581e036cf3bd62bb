"""Stage 2 on a GPU, a simulated one: it trains as the CPU does, and no training step waits for the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from redistill.interrupts import Interrupted
from redistill.progress import NoProgress
from redistill.training import train
from tests.redistill.training.runs import InterruptAt, history
from tests.simulated_cuda import SimulatedGPU, simulated_cuda
from tests.small_archive import VAL, cache


class Infos(NoProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def info(self, text: str) -> None:
        self.texts.append(text)


def waits_in_steps(gpu: SimulatedGPU) -> list[str]:
    return [str(sync) for sync in gpu.syncs if sync.within(" _step")]


@pytest.fixture(scope="session")
def mixing_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "mixing.redistill.zarr"
    return cache(path, recipe="rrc?size=32&mixup=0.2&cutmix=1", views=2)


@pytest.fixture(scope="session")
def feature_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "features.redistill.zarr"
    return cache(path, signals=("logits", "layer2", "penultimate"), views=2)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"amp": False},
        {"ema": 0.9, "grad_accum": 2},
        {"seeds": (0, 1), "losses": ("kl", "taid+ce?weight=0.5")},
        {"views_per_image": 2, "channels_last": False},
        {"opt": "adamw", "lr": 1e-3, "clip_grad": 1.0},
        {"online_teacher": "demo:small?num_classes=8&weights=random"},
        {"workers": 2},
    ],
    ids=lambda changed: "+".join(changed) or "plain",
)
def test_no_step_waits_for_the_gpu(options, changed: dict):
    with simulated_cuda() as gpu:
        results = train(options(**{"device": "cuda", "epochs": 2, "val": VAL, **changed}))
    assert waits_in_steps(gpu) == []
    assert gpu.recorded == 2 * (5 if "views_per_image" not in changed else 10) * 2, "pixels and labels of every batch"
    assert all(result.epochs == 2 and 0 <= result.top1 <= 1 for result in results)


def test_no_step_waits_for_mixed_views(options, mixing_archive: Path):
    with simulated_cuda() as gpu:
        train(options(archive=mixing_archive, device="cuda", epochs=2, losses=("kl+ce?weight=1",)))
    assert waits_in_steps(gpu) == []
    assert gpu.recorded == 2 * 5 * 4, "pixels, labels, partner labels and weights"


@pytest.mark.parametrize(
    "changed", [{}, {"losses": ("features+kl+ce?weight=1", "rkd+ce?weight=1"), "ema": 0.9}, {"head": "teacher"}]
)
def test_no_step_waits_for_features(options, feature_archive: Path, changed: dict):
    run = {"losses": ("features",), "archive": feature_archive, "device": "cuda", "epochs": 2, "val": VAL}
    with simulated_cuda() as gpu:
        train(options(**{**run, **changed}))
    assert waits_in_steps(gpu) == []


def test_a_gpu_without_bfloat16_scales_losses_without_a_wait(options):
    with simulated_cuda(bf16=False) as gpu:
        train(options(device="cuda", epochs=2, val=VAL))
    assert waits_in_steps(gpu) == []


def test_rows_that_do_not_fit_on_the_gpu_are_copied_without_a_wait(options, tmp_path: Path):
    """Only the constants of the codec are copied while the host waits, in the first step."""
    infos, waits = [], []
    for epochs in (1, 2):
        infos.append(Infos())
        with simulated_cuda() as gpu:
            train(options(device="cuda", epochs=epochs, cache_memory=0, out=tmp_path / str(epochs)), infos[-1])
        waits.append(waits_in_steps(gpu))
    assert waits[0] == waits[1]
    assert all(wait.startswith("blocking copy to the device at codecs/backend.py") for wait in waits[0])
    (told,) = [text for text in infos[-1].texts if "copied to cuda:0 with every batch" in text]
    assert "do not fit there (at most --cache-memory, and 25% of its free memory)" in told


def test_rows_that_fit_are_on_the_gpu_and_the_run_says_so(options):
    infos = Infos()
    with simulated_cuda():
        train(options(device="cuda", epochs=2), infos)
    (told,) = [text for text in infos.texts if text.startswith("teacher rows of an epoch: ")]
    assert told.endswith("KiB on cuda:0")


def test_it_trains_as_the_cpu_does(options, tmp_path: Path):
    on_cpu, on_gpu = (
        options(out=tmp_path / device, device=device, ema=0.9, val=VAL, amp=False) for device in ("cpu", "cuda")
    )
    train(on_cpu)
    with simulated_cuda():
        train(on_gpu)
    expected = load_file(on_cpu.out / "student.safetensors")
    for name, value in load_file(on_gpu.out / "student.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    losses = [[float(row["train_loss"]) for row in history(run.out)] for run in (on_cpu, on_gpu)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("opt", ["nesterov", "adamw"])
@pytest.mark.parametrize("first", ["cpu", "cuda:0"])
def test_a_run_goes_on_with_another_device(options, first: str, opt: str):
    """cpu -> cuda:1 and cuda:0 -> cpu, with the average of weights and a loss that learns parameters."""
    changed = {"ema": 0.9, "opt": opt, "lr": 1e-3, "losses": ("ctkd+ce?weight=1",), "val": VAL, "amp": False}
    with simulated_cuda(2):
        with pytest.raises(Interrupted):
            train(options(device=first, **changed), InterruptAt(2))
        (result,) = train(options(device="cuda:1" if first == "cpu" else "cpu", **changed))
    assert result.epochs == 3


def test_a_run_goes_on_with_another_gpu(options):
    with simulated_cuda(2) as gpu:
        with pytest.raises(Interrupted):
            train(options(device="cuda:0", ema=0.9), InterruptAt(2))
        assert train(options(device="cuda:1", ema=0.9))[0].epochs == 3
    assert waits_in_steps(gpu) == []


def test_cudnn_tries_its_algorithms_during_the_run_only(options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(NoProgress, "advance", lambda *_, **__: seen.append(torch.backends.cudnn.benchmark))
    with simulated_cuda():
        train(options(device="cuda", epochs=1))
    assert seen[-1] is True
    assert torch.backends.cudnn.benchmark is False
    seen.clear()
    train(options(device="cpu", out=tmp_path / "cpu"))
    assert set(seen) == {False}
