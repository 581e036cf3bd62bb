"""From options to everything stage 1 works with: source, recipe, teacher, and the specification of the archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from redistill_cache import ArchiveSpec
from redistill_cache.errors import Refused, UsageError

from redistill.caching.options import CacheOptions
from redistill.devices import pick_amp, pick_device
from redistill.loading import default_workers
from redistill.models import OpenedModel, open_model
from redistill.ranks import Rank
from redistill.sources.base import Source
from redistill.sources.index import SourceIndex, index_source
from redistill.sources.open_source import open_source
from redistill.teachers import Teacher
from redistill.views import DrawnViews, Recipe, ViewDataset, parse_recipe
from redistill.views.canaries import CANARIES_PER_VIEW, view_environment

__all__ = ["Plan", "following", "make_plan", "with_views"]

# Networks made for images below this size are trained on padded crops, others on random resized crops.
SMALL_INPUT = 64
# A block is what a crash can cost. So many of them make a view, unless that would make very small or very large ones:
# committing one takes some tens of milliseconds, whatever it holds, and small views are answered for in much less.
BLOCKS_PER_VIEW = 64
FEWEST_ROWS = {True: 4096, False: 1024}  # of small views, of others
MOST_ROWS = 65536
# One canary for so many samples, within bounds: rendering them must cost next to nothing.
SAMPLES_PER_CANARY = 256
FEWEST_CANARIES = 16


@dataclass(frozen=True)
class Plan:
    """What is to be done. Two runs with equal `spec` and `model` write the same archive."""

    options: CacheOptions
    rank: Rank
    source: Source
    index: SourceIndex
    teacher: Teacher
    spec: ArchiveSpec
    teacher_name: str
    model: dict[str, Any]
    """What the archive says about the teacher: the network, and every option that decides what it says."""
    workers: int

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_json(self.spec.recipe)

    @property
    def views(self) -> DrawnViews:
        return DrawnViews(self.index, self.recipe, seed=self.spec.seed, num_views=self.spec.num_views)

    @property
    def dataset(self) -> ViewDataset:
        return ViewDataset(self.source, self.views)

    @property
    def part(self) -> str:
        return f"teachers/{self.teacher_name}"


def make_plan(options: CacheOptions, rank: Rank, progress: Callable[[int, int], None] | None = None) -> Plan:
    """Open everything and hold it against each other. Nothing is written."""
    model = open_model(options.teacher, allow_python=options.allow_python)
    recipe = choose_recipe(options, model)
    device = pick_device(options.device, local_rank=rank.local)
    teacher = Teacher(
        model,
        device=device,
        amp=pick_amp(device, options.amp),
        channels_last=options.channels_last,
        compile=options.compile,
        layers=options.layers,
    )
    source = open_source(options.data)
    if not len(source):
        raise Refused(f"{options.data} holds no images")
    check_classes(source.class_names, model)
    # This takes long in a large set: so only now, when whatever can be refused without it has been.
    workers = default_workers(rank.local_world) if options.workers is None else options.workers
    index = index_source(source, workers=None if workers else 0, progress=progress, on_bad_image=options.on_bad_image)
    check_labels(index, model)
    return Plan(
        options=options,
        rank=rank,
        source=source,
        index=index,
        teacher=teacher,
        spec=archive_spec(options, source, index, recipe, model.num_classes),
        teacher_name=options.name_of_teacher(model.name),
        model=describe_teacher(options, teacher),
        workers=workers,
    )


def choose_recipe(options: CacheOptions, model: OpenedModel) -> Recipe:
    """The recipe asked for, at the size asked for; else what fits the teacher."""
    small = model.input_size is not None and model.input_size < SMALL_INPUT
    text = options.recipe or ("cifar" if small else "rrc")
    head, _, tail = text.partition("?")
    stated = head.endswith(".toml") or any(pair.startswith("size=") for pair in tail.split("&"))
    if options.size is not None and stated:
        raise UsageError(f"--size {options.size} and the recipe {text!r} both say how large views are; keep one")
    size = options.size or model.input_size
    if not stated and size is not None:
        text = f"{text}{'&' if tail else '?'}size={size}"
    return parse_recipe(text)


def check_classes(names: tuple[str, ...] | None, model: OpenedModel) -> None:
    """A teacher of other classes answers just as confidently, so this is looked at before it is asked."""
    if names is not None and len(names) != model.num_classes:
        raise Refused(
            f"the data has {len(names)} classes, the teacher {model.spec!r} answers for {model.num_classes}; "
            "use the teacher of these classes, or data without labels"
        )


def check_labels(index: SourceIndex, model: OpenedModel) -> None:
    """The same for data that does not name its classes."""
    highest = int(index.labels.max(initial=-1))
    if highest >= model.num_classes:
        raise Refused(
            f"the data has the label {highest}, the teacher {model.spec!r} answers for {model.num_classes} classes; "
            "use the teacher of these classes, or data without labels"
        )


def archive_spec(
    options: CacheOptions, source: Source, index: SourceIndex, recipe: Recipe, num_classes: int
) -> ArchiveSpec:
    count = len(index)
    if not count:
        raise Refused(f"{options.data}: every image was excluded")
    return ArchiveSpec(
        num_samples=count,
        num_views=options.views,
        num_classes=num_classes,
        class_names=index.class_names,
        block_rows=options.block_rows or rows_of_block(count, small=recipe.size < SMALL_INPUT),
        recipe=recipe.to_json(),
        seed=options.seed,
        view_arrays=recipe.arrays(),
        canaries_per_view=min(count, max(FEWEST_CANARIES, min(CANARIES_PER_VIEW, count // SAMPLES_PER_CANARY))),
        source=source.description,
        excluded=tuple({"key": key, "reason": reason} for key, reason in index.excluded),
        licence=options.licence,
        citation=options.citation,
        environment=view_environment(),
    )


def rows_of_block(count: int, *, small: bool) -> int:
    """A power of two that makes at most `BLOCKS_PER_VIEW` blocks of a view, within bounds."""
    rows = FEWEST_ROWS[small]
    while rows < MOST_ROWS and rows * BLOCKS_PER_VIEW < count:
        rows *= 2
    return rows


def describe_teacher(options: CacheOptions, teacher: Teacher) -> dict[str, Any]:
    """The network and whatever else decides the stored numbers: on resume, each of these must be what it was."""
    asked = {
        "device": teacher.device.type,
        "precision": str(teacher.amp or torch.float32).removeprefix("torch."),
        "channels_last": options.channels_last,
        "compile": options.compile,
        "batch_size": options.batch_size,
        "codec": options.codec,
        "fidelity": options.fidelity,
        "feature_fidelity": options.feature_fidelity,
        "keep_shift": options.keep_shift,
        "signals": list(options.signals),
    }
    return teacher.model.describe() | asked


def following(plan: Plan, stored: ArchiveSpec) -> Plan:
    """The plan for an archive that is there: in what nobody said now, it decides."""
    options = plan.options
    said = {
        "canaries_per_view": False,
        "num_views": not options.extend_views,
        "block_rows": options.block_rows is not None,
        "licence": bool(options.licence),
        "citation": bool(options.citation),
    }
    kept = {name: getattr(stored, name) for name, is_said in said.items() if not is_said}
    return replace(plan, spec=replace(plan.spec, **kept))


def with_views(plan: Plan, views: int) -> Plan:
    """The same plan for another number of views."""
    return replace(plan, spec=replace(plan.spec, num_views=views))
