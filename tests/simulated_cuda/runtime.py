"""A stand-in for torch.cuda, in effect within `simulated_cuda()`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.optim import optimizer as optimizers

from tests.simulated_cuda.device import Calls, CudaMode, SimulatedGPU, SimulatedTensor

MEMORY = 1 << 36
TRITON_SWEEPS = "redistill_cache.codecs.triton_sweeps"  # a compiled kernel needs a driver


@contextlib.contextmanager
def simulated_cuda(devices: int = 1, *, bf16: bool = True, largest: int | None = None) -> Iterator[SimulatedGPU]:
    """Simulate this many GPUs, with or without bfloat16, in this thread and in those that start meanwhile.

    `largest`: bytes of the largest tensor that there is memory for.
    """
    gpu = SimulatedGPU(devices, largest=largest)
    if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):  # torch's own stand-in where it finds no driver
        torch._C._ensureCUDADeviceGuardSet()
    with contextlib.ExitStack() as stack:
        replace(stack, torch.cuda, cuda_functions(gpu, bf16))
        replace(
            stack, optimizers, {"_foreach_supported_types": [*optimizers._foreach_supported_types, SimulatedTensor]}
        )
        # Not patch.dict, which would forget all modules that are imported meanwhile.
        stack.callback(restore_module, sys.modules.get(TRITON_SWEEPS))
        sys.modules[TRITON_SWEEPS] = None  # type: ignore[assignment]
        stack.enter_context(simulated(gpu))
        yield gpu


@contextlib.contextmanager
def simulated_mps() -> Iterator[SimulatedGPU]:
    """Simulate the GPU of a Mac, which has no float64."""
    gpu = SimulatedGPU(kind="mps")
    with contextlib.ExitStack() as stack:
        replace(stack, torch.backends.mps, {"is_available": lambda: True})
        stack.enter_context(simulated(gpu))
        yield gpu


@contextlib.contextmanager
def simulated(gpu: SimulatedGPU) -> Iterator[None]:
    """What both kinds of device need."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    start_thread: Callable[[threading.Thread], None] = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def bootstrap(thread: threading.Thread) -> None:
        with simulating():
            start_thread(thread)

    with contextlib.ExitStack() as stack:
        replace(stack, SimulatedTensor, {"gpu": gpu})
        replace(stack, torch.Tensor, pinning(gpu))
        replace(stack, torch, {"Generator": Generator})
        replace(stack, threading.Thread, {"_bootstrap_inner": bootstrap})
        # Parameters that move to the device are new ones: those of the CPU cannot hold a tensor of another class.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        stack.enter_context(simulating())
        yield


def replace(stack: contextlib.ExitStack, owner: Any, replacements: dict[str, Any]) -> None:
    for name, value in replacements.items():
        stack.enter_context(mock.patch.object(owner, name, value, create=True))


def restore_module(module: ModuleType | None) -> None:
    del sys.modules[TRITON_SWEEPS]
    if module is not None:
        sys.modules[TRITON_SWEEPS] = module


@contextlib.contextmanager
def simulating() -> Iterator[None]:
    """In this thread; backward runs in it too, as if there were no GPU."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies where the mode sees it
    try:
        with CudaMode(), Calls():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


class Generator(torch.Generator):
    """A generator of any device, on the CPU."""

    def __new__(cls, *_: Any, **__: Any) -> Generator:
        return super().__new__(cls)


def pinning(gpu: SimulatedGPU) -> dict[str, Any]:
    def pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        if tensor.device.type != "cpu":
            raise RuntimeError(f"cannot pin {tensor.type()}: only dense CPU tensors can be pinned")
        copy = tensor.clone(memory_format=torch.preserve_format)
        gpu.pinned[copy.untyped_storage().data_ptr()] = copy.untyped_storage()
        return copy

    def is_pinned(tensor: torch.Tensor, *_: Any) -> bool:
        return tensor.device.type == "cpu" and gpu.is_pinned(tensor)

    return {"pin_memory": pin_memory, "is_pinned": is_pinned}


def cuda_functions(gpu: SimulatedGPU, bf16: bool) -> dict[str, Any]:
    def index_of(device: Any = None) -> int:
        device = torch.device(device) if isinstance(device, str) else device
        index = device.index if isinstance(device, torch.device) else device
        return gpu.current if index is None else int(index)

    def set_device(device: Any) -> None:
        gpu.current = index_of(device)

    @contextlib.contextmanager
    def on_device(device: Any) -> Iterator[None]:
        before, gpu.current = gpu.current, index_of(device)
        try:
            yield
        finally:
            gpu.current = before

    def seed_all(seed: int) -> None:
        for index in range(gpu.count):
            gpu.generator(index).manual_seed(seed)

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, *_: Any) -> None: ...

        def wait(self, *_: Any) -> None: ...

        def query(self) -> bool:
            return True

        def elapsed_time(self, _: Event) -> float:
            return 1.0

        def synchronize(self) -> None:
            gpu.wait("Event.synchronize")

    class Stream:
        def __init__(self, device: Any = None, **_: Any) -> None:
            self.device = torch.device("cuda", index_of(device))

        def record_event(self, event: Event | None = None) -> Event:
            return event or Event()

        def wait_event(self, event: Event) -> None: ...

        def wait_stream(self, stream: Stream) -> None: ...

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            gpu.wait("Stream.synchronize")

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: gpu.count,
        "current_device": lambda: gpu.current,
        "set_device": set_device,
        "get_device_name": lambda device=None: "simulated GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="simulated GPU", total_memory=MEMORY, multi_processor_count=1, major=9, minor=0
        ),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.wait("torch.cuda.synchronize"),
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(device),
        "default_stream": lambda device=None: Stream(device),
        "stream": lambda stream: on_device(stream.device),
        "device": on_device,
        "is_bf16_supported": lambda *_, **__: bf16,
        "manual_seed": lambda seed: gpu.generator(gpu.current).manual_seed(seed),
        "manual_seed_all": seed_all,
        "get_rng_state": lambda device=None: gpu.generator(index_of(device)).get_state(),
        "set_rng_state": lambda state, device=None: gpu.generator(index_of(device)).set_state(state),
    }
