"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AveragedWeights"]

# The keys of torch's AveragedModel, under which checkpoints have always held the average.
COUNT, PREFIX = "n_averaged", "module."


class AveragedWeights:
    """`module`, a network whose parameters and floating-point buffers are averages over the steps; others are copies.

    The average starts with the weights after the first step. Unlike torch's AveragedModel, it counts the steps on the
    host: a counter on the device would stop the host in every step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = copy.deepcopy(network).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the weights of `network` after a step."""
        pairs = list(zip(tensors(self.module), tensors(network), strict=True))
        averaged = [pair for pair in pairs if self.steps and pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not (self.steps and pair[0].is_floating_point())]
        if averaged:
            torch._foreach_lerp_([old for old, _ in averaged], [new for _, new in averaged], 1 - self.decay)
        if copied:
            torch._foreach_copy_([old for old, _ in copied], [new for _, new in copied])
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        weights = {PREFIX + name: value for name, value in self.module.state_dict().items()}
        return {COUNT: torch.tensor(self.steps), **weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name != COUNT}
        self.module.load_state_dict(weights)
        self.steps = int(state[COUNT])


def tensors(network: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in chain(network.parameters(), network.buffers())]
