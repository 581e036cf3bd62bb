"""Rank the layers of a teacher by their quality for distillation, on a pilot of images without augmentation.

The ranking is advice: nothing in redistill chooses layers by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from redistill_cache.errors import Refused
from redistill_cache.wording import human_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from redistill.caching.layer_quality import Quality, layer_quality
from redistill.caching.options import CacheOptions
from redistill.caching.pilot import TeacherRunner
from redistill.caching.plan import Plan, make_plan
from redistill.interrupts import stop_on_signals
from redistill.progress import NoProgress, Progress
from redistill.shares import Share
from redistill.signals import LOGITS, PENULTIMATE, pool
from redistill.teachers import Teacher, refuse_not_finite
from redistill.views import parse_recipe

__all__ = ["ADVICE", "LayerRanking", "RankedLayer", "rank_layers"]

ADVICE = (
    "Q compares the layers of one teacher on the same images. It is advice: students of layers with a high Q are not "
    "always better than students of the ends of the stages, which --loss features uses."
)
Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]

# As published: 5,000 images, at most 500 of a class, and maps of at most this many values.
MOST_IMAGES, MOST_OF_A_CLASS, MOST_VALUES = 5000, 500, 262_144
# With many classes, fewer classes rather than fewer images of each.
LEAST_OF_A_CLASS = 5
# The outputs of all layers for all images of the pilot take at most this much memory.
MEMORY = 2 * 2**30
# Lists of modules, whose items are blocks. Subclasses are blocks themselves, such as torchvision's.
CONTAINERS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class RankedLayer:
    layer: str
    shape: tuple[int, ...]
    """Of its output for one image."""
    quality: Quality
    """Of the whole output, as published."""
    pooled: Quality
    """Of the pooled row, which is what an archive stores."""
    rank: int
    """By Q of the whole output; 1 is the highest."""

    def to_json(self) -> dict[str, Any]:
        names = {"layer": self.layer, "shape": list(self.shape), "rank": self.rank, "q": self.quality.q}
        return names | self.quality._asdict() | {"pooled": {"q": self.pooled.q, **self.pooled._asdict()}}


@dataclass(frozen=True)
class LayerRanking:
    teacher: str
    images: int
    classes: int
    layers: tuple[RankedLayer, ...]
    """From the input of the network to its output."""

    def table(self) -> list[tuple[str, ...]]:
        """Of each layer its name, output, rank, Q, S, I, E, and Q of its pooled rows, as text."""
        return [
            (
                layer.layer,
                " x ".join(map(str, layer.shape)),
                str(layer.rank),
                *(f"{value:.3f}" for value in (layer.quality.q, *layer.quality, layer.pooled.q)),
            )
            for layer in self.layers
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "classes": self.classes,
            "advice": ADVICE,
            "layers": [layer.to_json() for layer in self.layers],
        }


def rank_layers(options: CacheOptions, progress: Progress | None = None) -> LayerRanking:
    """Rank the layers in `options.signals`, or if it names none, the blocks of the network. Writes nothing."""
    progress = progress or NoProgress()
    with stop_on_signals() as stop:
        # Of the network alone: an archive at `out` would decide which layers its teacher has.
        alone = replace(options, signals=(LOGITS,), out=options.out / "ranking")
        plan = unaugmented(make_plan(alone, Share()))
        labels = plan.index.labels
        refuse_few_labels(labels)
        noise = torch.zeros(2, 3, plan.recipe.size, plan.recipe.size, dtype=torch.uint8)
        layers = tuple(name for name in options.signals if name != LOGITS) or blocks(plan.teacher, noise)
        plan = replace(plan, teacher=with_maps(plan.teacher, layers))
        shapes = {layer: output.shape[1:] for layer, output in plan.teacher(noise).items() if layer != LOGITS}
        rows = balanced_rows(labels, most_images(shapes))
        with TeacherRunner(plan, stop) as runner:
            outputs = collect_outputs(runner, rows, progress)
    qualities = {}
    for done, layer in enumerate(layers):
        progress.advance("layers", done, len(layers))
        whole, pooled = outputs.pop(layer)
        qualities[layer] = layer_quality(whole, labels[rows]), layer_quality(pooled, labels[rows])
    order = sorted(layers, key=lambda layer: -qualities[layer][0].q)
    return LayerRanking(
        teacher=plan.teacher_name,
        images=len(rows),
        classes=len(np.unique(labels[rows])),
        layers=tuple(
            RankedLayer(layer, tuple(shapes[layer]), *qualities[layer], rank=order.index(layer) + 1) for layer in layers
        ),
    )


# -- which layers -----------------------------------------------------------------------------------------------------


def blocks(teacher: Teacher, pixels: Tensor) -> tuple[str, ...]:
    """The blocks of the network in the order in which they run, and penultimate."""
    network = teacher.model.module
    candidates = {network.get_submodule(name): name for name in items_of_containers(network)}
    found: dict[str, None] = {}

    def record(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim in (3, 4):
            found[candidates[module]] = None

    hooks = [module.register_forward_hook(record) for module in candidates]
    try:
        teacher(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    layers = (*found, *([PENULTIMATE] if teacher.head_name is not None else []))
    if not layers:
        raise Refused(f"no blocks were found in {teacher.model.spec!r}; name the layers to rank with --signals")
    return layers


def items_of_containers(module: nn.Module, path: str = "") -> Iterator[str]:
    """The items of the outermost lists of modules, and of lists in them: blocks and activations, not their parts."""
    inside = type(module) in CONTAINERS
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if type(child) in CONTAINERS or not inside:
            yield from items_of_containers(child, child_path)
        elif next(child.children(), None) is not None or type(child).__module__ == nn.ReLU.__module__:
            yield child_path


def with_maps(teacher: Teacher, layers: Sequence[str]) -> Teacher:
    """The same teacher, whose outputs are those of `layers`, not pooled."""
    return Teacher(
        teacher.model,
        device=teacher.device,
        amp=teacher.amp,
        channels_last=teacher.memory_format is torch.channels_last,
        layers=layers,
        pooled=False,
    )


# -- which images -----------------------------------------------------------------------------------------------------


def unaugmented(plan: Plan) -> Plan:
    """The same images in one view: the central crop, at the recipe's size and interpolation."""
    recipe = replace(plan.recipe, steps=parse_recipe(f"center?size={plan.recipe.size}").steps)
    return replace(plan, spec=replace(plan.spec, recipe=recipe.to_json(), view_arrays=recipe.arrays(), num_views=1))


def refuse_few_labels(labels: Labels) -> None:
    classes = rows_of_classes(labels)
    if len(classes) < 2:
        raise Refused(
            "layers are ranked by the classes of the images: expected at least two classes with two labelled images "
            f"each, found {len(classes)} among {len(labels):,} images, {int((labels >= 0).sum()):,} of them labelled"
        )


def most_images(shapes: Mapping[str, Sequence[int]]) -> int:
    """As many images as are published, or as fit into memory."""
    nbytes = 4 * sum(shrink(torch.empty(1, *shape, device="meta")).numel() for shape in shapes.values())
    if 2 * LEAST_OF_A_CLASS * nbytes > MEMORY:
        raise Refused(
            f"the outputs of {len(shapes)} layers take {human_bytes(nbytes)} for an image, too much to rank them "
            "together; name fewer with --signals"
        )
    return min(MOST_IMAGES, MEMORY // nbytes)


def rows_of_classes(labels: Labels) -> list[Labels]:
    """The rows of every class with at least two."""
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    return [np.flatnonzero(labels == label) for label in classes[counts >= 2]]


def balanced_rows(labels: Labels, most: int) -> Labels:
    """At most about `most` rows, the same number of every class where there are enough, evenly spread."""
    classes = rows_of_classes(labels)
    each = min(max(most // len(classes), LEAST_OF_A_CLASS), MOST_OF_A_CLASS)
    used = evenly(np.arange(len(classes)), most // each)
    return np.concatenate([evenly(classes[k], each) for k in used])


def evenly(items: Labels, count: int) -> Labels:
    count = min(count, len(items))
    return items[np.arange(count) * len(items) // count]


# -- their outputs ----------------------------------------------------------------------------------------------------


def collect_outputs(runner: TeacherRunner, rows: Labels, progress: Progress) -> dict[str, tuple[Rows, Rows]]:
    """Of every layer the outputs as they are, shrunk where they are large, and pooled: one row per image."""
    plan, size = runner.plan, runner.plan.options.batch_size
    outputs: dict[str, tuple[Rows, Rows]] = {}
    batches = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    for batch, _, signals in runner.run((batch, runner.indices(0, rows[batch])) for batch in batches):
        for layer, output in signals.items():
            if layer == LOGITS:
                continue
            refuse_not_finite(plan.teacher, {layer: output.flatten(1)})
            parts = shrink(output), pool(output, layer)
            if layer not in outputs:
                whole, pooled = (np.empty((len(rows), part.shape[1]), np.float32) for part in parts)
                outputs[layer] = whole, pooled
            for array, part in zip(outputs[layer], parts, strict=True):
                array[batch] = part.cpu().numpy()
        progress.advance("pilot", batch.stop, len(rows))
    return outputs


def shrink(output: Tensor) -> Tensor:
    """One row per image: [B, D]. Max pooling halves the sides of maps, or the sequence of tokens, while D is large."""
    if output.ndim == 4 and output.shape[2] != output.shape[3]:  # channels last, as in `signals.pool`
        output = output.permute(0, 3, 1, 2)
    elif output.ndim == 3:
        output = output.transpose(1, 2)
    while output[0].numel() > MOST_VALUES and output.ndim > 2 and output.shape[-1] > 1:
        output = F.max_pool2d(output, 2) if output.ndim == 4 else F.max_pool1d(output, 2)
    return output.flatten(1)
