"""The signals of a network: its logits and, on request, pooled layers.

A layer has its name in torchvision's feature extraction (`layer3`, `features.12`), or is `penultimate`: the input of
the final linear layer. Maps are averaged over space, tokens over the sequence: one vector per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from redistill_cache.errors import Refused, UsageError
from redistill_cache.spec import LOGITS
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from redistill.specs import did_you_mean, first_line, listed

__all__ = ["LOGITS", "PENULTIMATE", "Head", "Signals", "find_head", "logits_of", "pool"]

PENULTIMATE = "penultimate"


class Head(NamedTuple):
    """logits = features @ weight.T + bias."""

    weight: Tensor  # [C, d] float32
    bias: Tensor  # [C] float32


class Signals(nn.Module):
    """A network whose output is a dictionary of float32 rows: logits and the requested layers."""

    def __init__(self, network: nn.Module, layers: Sequence[str], head: str | None, *, pooled: bool = True) -> None:
        """`head` names the final linear layer of `network`; if `penultimate` is requested, it is moved out of it.

        Without `pooled`, the outputs of layers are maps and tokens as they are.
        """
        super().__init__()
        self.pooled = pooled
        self.layers = tuple(layers)
        self.head: nn.Module | None = None
        if PENULTIMATE in layers:
            if head is None:
                raise Refused("penultimate was requested, but the logits are not the output of one final linear layer")
            self.head = network.get_submodule(head)
            network.set_submodule(head, nn.Identity())
        self.end = PENULTIMATE if self.head is not None else LOGITS
        inner = [layer for layer in layers if layer not in (LOGITS, PENULTIMATE)]
        self.has_inner = bool(inner)
        self.network = extractor(network, inner, self.end) if inner else network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        output = self.network(x)
        outputs: dict[str, Tensor] = dict(output) if self.has_inner else {self.end: logits_of(output)}
        if self.head is not None:
            outputs[LOGITS] = self.head(outputs[PENULTIMATE])
        rows = {LOGITS: outputs[LOGITS].float()}
        maps = {layer: outputs[layer].float() for layer in self.layers if layer != LOGITS}
        return rows | ({layer: pool(output, layer) for layer, output in maps.items()} if self.pooled else maps)


def logits_of(output: object) -> Tensor:
    """The logits in the output of a network: a tensor, or in `logits` of a dictionary or of an object."""
    logits = output.get(LOGITS) if isinstance(output, Mapping) else getattr(output, LOGITS, output)
    if isinstance(logits, Tensor):
        return logits
    found = type(output).__name__
    if isinstance(output, Mapping):
        found += f" with the keys {listed(map(str, output))}"
    raise Refused(f"expected a network that returns a tensor, or one in .logits or ['logits'], found {found}")


def extractor(network: nn.Module, layers: Sequence[str], end: str) -> nn.Module:
    """`network` with the outputs of `layers` in addition to its own, which gets the name `end`."""
    try:
        _, nodes = get_graph_node_names(network.eval(), suppress_diff_warning=True)
    except Exception as error:  # tracing runs the network's code, which may raise anything
        reason = first_line(error)
        raise Refused(f"the layers of this network cannot be traced ({reason}); use logits and penultimate") from error
    names = {".".join(parts[:i]) for parts in (node.split(".") for node in nodes) for i in range(1, len(parts) + 1)}
    for layer in layers:
        if layer not in names:
            raise UsageError(f"the network has no layer {layer!r}; {suggest(layer, names)}")
        if layer == nodes[-1]:
            raise UsageError(f"layer {layer!r} is the network's output, which is always stored as {end!r}")
    outputs = {layer: layer for layer in layers} | {nodes[-1]: end}
    return create_feature_extractor(network, outputs, suppress_diff_warning=True).eval()  # type: ignore[no-any-return]


def suggest(layer: str, names: set[str]) -> str:
    """Similar names, or the outermost ones, since a network has hundreds."""
    hint = did_you_mean(layer, names)
    return hint if hint.startswith("did you mean") else did_you_mean(layer, {n for n in names if "." not in n})


def pool(output: Tensor, layer: str) -> Tensor:
    """One row per image. Square maps distinguish [B, C, H, W] from the [B, H, W, C] of Swin and ConvNeXt."""
    if output.ndim == 4 and output.shape[2] == output.shape[3]:
        return output.mean((2, 3))
    if output.ndim == 4 and output.shape[1] == output.shape[2]:
        return output.mean((1, 2))
    if output.ndim == 3:  # tokens
        return output.mean(1)
    if output.ndim != 2:
        raise Refused(
            f"layer {layer!r}: expected rows, tokens or a square map per image, found an output {list(output.shape)}"
        )
    return output


@torch.no_grad()
def find_head(network: nn.Module, num_classes: int, probe: Tensor) -> str | None:
    """The name of the linear layer whose output is the network's output, from a run over `probe`."""
    linears: dict[nn.Module, str] = {
        m: n for n, m in network.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_classes
    }
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[linears[module]] = (inputs[0], output)

    hooks = [module.register_forward_hook(record) for module in linears]
    try:
        logits = logits_of(network(probe))
    finally:
        for hook in hooks:
            hook.remove()
    for name, (features, output) in calls.items():
        if features.ndim == 2 and torch.equal(output, logits):
            return name
    return None
