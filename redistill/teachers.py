"""A frozen teacher, and the check on its first batch that its outputs may be cached.

A model in train mode, one with dropout, one that normalises with the statistics of the batch: each runs without an
error, and each would fill an archive with logits that are not a function of the image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from redistill_cache.errors import Refused, UsageError
from torch import Tensor, nn

from redistill.devices import exact_float32, refuse_out_of_memory
from redistill.models import OpenedModel
from redistill.models.weights import tensor_bytes
from redistill.signals import LOGITS, PENULTIMATE, PROBE_SIZE, Head, Signals, find_head
from redistill.specs import listed

__all__ = ["Teacher", "TeacherCheck", "check_teacher"]


class Teacher:
    """teacher(pixels) -> {"logits": [B, C], "layer3": [B, d], ...}, float32, on `device`.

    Pixels are uint8 [B, 3, H, W]; they are normalised on the device. The module of `model` is modified: set to eval
    mode, frozen and moved. Outputs carry no gradient, but can be used in a student's loss. Without `pooled`, the
    outputs of layers are maps and tokens as they are.
    """

    def __init__(
        self,
        model: OpenedModel,
        *,
        device: torch.device,
        amp: torch.dtype | None = None,
        channels_last: bool = True,
        compile: bool = False,  # noqa: A002  # the name of the option
        batch_size: int = 0,
        layers: Sequence[str] = (),
        pooled: bool = True,
    ) -> None:
        """With `compile`, batches below `batch_size` are padded to it: the network is compiled for one shape."""
        if model.weights_source is None:
            raise Refused(f"the teacher {model.spec!r} has no weights; add weights=PATH, or weights=random for a test")
        self.model = model
        self.device = device
        self.amp = amp
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.normalise = model.normalise().to(device)
        model.module.eval().requires_grad_(False)
        if {*layers} - {LOGITS, PENULTIMATE} and not isinstance(model.module(self._noise()), Tensor):
            raise Refused(f"layers of {model.spec!r} cannot be stored: it does not return a tensor; use penultimate")
        head = self.head_name if PENULTIMATE in layers or amp is not None else None
        self._removed_head = None if head is None else model.module.get_submodule(head)
        signals = Signals(model.module, layers, head, pooled=pooled).eval()
        with refuse_out_of_memory(1, device):
            self.network = signals.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self._run = torch.compile(self.network, dynamic=False) if compile else self.network
        self.batch_size = batch_size

    @property
    def precision(self) -> str:
        """In which the logits are computed."""
        if self.amp is None:
            return "float32"
        name = str(self.amp).removeprefix("torch.")
        return name if self._removed_head is None else f"{name}, final layer float32"

    @property
    def signals(self) -> tuple[str, ...]:
        """`logits`, then the layers in the order requested."""
        return (LOGITS, *(layer for layer in self.network.layers if layer != LOGITS))

    @cached_property
    def head_name(self) -> str | None:
        """The name of the final linear layer, if its output is the logits."""
        return find_head(self.model.module, self.model.num_classes, self._noise())

    def _noise(self) -> Tensor:
        """Two inputs of a size that the network accepts, on its device."""
        side = self.model.input_size or PROBE_SIZE
        own = next(iter(self.model.module.parameters()), torch.empty(0))
        return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(own.device)

    def head(self) -> Head | None:
        """Weight and bias of the final linear layer, on the CPU; None if its output is not the logits."""
        if self._removed_head is not None:
            linear = self._removed_head
        elif self.head_name is not None:
            linear = self.model.module.get_submodule(self.head_name)
        else:
            return None
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach().float().cpu()
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float().cpu()
        return Head(weight, bias)

    @torch.no_grad()  # not inference_mode, whose tensors cannot be used in a student's loss
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UsageError(f"expected uint8 pixels [B, 3, H, W], found {pixels.dtype} {list(pixels.shape)}")
        missing = self.batch_size - len(pixels)
        if missing > 0 and self._run is not self.network:
            padded = nn.functional.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing))
            return {name: rows[:-missing] for name, rows in self(padded).items()}
        with refuse_out_of_memory(len(pixels), self.device), exact_float32():
            moved = pixels.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
            with torch.autocast(self.device.type, self.amp) if self.amp is not None else nullcontext():
                outputs: dict[str, Tensor] = self._run(self.normalise(moved))
        expected = [len(pixels), self.model.num_classes]
        shape = list(outputs[LOGITS].shape)
        if shape != expected:
            raise Refused(f"expected logits {expected} from {self.model.spec!r}, found {shape}; see num_classes=")
        return outputs

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run the network as it is: compiling it takes minutes for every batch size, and checks use several."""
        self._run, compiled = self.network, self._run
        try:
            yield
        finally:
            self._run = compiled


# -- the check on the first batch -------------------------------------------------------------------------------------

# How far the logits of an image may depend on the other images of the batch, relative to the deviation of the logits.
# Rounding changes them by 1e-6 (float32), 1e-3 (TF32) or 1e-2 (bfloat16); batch statistics change them by 0.1 to 1.
NEIGHBOUR_BOUND = {None: 0.02, torch.float16: 0.1, torch.bfloat16: 0.1}
# Two runs of the same batch are equal bit for bit on a CPU. A GPU may choose another kernel the second time.
REPEAT_BOUND = {"cpu": 0.0, "cuda": 1e-3, "mps": 1e-3}
# Of a larger batch, so many images are run again.
REPEATED_IMAGES = 32


@dataclass(frozen=True)
class TeacherCheck:
    """The measurements on the batch. Differences are absolute differences of logits."""

    images: int
    batch_difference: float
    """Largest difference between the same views in two batch compositions; smaller differences are rounding."""
    relative_batch_difference: float
    """`batch_difference` divided by the standard deviation of the logits."""
    repeat: float
    """Largest difference between two runs of the same batch."""


def check_teacher(teacher: Teacher, pixels: Tensor) -> tuple[TeacherCheck, dict[str, Tensor]]:
    """Run the teacher over `pixels` [B >= 4, 3, H, W], and twice more over some of them in batches of another size.

    Refuse it, or return the measurements and its outputs for `pixels`, computed without torch.compile.
    """
    assert len(pixels) >= 4, len(pixels)
    with teacher.uncompiled():
        return check_uncompiled(teacher, pixels)


def check_uncompiled(teacher: Teacher, pixels: Tensor) -> tuple[TeacherCheck, dict[str, Tensor]]:
    refuse_train_mode(teacher)
    before = state_digests(teacher.network)
    outputs, few = teacher(pixels), pixels[:REPEATED_IMAGES]
    first = {name: rows[: len(few)] for name, rows in outputs.items()}
    second, third = run_regrouped(teacher, few), run_regrouped(teacher, few)
    refuse_not_finite(teacher, outputs)
    refuse_changed(before, state_digests(teacher.network))
    refuse_train_mode(teacher)
    deviation = max(first[LOGITS].std().item(), 1e-12)
    repeat = max_difference(second, third)
    if repeat > REPEAT_BOUND[teacher.device.type] * deviation:
        raise Refused(
            f"two runs of the teacher over the same images give different logits (by {repeat:.3g}); it must not use "
            f"dropout or sampling in eval mode"
        )
    difference = max_difference(first, second)
    if difference > NEIGHBOUR_BOUND[teacher.amp] * deviation:
        raise Refused(
            f"the teacher's logits for an image depend on the other images of the batch (by {difference:.3g}, at a "
            f"standard deviation of {deviation:.3g}); batch norm must use its running statistics"
        )
    return TeacherCheck(len(few), difference, difference / deviation, repeat), outputs


def run_regrouped(teacher: Teacher, pixels: Tensor) -> dict[str, Tensor]:
    """The outputs for the same images in reverse order and two batches, the first of two images."""
    backwards = pixels.flip(0)
    two, rest = teacher(backwards[:2]), teacher(backwards[2:])
    return {name: torch.cat([two[name], rest[name]]).flip(0) for name in two}


def max_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return (one[LOGITS] - other[LOGITS]).abs().max().item()


def refuse_train_mode(teacher: Teacher) -> None:
    training = [plain_name(name) for name, part in teacher.network.named_modules() if part.training]
    if training:
        raise Refused(
            f"the teacher stays in train mode after eval(): {listed(training)}; its train() must set the mode of all "
            "submodules, or dropout and batch statistics would determine what is stored"
        )


def plain_name(name: str) -> str:
    """A name inside the user's model, which `Signals` holds as `network`."""
    return name.removeprefix("network").removeprefix(".") or "the model itself"


def refuse_not_finite(teacher: Teacher, outputs: dict[str, Tensor]) -> None:
    for name, rows in outputs.items():
        bad = int((~torch.isfinite(rows)).any(1).sum())
        if bad:
            advice = "; try --no-amp" if teacher.amp is not None else "; check its weights and normalisation"
            raise Refused(f"the teacher's {name} contain NaN or infinity for {bad} of {len(rows)} images{advice}")


def refuse_changed(before: dict[str, str], after: dict[str, str]) -> None:
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if changed:
        raise Refused(
            f"a forward pass changes the teacher's state: {listed(sorted(map(plain_name, changed)))}; in eval mode it "
            "must not write to parameters and buffers"
        )


def state_digests(network: nn.Module) -> dict[str, str]:
    """Digests of the parameters and of all buffers, also those that are not in the state_dict."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
