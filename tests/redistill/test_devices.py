"""The choice of a device and its precision, and what is said when its memory does not suffice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import redistill_cache
import torch
from redistill_cache.codecs import fit_codec, join_encoded
from redistill_cache.errors import Refused

from redistill.cached_teacher import CachedTeacher
from redistill.caching import cache_teacher
from redistill.caching.encode_rows import encode_on_gpu
from redistill.devices import is_out_of_memory, pick_amp, pick_device, precision_text
from redistill.losses.divergences import alpha_beta
from redistill.metrics import batch_sums
from tests.simulated_cuda import simulated_cuda, simulated_mps
from tests.stage1 import file_hashes, five_class_options

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("text", "local_rank", "number"), [("auto", 0, 0), ("cuda", 1, 1), ("cuda:1", 0, 1)])
def test_the_device_becomes_torchs_current_one(text: str, local_rank: int, number: int):
    """Pinning, kernels and the choice of a precision ask for it; it is the first one until it is set."""
    with simulated_cuda(2) as gpu:
        assert pick_device(text, local_rank=local_rank) == torch.device("cuda", number)
        assert gpu.current == number


def test_a_gpu_that_does_not_exist_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with simulated_cuda(2):
        with pytest.raises(Refused, match=r"cuda:7 was requested, but the last GPU is cuda:1; use --device cuda$"):
            pick_device("cuda:7")
        with pytest.raises(Refused, match=r"process 3 of this machine needs a GPU of its own, but there are 2"):
            pick_device("cuda", local_rank=2)
    with simulated_cuda(1), pytest.raises(Refused, match="process 2 of this machine needs a GPU"):
        pick_device("cuda", local_rank=1)


def test_a_process_whose_scheduler_shows_it_one_gpu_uses_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as SLURM sets it for --gpus-per-task=1
    with simulated_cuda(1):
        assert pick_device("auto", local_rank=3) == GPU


def test_a_gpu_without_bfloat16_runs_in_float16():
    with simulated_cuda(bf16=False):
        assert pick_amp(GPU, None) == torch.float16
    with simulated_cuda():
        assert pick_amp(GPU, None) == torch.bfloat16


def test_the_question_about_bfloat16_is_about_the_device(monkeypatch: pytest.MonkeyPatch):
    with simulated_cuda(2) as gpu:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: gpu.current == 1)
        assert pick_amp(torch.device("cuda", 0), None) == torch.float16
        assert pick_amp(torch.device("cuda", 1), None) == torch.bfloat16
        assert gpu.current == 0


def test_the_precision_of_training_names_tf32():
    assert precision_text(GPU, None) == "float32, convolutions in TF32"
    assert precision_text(torch.device("cpu"), None) == "float32"
    assert precision_text(GPU, torch.bfloat16) == "bfloat16"


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 18.1 GB)",
    ],
)
def test_a_library_that_finds_no_memory_is_recognised(text: str):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))


def logits(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = 3.0 * (rng.normal(size=(count, 12)) * np.exp(-np.arange(12) / 4)) @ rng.normal(size=(12, 40))
    rows[::7] *= 8
    return rows.astype(np.float32)


def test_a_gpu_with_little_memory_encodes_fewer_rows_at_a_time_to_the_same_bytes():
    rows = logits(150)
    codec = fit_codec("linear", rows)
    expected = codec.encode(rows)
    with simulated_cuda(largest=400_000):
        on_gpu = torch.from_numpy(rows).to(GPU)
        with pytest.raises(torch.OutOfMemoryError):
            codec.encode(on_gpu)
        parts = encode_on_gpu(codec, on_gpu)
    assert len(parts) > 1
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(join_encoded(parts).arrays[name], array, err_msg=name)


def test_out_of_memory_in_the_encoder_names_its_own_remedy(tmp_path: Path):
    classes = {"data": "synthetic?n=90&classes=200", "teacher": "demo:tiny?num_classes=200&weights=random"}
    options = five_class_options(tmp_path / "a.zarr", device="cuda", codec="linear", views=1, **classes)
    with simulated_cuda(largest=1_500_000), pytest.raises(Refused) as caught:
        cache_teacher(options)
    text = str(caught.value)
    assert "ran out of memory while it encoded" in text, text
    assert "other programs" in text
    assert "\n" not in text


def test_escapes_travel_to_the_host_in_their_own_width():
    rows = logits(300)
    codec = fit_codec("linear", rows[1:7])
    with simulated_cuda() as gpu:
        encoded = codec.encode(torch.from_numpy(rows).to(GPU))
        assert encoded.arrays["escape"].any()
        rank = encoded.arrays["escape"].shape[1]
        wide = [(dtype, count) for dtype, count in gpu.to_host if dtype == torch.float64 and count >= 300 * rank]
    assert rank > 1
    assert wide == []


# -- a Mac ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["linear", "compander", "float16", "float32"])
def test_stage_1_on_a_mac_writes_what_a_cpu_writes(tmp_path: Path, codec: str):
    """MPS has no float64, so encoding and decoding run on the CPU."""
    options = {"codec": codec, "views": 1, "keep_shift": codec == "linear"}
    with simulated_mps():
        cache_teacher(five_class_options(tmp_path / "mps.zarr", device="mps", **options))
    cache_teacher(five_class_options(tmp_path / "cpu.zarr", device="cpu", **options))
    found, expected = (file_hashes(tmp_path / f"{name}.zarr") for name in ("mps", "cpu"))
    rows = {name for name in expected if "/logits/" in name}
    assert rows
    assert {name: found[name] for name in rows} == {name: expected[name] for name in rows}
    with simulated_mps():
        archive = redistill_cache.open_archive(tmp_path / "mps.zarr")
        decoded = CachedTeacher(archive, "mps")([0, 5, 7], [0, 0, 0])
        assert decoded.device.type == "mps"
        np.testing.assert_array_equal(decoded.cpu().numpy(), archive.logits(0, np.array([0, 5, 7])))


def test_metrics_and_losses_on_a_mac():
    student, teacher, labels = torch.tensor(logits(30)), torch.tensor(logits(31)[1:]), torch.arange(30)
    expected = batch_sums(student, labels, teacher)
    loss = alpha_beta(student, teacher, alpha=0.01, beta=0.01)
    with simulated_mps():
        device = torch.device("mps", 0)
        found = batch_sums(student.to(device), labels.to(device), teacher.to(device))
        found_loss = alpha_beta(student.to(device), teacher.to(device), alpha=0.01, beta=0.01).item()
    assert found.nll == pytest.approx(expected.nll)
    assert found.brier == pytest.approx(expected.brier)
    assert found_loss == pytest.approx(loss.item())
