"""What a network says of a batch: its logits and, when asked, layers on the way to them.

A layer is named as torchvision's feature extraction names it (`layer3`, `features.12`), or `penultimate`: the input of
the final linear layer. Maps are averaged over space, tokens over the sequence: one vector per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from redistill_cache.errors import Refused, UsageError
from redistill_cache.spec import LOGITS
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from redistill.specs import did_you_mean, first_line

__all__ = ["LOGITS", "PENULTIMATE", "Head", "Signals", "find_head", "pool"]

PENULTIMATE = "penultimate"


class Head(NamedTuple):
    """logits = features @ weight.T + bias."""

    weight: Tensor  # [C, d] float32
    bias: Tensor  # [C] float32


class Signals(nn.Module):
    """A network whose answer is a dictionary of float32 rows."""

    def __init__(self, network: nn.Module, layers: Sequence[str], head: str | None) -> None:
        """`head` names the final linear layer of `network`, which is cut off when `penultimate` is asked for."""
        super().__init__()
        self.layers = tuple(layers)
        self.head: nn.Module | None = None
        if PENULTIMATE in layers:
            if head is None:
                raise Refused("penultimate was asked for, but the logits do not come from one final linear layer")
            self.head = network.get_submodule(head)
            network.set_submodule(head, nn.Identity())
        self.end = PENULTIMATE if self.head is not None else LOGITS
        inner = [layer for layer in layers if layer not in (LOGITS, PENULTIMATE)]
        self.has_inner = bool(inner)
        self.network = extractor(network, inner, self.end) if inner else network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        answer = self.network(x)
        found: dict[str, Tensor] = dict(answer) if self.has_inner else {self.end: answer}
        if self.head is not None:
            found[LOGITS] = self.head(found[PENULTIMATE])
        rows = {LOGITS: found[LOGITS].float()}
        return rows | {layer: pool(found[layer].float(), layer) for layer in self.layers if layer != LOGITS}


def extractor(network: nn.Module, layers: Sequence[str], end: str) -> nn.Module:
    """`network` with the outputs of `layers` beside its own, which is called `end`."""
    try:
        _, nodes = get_graph_node_names(network.eval(), suppress_diff_warning=True)
    except Exception as error:  # tracing runs the network's code, which may fail in any way
        reason = first_line(error)
        raise Refused(f"the layers of this network cannot be traced ({reason}); use logits and penultimate") from error
    named = {".".join(parts[:i]) for parts in (node.split(".") for node in nodes) for i in range(1, len(parts) + 1)}
    for layer in layers:
        if layer not in named:
            raise UsageError(f"the network has no layer {layer!r}; {nearest(layer, named)}")
        if layer == nodes[-1]:
            raise UsageError(f"layer {layer!r} is the network's output, which is always stored as {end!r}")
    outputs = {layer: layer for layer in layers} | {nodes[-1]: end}
    return create_feature_extractor(network, outputs, suppress_diff_warning=True).eval()  # type: ignore[no-any-return]


def nearest(layer: str, named: set[str]) -> str:
    """Near names, or the outermost ones: a network has hundreds."""
    hint = did_you_mean(layer, named)
    return hint if hint.startswith("did you mean") else did_you_mean(layer, {n for n in named if "." not in n})


def pool(found: Tensor, layer: str) -> Tensor:
    """One row per image. Views are square, which tells [B, C, H, W] from the [B, H, W, C] of Swin and ConvNeXt."""
    if found.ndim == 4 and found.shape[2] == found.shape[3]:
        return found.mean((2, 3))
    if found.ndim == 4 and found.shape[1] == found.shape[2]:
        return found.mean((1, 2))
    if found.ndim == 3:  # tokens
        return found.mean(1)
    if found.ndim != 2:
        raise Refused(f"layer {layer!r} gives {list(found.shape)}; expected rows, tokens or a square map per image")
    return found


@torch.no_grad()
def find_head(network: nn.Module, num_classes: int, probe: Tensor) -> str | None:
    """The name of the linear layer whose output is the network's output, found by running it on `probe`."""
    linears: dict[nn.Module, str] = {
        m: n for n, m in network.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_classes
    }
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[linears[module]] = (inputs[0], output)

    hooks = [module.register_forward_hook(keep) for module in linears]
    try:
        answer = network(probe)
    finally:
        for hook in hooks:
            hook.remove()
    for name, (features, output) in seen.items():
        if features.ndim == 2 and isinstance(answer, Tensor) and torch.equal(output, answer):
            return name
    return None
