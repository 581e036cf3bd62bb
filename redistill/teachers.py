"""A frozen model that answers for pixels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
from redistill_cache.errors import Refused, UsageError
from torch import Tensor, nn

from redistill.devices import refuse_out_of_memory
from redistill.models import OpenedModel
from redistill.signals import LOGITS, PENULTIMATE, Head, Signals, find_head

__all__ = ["Teacher"]

PROBE_SIZE = 64  # where the network does not say what it expects; any fully convolutional network takes it


class Teacher:
    """teacher(pixels) -> {"logits": [B, C], "layer3": [B, d], ...}, float32, on `device`.

    Pixels are uint8 [B, 3, H, W]; they are normalised on the device. The module is taken over: set to eval mode,
    frozen and moved. Answers carry no gradient, but may stand beside a student's in a loss.
    """

    def __init__(
        self,
        model: OpenedModel,
        *,
        device: torch.device,
        amp: torch.dtype | None = None,
        channels_last: bool = True,
        compile: bool = False,  # noqa: A002  # the name of the option
        layers: Sequence[str] = (),
    ) -> None:
        if model.weights_source is None:
            raise Refused(
                f"the teacher {model.spec!r} has no weights; add weights=PATH (or weights=random, to mean just that)"
            )
        self.model = model
        self.device = device
        self.amp = amp
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.normalise = model.normalise().to(device)
        model.module.eval().requires_grad_(False)
        head = self.head_name if PENULTIMATE in layers else None
        self._cut_head = None if head is None else model.module.get_submodule(head)
        with refuse_out_of_memory(1, device):
            self.network = Signals(model.module, layers, head).eval().to(device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self._run = torch.compile(self.network) if compile else self.network

    @property
    def signals(self) -> tuple[str, ...]:
        """`logits`, then the layers in the order asked for."""
        return (LOGITS, *(layer for layer in self.network.layers if layer != LOGITS))

    @cached_property
    def head_name(self) -> str | None:
        """The final linear layer, by name, when the logits are its output and nothing else."""
        side = self.model.input_size or PROBE_SIZE
        own = next(iter(self.model.module.parameters()), torch.empty(0))
        noise = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(own.device)
        return find_head(self.model.module, self.model.num_classes, noise)

    def head(self) -> Head | None:
        """Weight and bias of the final linear layer, on the CPU; None when the logits are not its plain output."""
        if self._cut_head is not None:
            linear = self._cut_head
        elif self.head_name is not None:
            linear = self.model.module.get_submodule(self.head_name)
        else:
            return None
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach().float().cpu()
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float().cpu()
        return Head(weight, bias)

    @torch.no_grad()  # not inference_mode: its tensors may not take part in a student's loss
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UsageError(f"expected uint8 pixels [B, 3, H, W], found {pixels.dtype} {list(pixels.shape)}")
        with refuse_out_of_memory(len(pixels), self.device):
            moved = pixels.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
            with torch.autocast(self.device.type, self.amp) if self.amp is not None else nullcontext():
                answers: dict[str, Tensor] = self._run(self.normalise(moved))
        expected = (len(pixels), self.model.num_classes)
        if answers[LOGITS].shape != expected:
            found = list(answers[LOGITS].shape)
            raise Refused(f"expected logits {list(expected)} from {self.model.spec!r}, found {found}; see num_classes=")
        return answers
