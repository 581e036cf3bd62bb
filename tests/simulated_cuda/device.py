"""The tensors of a simulated CUDA device, and the dispatch of every operation on them."""

from __future__ import annotations

import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.utils._device as torch_device
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CPU, META = torch.device("cpu"), torch.device("meta")
PACKAGES = ("redistill", "redistill_cache", "redistill_cli")

# Operations whose result has a shape that only the device knows, or that are read by the host inside torch.
WAITING = {
    "_linalg_check_errors",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "linalg_eigh",
    "linalg_qr",
    "linalg_svd",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}

# What autocast on CUDA runs in the lower precision, and what in float32.
LOWER = re.findall(
    r"\w+",
    """
    addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d einsum linear matmul mm multi_dot mv prelu rmatmul scaled_dot_product_attention
    """,
)
FLOAT32 = re.findall(
    r"\w+",
    """
    acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss cosine_similarity cross_entropy_loss
    cumprod cumsum dist erfinv exp expm1 group_norm huber_loss kl_div l1_loss layer_norm log log10 log1p log2
    log_softmax logsumexp mse_loss nll_loss nll_loss_nd norm pow prod reciprocal rpow rsqrt sinh smooth_l1_loss
    softmax softplus sum tan
    """,
)


class MixedDevices(RuntimeError):
    """An operation on tensors of two devices."""


@dataclass(frozen=True)
class Sync:
    """The host waited for the device."""

    kind: str
    stack: tuple[str, ...]
    """`file:line function` of the frames in our packages, the innermost first."""

    @property
    def where(self) -> str:
        return self.stack[0] if self.stack else "?"

    def within(self, place: str) -> bool:
        """Whether a frame holds this text, as `loop.py` or ` _step`."""
        return any(place in frame for frame in self.stack)

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}"


@dataclass
class SimulatedGPU:
    """What the simulated devices of one `simulated_cuda` context saw."""

    count: int = 1
    kind: str = "cuda"
    """cuda, or mps, which has no float64."""
    largest: int | None = None
    """Bytes of the largest tensor that there is memory for."""
    syncs: list[Sync] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    threads: threading.local = field(default_factory=threading.local)
    pinned: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    """Pinned host memory by address; kept, so that no address is used twice."""
    to_host: list[tuple[torch.dtype, int]] = field(default_factory=list)
    """The type and the number of values of every copy to the host."""
    generators: dict[int, torch.Generator] = field(default_factory=dict)
    recorded: int = 0
    """Calls of Tensor.record_stream."""

    @property
    def current(self) -> int:
        """The device that torch.cuda.set_device set in this thread."""
        return getattr(self.threads, "current", 0)

    @current.setter
    def current(self, index: int) -> None:
        assert 0 <= index < self.count, f"there is no cuda:{index}"
        self.threads.current = index

    def wait(self, kind: str) -> None:
        """Record that the host waits for the device."""
        self.syncs.append(Sync(kind, our_frames()))

    @contextmanager
    def counting(self) -> Iterator[list[Sync]]:
        """The syncs within this block, once it has ended."""
        found: list[Sync] = []
        start = len(self.syncs)
        yield found
        found += self.syncs[start:]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def generator(self, index: int) -> torch.Generator:
        return self.generators.setdefault(index, torch.Generator().manual_seed(index))


def our_frames() -> tuple[str, ...]:
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in PACKAGES:
            path = "/".join(frame.f_code.co_filename.rsplit("/", 2)[-2:])
            frames.append(f"{path}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(frames)


class SimulatedTensor(torch.Tensor):
    """A tensor whose device is cuda:N, with its data in `data_on_cpu`.

    To torch's C++ code it is on the device meta, which needs no driver: where that code asks for the device of a tensor
    to create another one, as derivatives do, meta means the simulated device.
    """

    gpu: ClassVar[SimulatedGPU]
    data_on_cpu: torch.Tensor
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor, index: int) -> SimulatedTensor:
        tensor: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=META,
        )
        tensor.data_on_cpu, tensor.index = data, index
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(self.gpu.kind, self.index)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.gpu.kind == "cuda"

    is_cpu, is_meta = False, False  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimulatedTensor({list(self.shape)}, {self.dtype}, {self.device})"

    def __reduce_ex__(self, protocol: int) -> Any:
        """Saved as a tensor of the CPU."""
        self.gpu.wait("pickle")
        return self.data_on_cpu.detach().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        self.gpu.wait("copy to the host")
        return self.data_on_cpu.tolist()

    def record_stream(self, s: Any) -> None:  # noqa: ARG002  the name that torch gives it
        """torch's own takes its own streams only."""
        self.gpu.recorded += 1

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(cls.gpu, func, args, kwargs or {})


class CudaMode(TorchDispatchMode):
    """Sees the operations that create tensors, which have none of ours among their arguments."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation would import torch's compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(SimulatedTensor.gpu, func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """torch.autocast("cuda"), since torch's own looks for the device in C++; and the number of a device without one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(numbered, (args, kwargs or {}))
        dtype = None
        if torch.is_autocast_enabled("cuda"):
            name = func.__name__.strip("_")
            dtype = torch.get_autocast_dtype("cuda") if name in LOWER else torch.float32 if name in FLOAT32 else None
        if dtype is not None:
            args, kwargs = tree_map(lambda leaf: cast(leaf, dtype), (args, kwargs))
        return func(*args, **kwargs)


def numbered(leaf: Any) -> Any:
    """The device of this kind with its number: without one, torch would ask a driver."""
    gpu = SimulatedTensor.gpu
    is_unnumbered = isinstance(leaf, (str, torch.device)) and str(leaf) == gpu.kind
    return torch.device(gpu.kind, gpu.current) if is_unnumbered else leaf


def cast(leaf: Any, dtype: torch.dtype) -> Any:
    is_ours = isinstance(leaf, SimulatedTensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
    return leaf.to(dtype) if is_ours else leaf


def dispatch(gpu: SimulatedGPU, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    name = func._schema.name.removeprefix("aten::")
    requested = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not ours and not is_simulated(gpu, requested):
        return func(*args, **kwargs)
    if name == "_to_copy":
        return to_copy(gpu, func, args[0], dict(kwargs))
    if name == "copy_":
        return copy_into(gpu, func, *args, **kwargs)
    if name == "_local_scalar_dense":
        gpu.wait("item")
        return func(args[0].data_on_cpu)
    if name == "_fused_sdp_choice":
        return 0  # in plain operations; those of a CPU have no kernel here
    index = device_of(gpu, name, args, tensors, ours, requested)
    count_waiting(gpu, name, args)
    gpu.kernels[name] += 1
    inner = {key: value for key, value in unwrapped(kwargs).items() if key != "pin_memory"}
    if requested is not None:
        inner["device"] = CPU
    result = compute(gpu, func, name, unwrapped(args), inner, index)
    check_result(gpu, result)
    wrapped = tree_map(lambda leaf: SimulatedTensor(leaf, index) if isinstance(leaf, torch.Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours else wrapped


def is_simulated(gpu: SimulatedGPU, requested: torch.device | None) -> bool:
    """Whether an operation that takes no tensor of ours creates one."""
    if requested is None:
        return False
    is_meant = torch_device.CURRENT_DEVICE == META  # within `with torch.device("meta")`
    return requested.type == gpu.kind or (requested == META and not is_meant)


def unwrapped(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.data_on_cpu if isinstance(leaf, SimulatedTensor) else leaf, tree)


def device_of(gpu: SimulatedGPU, name: str, args: Any, tensors: Any, ours: Any, requested: Any) -> int:
    """The number of the device on which an operation runs."""
    devices = {tensor.device for tensor in ours}
    # As on a real device: a CPU tensor may be a number, or the index of an indexing operation.
    others = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor) and tensor.dim() > 0]
    if others and name in INDEXING and isinstance(args[0], SimulatedTensor):
        values = args[2] if len(args) > 2 else None
        others = [tensor for tensor in others if tensor is values]
    if others or len(devices) > 1:
        found = sorted({str(device) for device in devices} | {str(tensor.device) for tensor in others})
        raise MixedDevices(f"Expected all tensors to be on the same device, found {', '.join(found)} in {name}")
    device = requested if requested is not None and requested != META else devices.pop() if devices else META
    return gpu.current if device.index is None else device.index


def count_waiting(gpu: SimulatedGPU, name: str, args: tuple[Any, ...]) -> None:
    if name in WAITING:
        gpu.wait(name)
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, SimulatedTensor) and index.dim() for index in indices):
            gpu.wait("copy of an index to the device")
        fills = len(args) > 2 and args[2].numel() == 1  # becomes masked_fill_
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not fills:
            gpu.wait("nonzero of a mask")


def compute(gpu: SimulatedGPU, func: Any, name: str, args: Any, kwargs: dict[str, Any], index: int) -> Any:
    if name in ("_softmax", "_log_softmax") and args[2]:  # half_to_float has no kernel on a CPU
        return func(args[0].float(), args[1], False)
    if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
        return func(*args, **kwargs)
    host = torch.get_rng_state()
    torch.set_rng_state(gpu.generator(index).get_state())
    try:
        return func(*args, **kwargs)
    finally:
        gpu.generator(index).set_state(torch.get_rng_state())
        torch.set_rng_state(host)


def check_result(gpu: SimulatedGPU, result: Any) -> None:
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            if gpu.kind == "mps" and leaf.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype, which MPS does not support")
            if gpu.largest is not None and leaf.nbytes > gpu.largest:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {leaf.nbytes} bytes")


def to_copy(gpu: SimulatedGPU, func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """`.to`, `.cpu` and `.cuda`."""
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else source.device
    target = source.device if target == META else target
    non_blocking = kwargs.pop("non_blocking", False)
    kwargs.pop("pin_memory", None)
    crossing = target.type != source.device.type
    if crossing:
        count_copy(gpu, source, target, non_blocking)
    else:
        gpu.kernels["_to_copy"] += 1
    if "device" in kwargs:
        kwargs["device"] = CPU
    copied = func(unwrapped(source), **kwargs)
    if target.type == gpu.kind:
        check_result(gpu, copied)
        return SimulatedTensor(copied, gpu.current if target.index is None else target.index)
    return copied


def copy_into(
    gpu: SimulatedGPU, func: Any, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
) -> torch.Tensor:
    if target.device.type != source.device.type and source.dim():
        count_copy(gpu, source, target.device, non_blocking)
    func(unwrapped(target), unwrapped(source))
    return target


def count_copy(gpu: SimulatedGPU, source: torch.Tensor, target: torch.device, non_blocking: bool) -> None:
    if target.type == "cpu":
        gpu.to_host.append((source.dtype, source.numel()))
        if not non_blocking:
            gpu.wait("copy to the host")
    elif not non_blocking:
        gpu.wait("blocking copy to the device")
    elif not gpu.is_pinned(source):
        gpu.wait("copy to the device from memory that is not pinned")
