"""Devices, precision, threads and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from redistill_cache.errors import Refused, UsageError

__all__ = [
    "exact_float32",
    "fastest_convolutions",
    "is_out_of_memory",
    "one_thread",
    "pick_amp",
    "pick_device",
    "precision_text",
    "refuse_out_of_memory",
]

# A failed allocation that torch's allocator of CUDA did not make; only its text tells it from other errors.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "not enough memory",
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # the last words of cuDNN's newer names
    "MPS backend out of memory",
)

# (where, attribute, value without TF32). torch 2.9 renamed them, and must not be asked for both.
TF32_SWITCHES: list[tuple[Any, str, object]] = (
    [(torch.backends.cudnn.conv, "fp32_precision", "ieee"), (torch.backends.cuda.matmul, "fp32_precision", "ieee")]
    if hasattr(torch.backends.cudnn, "conv")
    else [(torch.backends.cudnn, "allow_tf32", False), (torch.backends.cuda.matmul, "allow_tf32", False)]
)


def pick_device(text: str = "auto", *, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA if there is a GPU, else the CPU. `cuda` without a number is the GPU of this local rank.

    A GPU becomes torch's current device: what pins memory or launches kernels asks for it, and would otherwise also
    occupy the first GPU.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UsageError(f"unknown device {text!r}; expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        device = cuda_device(device.index, local_rank)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise Refused("device mps was requested, but torch finds none; use --device cpu or --device auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device {text!r} is not supported; expected auto, cpu, cuda, cuda:N or mps")
    return device


def cuda_device(index: int | None, local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise Refused("device cuda was requested, but torch finds no GPU; use --device cpu or --device auto")
    if index is not None and index >= count:
        raise Refused(f"device cuda:{index} was requested, but the last GPU is cuda:{count - 1}; use --device cuda")
    if index is None and local_rank >= count:
        # A scheduler that gives each process a GPU shows it no other one.
        if count > 1 or "CUDA_VISIBLE_DEVICES" not in os.environ:
            raise Refused(
                f"process {local_rank + 1} of this machine needs a GPU of its own, but there are {count}; start at "
                f"most {count} processes, or use --device cpu"
            )
        local_rank = 0
    return torch.device("cuda", local_rank if index is None else index)


def pick_amp(device: torch.device, amp: bool | None) -> torch.dtype | None:
    """The autocast type of the forward pass, or None for float32. By default (`amp=None`), autocast on CUDA only."""
    if amp is False or (amp is None and device.type != "cuda"):
        return None
    if device.type == "cuda":
        with torch.cuda.device(device):  # the question is about torch's current device
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.float16
    return torch.bfloat16


def precision_text(device: torch.device, amp: torch.dtype | None) -> str:
    """The precision of a training step."""
    if amp is not None:
        return str(amp).removeprefix("torch.")
    place, name, off = TF32_SWITCHES[0]
    rounds = device.type == "cuda" and getattr(place, name) != off
    return "float32, convolutions in TF32" if rounds else "float32"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 in float32: torch lets convolutions on a GPU round their operands to TF32 by default."""
    before = [getattr(place, name) for place, name, _ in TF32_SWITCHES]
    try:
        for place, name, off in TF32_SWITCHES:
            setattr(place, name, off)
        yield
    finally:
        for (place, name, _), value in zip(TF32_SWITCHES, before, strict=True):
            setattr(place, name, value)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, on a CPU, or in a library that allocates for itself."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY)
    )


@contextmanager
def refuse_out_of_memory(batch_size: int, device: torch.device) -> Iterator[None]:
    """Turn a failed allocation into one line with a batch size to try."""
    try:
        yield
    except RuntimeError as error:  # the base class of torch.OutOfMemoryError
        if not is_out_of_memory(error):
            raise
        advice = f"try --batch-size {batch_size // 2}" if batch_size > 1 else "not even one image fits"
        raise Refused(f"{device} ran out of memory on a batch of {batch_size}; {advice}") from error


@contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """On a GPU, let cuDNN try its algorithms on every new shape and use the fastest: a run has two or three shapes."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch in one thread, as DataLoader workers do: for small tensors, starting and joining threads costs more
    than it saves, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
