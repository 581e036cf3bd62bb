"""The signals of a network: its logits and, on request, pooled layers.

A layer has its name in torchvision's feature extraction (`layer3`, `features.12`), or is `penultimate`: the input of
the final linear layer. Maps are averaged over space, tokens over the sequence: one vector per image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from redistill_cache.errors import Refused, UsageError
from redistill_cache.spec import LOGITS
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from redistill.specs import did_you_mean, first_line, listed

__all__ = [
    "HEAD_LOGITS",
    "LOGITS",
    "PENULTIMATE",
    "Head",
    "Signals",
    "Taps",
    "find_head",
    "logits_of",
    "pool",
    "stage_ends",
    "tap",
]

PENULTIMATE = "penultimate"
HEAD_LOGITS = "head_logits"
"""Logits of the last layer over detached features: their gradient reaches that layer and nothing before it."""
PROBE_SIZE = 64  # for networks with an unknown input size; any fully convolutional network accepts it


class Head(NamedTuple):
    """logits = features @ weight.T + bias."""

    weight: Tensor  # [C, d] float32
    bias: Tensor  # [C] float32


class Signals(nn.Module):
    """A network whose output is a dictionary of float32 rows: logits and the requested layers."""

    def __init__(self, network: nn.Module, layers: Sequence[str], head: str | None, *, pooled: bool = True) -> None:
        """`head` names the final linear layer of `network`. It is moved out of it: its input is `penultimate`, and it
        runs in float32 whatever the precision of the rest, since rounded logits have ties and cost twice the bytes.

        Without `pooled`, the outputs of layers are maps and tokens as they are.
        """
        super().__init__()
        self.pooled = pooled
        self.layers = tuple(layers)
        self.head: nn.Module | None = None
        if head is not None:
            self.head = network.get_submodule(head)
            network.set_submodule(head, nn.Identity())
        elif PENULTIMATE in layers:
            raise Refused("penultimate was requested, but the logits are not the output of one final linear layer")
        self.end = PENULTIMATE if self.head is not None else LOGITS
        inner = [layer for layer in layers if layer not in (LOGITS, PENULTIMATE)]
        self.nodes: dict[str, str] = {}
        self.network = network
        if inner:
            self.network, self.nodes = extractor(network, inner, self.end)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        output = self.network(x)
        outputs: dict[str, Tensor] = dict(output) if self.nodes else {self.end: logits_of(output)}
        if self.head is not None:
            with torch.autocast(x.device.type, enabled=False):
                outputs[LOGITS] = self.head(outputs[PENULTIMATE].float())
        rows = {LOGITS: outputs[LOGITS].float()}
        maps = {layer: outputs[self.nodes.get(layer, layer)].float() for layer in self.layers if layer != LOGITS}
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


def extractor(network: nn.Module, layers: Sequence[str], end: str) -> tuple[nn.Module, dict[str, str]]:
    """`network` with outputs beside its own, which gets the name `end`; and the name of the output of every layer.

    Layers may share one: the output of a stage is that of its last block. torchvision would give the second of two such
    layers the operation before it.
    """
    try:
        _, nodes = get_graph_node_names(network.eval(), suppress_diff_warning=True)
    except Exception as error:  # tracing runs the network's code, which may raise anything
        reason = first_line(error)
        raise Refused(f"the layers of this network cannot be traced ({reason}); use logits and penultimate") from error
    paths = [node.split(".") for node in nodes]
    last = {".".join(path[:i]): ".".join(path) for path in paths for i in range(1, len(path) + 1)}  # in this order
    for layer in layers:
        if layer not in last:
            raise UsageError(f"the network has no layer {layer!r}; {suggest(layer, {*last})}")
        if last[layer] == nodes[-1]:
            raise UsageError(f"layer {layer!r} is the network's output, which is always stored as {end!r}")
    found = {layer: last[layer] for layer in layers}
    outputs = {node: node for node in found.values()} | {nodes[-1]: end}
    return create_feature_extractor(network, outputs, suppress_diff_warning=True).eval(), found


def suggest(layer: str, names: set[str]) -> str:
    """Similar names, or the outermost ones, since a network has hundreds."""
    hint = did_you_mean(layer, names)
    return hint if hint.startswith("did you mean") else did_you_mean(layer, {n for n in names if "." not in n})


def pool(output: Tensor, layer: str) -> Tensor:
    """One row per image. Square maps distinguish [B, C, H, W] from the [B, H, W, C] of Swin and ConvNeXt."""
    if output.ndim == 4 and output.shape[2] == output.shape[3]:
        return mean_over(output, (2, 3))
    if output.ndim == 4 and output.shape[1] == output.shape[2]:
        return mean_over(output, (1, 2))
    if output.ndim == 3:  # tokens
        return mean_over(output, (1,))
    if output.ndim != 2:
        raise Refused(
            f"layer {layer!r}: expected rows, tokens or a square map per image, found an output {list(output.shape)}"
        )
    return output


def mean_over(output: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean over these dimensions. With a gradient, as a sum: that of a mean is written out at full size, in the
    wrong memory format for a network with channels last, which then computes its backward pass in that format."""
    if not output.requires_grad:
        return output.mean(dims)
    return output.sum(dims) / math.prod(output.shape[dim] for dim in dims)


# -- a student's layers -----------------------------------------------------------------------------------------------


class Taps(nn.Module):
    """A network whose output is a dictionary of float32 rows with gradient: logits and the requested layers.

    The network itself is not changed: it has the same parameters under the same names, and can be validated and saved.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], head: str | None, *, outputs: Sequence[str] = (LOGITS,)
    ) -> None:
        """`head` names the final linear layer; `outputs` are LOGITS, HEAD_LOGITS or both."""
        super().__init__()
        self.network, self.layers, self.outputs = network, tuple(layers), tuple(outputs)
        self.head_name = head
        self._maps: dict[str, Tensor] = {}
        self._listening = False
        if head is not None and (PENULTIMATE in layers or HEAD_LOGITS in outputs):
            network.get_submodule(head).register_forward_pre_hook(self._keep_input)
        for layer in layers:
            if layer != PENULTIMATE:
                network.get_submodule(layer).register_forward_hook(partial(self._keep_output, layer))

    @property
    def head(self) -> nn.Linear:
        """The final linear layer, for a loss that must train it alone: `head(rows["penultimate"].detach())`."""
        head = None if self.head_name is None else self.network.get_submodule(self.head_name)
        if not isinstance(head, nn.Linear):
            raise Refused("the logits of this network are not the output of one final linear layer")
        return head

    def _keep_input(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._listening:
            self._maps[PENULTIMATE] = inputs[0]

    def _keep_output(self, layer: str, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        del inputs
        if self._listening:
            self._maps[layer] = output

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self._listening = True
        logits = logits_of(self.network(x))
        self._listening = False
        rows: dict[str, Tensor] = self._rows(logits)
        return rows

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the maps lie in a dictionary, which is not worth tracing
    def _rows(self, logits: Tensor) -> dict[str, Tensor]:
        rows = {LOGITS: logits.float()} if LOGITS in self.outputs else {}
        if HEAD_LOGITS in self.outputs:
            rows[HEAD_LOGITS] = self.head(self._maps[PENULTIMATE].detach()).float()
        # Pooled at the end, as a teacher's layers are: what changes a map in place comes before it for both.
        rows |= {layer: pool(self._maps[layer].float(), layer) for layer in self.layers}
        self._maps.clear()
        return rows


def tap(model: nn.Module, layers: Sequence[str], *, probe: Tensor | None = None) -> Taps:
    """`model` with the rows of `layers` beside its logits: {"logits": [B, C], "layer3": [B, d], ...}, with gradient.

        student = redistill.tap(redistill.open_model("demo:small", num_classes=10).module, ["layer2", "penultimate"])
        rows = student(pixels)

    Layers are named and pooled as those of a teacher, but must be modules. `probe` is an input of the network, for one
    that does not accept 64 px.
    """
    layers = [layer for layer in dict.fromkeys(layers) if layer != LOGITS]
    return Taps(model, layers, look_into(model, layers, probe_of(model) if probe is None else probe).head)


class Layers(NamedTuple):
    """What a run over one batch shows of a network."""

    head: str | None
    """The name of the final linear layer, if its output is the logits."""
    widths: dict[str, int]
    """Of the requested layers."""


def look_into(model: nn.Module, layers: Sequence[str], probe: Tensor) -> Layers:
    """The head of a network and the widths of its layers; refused if it lacks one, or one is not a row per image."""
    inner = [layer for layer in layers if layer != PENULTIMATE]
    names = {name for name, _ in model.named_modules() if name}
    for layer in inner:
        if layer not in names:
            raise UsageError(f"the network has no layer {layer!r}; {suggest(layer, names | {PENULTIMATE})}")
    with in_eval_mode(model), torch.no_grad():
        head = find_head(model, logits_of(model(probe)).shape[1], probe)
        calls = outputs_in_order(model, probe)
    if PENULTIMATE in layers and head is None:
        raise Refused("the logits are not the output of one final linear layer, so there is no 'penultimate'")
    widths = {}
    for layer in inner:
        outputs = [output for name, output in calls if name == layer]
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
            found = f"{len(outputs)} outputs" if len(outputs) != 1 else type(outputs[0]).__name__
            raise UsageError(f"layer {layer!r}: expected a tensor once in a forward pass, found {found}")
        widths[layer] = pool(outputs[0], layer).shape[1]
    last = None if head is None else model.get_submodule(head)
    if isinstance(last, nn.Linear):
        widths[PENULTIMATE] = last.in_features
    return Layers(head, widths)


def outputs_in_order(network: nn.Module, probe: Tensor) -> list[tuple[str, Any]]:
    """(name, output) of every module that runs, in the order in which they end."""
    calls: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: calls.append((name, output)))
        for name, module in network.named_modules()
        if name
    ]
    try:
        network(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """The network in eval mode, so that a run over it changes no statistics."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def probe_of(network: nn.Module) -> Tensor:
    """Two small inputs on the device of the network."""
    own = next(iter(network.parameters()), torch.empty(0))
    return torch.zeros(2, 3, PROBE_SIZE, PROBE_SIZE, device=own.device)


# -- the ends of a network's stages -----------------------------------------------------------------------------------

# A container whose parts have this many resolutions is the trunk of a network, and is looked into; a stage changes the
# resolution once.
TRUNK_RESOLUTIONS = 3
# A network with one resolution (a vision transformer) is cut into this many equal parts.
PARTS = 4


def stage_ends(network: nn.Module, probe: Tensor) -> tuple[str, ...]:
    """The names of the last modules of each resolution, in depth order; of a transformer, of each quarter of it.

    layer1 to layer4 of a ResNet, features.1, .3, .5 and .7 of a ConvNeXt, encoder_layer_2, _5, _8 and _11 of a ViT-B.
    """
    with in_eval_mode(network), torch.no_grad():
        sides = {name: side_of(output) for name, output in outputs_in_order(network, probe)}
    ends = {side: name for name, side in parts_of_trunk(network, "", sides)}  # the last of each resolution
    names = [name for name, _ in parts_of_trunk(network, "", sides) if name in ends.values()]
    if len(names) > 1:
        return tuple(names)
    blocks = max(map(repeated_blocks, network.named_modules()), key=len)
    count = len(blocks)
    return tuple(blocks[count * (i + 1) // PARTS - 1] for i in range(PARTS)) if count >= PARTS else tuple(names)


def side_of(output: object) -> int | None:
    """The side of a square map; None for anything else."""
    if not isinstance(output, Tensor) or output.ndim != 4:
        return None
    if output.shape[2] == output.shape[3]:
        return output.shape[2]
    return output.shape[1] if output.shape[1] == output.shape[2] else None


def parts_of_trunk(module: nn.Module, prefix: str, sides: Mapping[str, int | None]) -> list[tuple[str, int]]:
    """(name, side) of the stages in a trunk, in order; its single layers only where it has nothing else."""
    children = [(f"{prefix}{name}", child) for name, child in module.named_children()]
    blocks = [(name, child) for name, child in children if any(True for _ in child.children())] or children
    parts: list[tuple[str, int]] = []
    for name, child in blocks:
        inside = {sides.get(f"{name}.{inner}") for inner, _ in child.named_children()} - {None}
        if len(inside) >= TRUNK_RESOLUTIONS:
            parts += parts_of_trunk(child, f"{name}.", sides)
        elif (side := sides.get(name)) is not None:
            parts.append((name, side))
    return parts


def repeated_blocks(named: tuple[str, nn.Module]) -> list[str]:
    """The names of the children of a sequence of blocks of one class; none for any other module."""
    name, module = named
    children = list(module.named_children()) if isinstance(module, nn.Sequential | nn.ModuleList) else []
    if len({type(child) for _, child in children}) != 1 or not any(True for _ in children[0][1].children()):
        return []
    return [f"{name}.{inner}" for inner, _ in children]


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
