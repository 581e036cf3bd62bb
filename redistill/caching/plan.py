"""From options to everything stage 1 works with: source, recipe, teacher, and the specification of the archive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from redistill_cache import ArchiveSpec, TeacherSpec
from redistill_cache.errors import Refused, UsageError
from redistill_cache.spec import LOGITS, TERMS
from redistill_cache.spec_files import list_teachers, read_root, read_teachers

from redistill.caching.additions import Part, parts_to_write
from redistill.caching.options import CacheOptions
from redistill.devices import pick_amp, pick_device
from redistill.loading import default_workers
from redistill.models import OpenedModel, open_model
from redistill.shares import Share
from redistill.sources.base import Source
from redistill.sources.index import SourceIndex, index_source
from redistill.sources.open_source import open_source
from redistill.teachers import Teacher
from redistill.views import DrawnViews, Recipe, ViewDataset, parse_recipe, recipe_text
from redistill.views.canaries import CANARIES_PER_VIEW, view_environment
from redistill.views.stream_order import refuse_mixing

__all__ = ["Plan", "default_block_rows", "default_canaries", "make_plan", "use_stored_settings"]

# Networks for images below this size are trained on padded crops, others on random resized crops.
SMALL_INPUT = 64
# A crash loses at most the block in progress. Aim for this many blocks per view, within limits on the rows of a block:
# a commit takes some tens of milliseconds whatever its size, longer than the teacher needs for many small views.
BLOCKS_PER_VIEW = 64
MIN_BLOCK_ROWS = 1024
MIN_BLOCK_ROWS_SMALL_VIEWS = 4096
MAX_BLOCK_ROWS = 65536
# One canary per this many samples, within limits: the time to render them must be negligible.
SAMPLES_PER_CANARY = 256
MIN_CANARIES = 16


@dataclass(frozen=True)
class Plan:
    """The inputs of a run. Two runs with equal `spec` and `model` write the same archive."""

    options: CacheOptions
    share: Share
    source: Source
    index: SourceIndex
    teacher: Teacher
    spec: ArchiveSpec
    part: Part
    """What is written: of `parts`, one at a time."""
    parts: tuple[Part, ...]
    model: dict[str, Any]
    """The description of the teacher in the archive: the network, and every option that affects the stored values."""
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
    def teacher_name(self) -> str:
        """The teacher in the archive, whose signals `part` holds."""
        return self.part.owner

    @property
    def folder(self) -> str:
        """The part, as blocks and their records name it."""
        return f"teachers/{self.part.name}"

    @property
    def batch_size(self) -> int:
        return self.part.batch_size or self.options.batch_size

    def of(self, part: Part) -> Plan:
        """The plan to write this part."""
        return replace(self, part=part, model=self.model | {"signals": list(part.signals)})

    def settings_in_effect(self) -> dict[str, str]:
        """Defaults, the archive's own settings and the command line together, as text."""
        model, spec, options = self.model, self.spec, self.options
        means, deviations = (
            ", ".join(f"{x:.4g}" for x in v) for v in (self.teacher.model.mean, self.teacher.model.std)
        )
        codec = options.codec
        if LOGITS in options.signals:
            codec += f", KL at most {options.fidelity:g} in every row"
        if set(options.signals) - {LOGITS}:
            codec += f", error of features at most {options.feature_fidelity:g} of the distance from the mean row"
        return {
            "data": f"{options.data}, {spec.num_samples:,} images",
            "teacher": f"{options.teacher}, named {self.teacher_name}",
            "normalisation": f"mean {means}, std {deviations}",
            "signals": ", ".join(options.signals) + (", with the mean of each row" if options.keep_shift else ""),
            "views": f"{spec.num_views:,} per image, seed {spec.seed}",
            "recipe": recipe_text(self.recipe),
            "codec": codec,
            "batch": f"{options.batch_size:,}, blocks of {spec.block_rows:,} rows, {self.workers} rendering processes",
            "device": f"{model['device']}, {model['precision']}"
            + (f", share {self.share.index} of {self.share.count}" if self.share.count > 1 else ""),
        }


def make_plan(options: CacheOptions, share: Share, progress: Callable[[int, int], None] | None = None) -> Plan:
    """Open data and teacher, and check that they fit each other. Nothing is written."""
    if isinstance(options.teacher, OpenedModel):
        model = options.teacher
    else:
        model = open_model(options.teacher, allow_python=options.allow_python)
    recipe = choose_recipe(options, model)
    device = pick_device(options.device, local_rank=share.local_rank)
    name = options.name_of_teacher(model.name)
    parts = parts_to_write(name, options.signals, declared_teachers(options), every=options.extend_views)
    teacher = Teacher(
        model,
        device=device,
        amp=pick_amp(device, options.amp),
        channels_last=options.channels_last,
        compile=options.compile,
        batch_size=options.batch_size,
        layers=list(dict.fromkeys(signal for part in parts for signal in part.signals if signal != LOGITS)),
    )
    source = open_source(options.data, stream_cache=options.stream_cache)
    refuse_mixing(source, recipe)
    if not len(source):
        raise Refused(f"{options.data} holds no images")
    check_classes(source.class_names, model)
    # Last, because indexing reads every image: all checks that do not need the index come before it.
    workers = default_workers(share.local_count) if options.workers is None else options.workers
    index = index_source(
        source,
        workers=None if workers else 0,
        progress=progress,
        on_bad_image=options.on_bad_image,
        without=[item["key"] for item in excluded_before(options)],
    )
    check_labels(index, model)
    return Plan(
        options=options,
        share=share,
        source=source,
        index=index,
        teacher=teacher,
        spec=archive_spec(options, source, index, recipe, model.num_classes),
        part=parts[0],
        parts=parts,
        model=describe_teacher(options, teacher) | {"signals": list(parts[0].signals)},
        workers=workers,
    )


def declared_teachers(options: CacheOptions) -> dict[str, TeacherSpec]:
    """The teachers of the archive that is continued, finished or not."""
    path = options.out
    if not (path / "zarr.json").exists():
        return {}
    root = read_root(path)
    return {name: document.spec for name, document in read_teachers(path, list_teachers(path), root).items()}


def excluded_before(options: CacheOptions) -> tuple[Mapping[str, str], ...]:
    """What the archive that is continued excludes: these images are left out again, whatever they are now."""
    return read_root(options.out).spec.excluded if (options.out / "zarr.json").exists() else ()


def choose_recipe(options: CacheOptions, model: OpenedModel) -> Recipe:
    """The requested recipe and view size; where one is not set, the default for this teacher."""
    is_small = model.view_size is not None and model.view_size < SMALL_INPUT
    text = options.recipe or ("cifar" if is_small else "rrc")
    name, _, parameters = text.partition("?")
    sets_size = name.endswith(".toml") or any(pair.startswith("size=") for pair in parameters.split("&"))
    if options.size is not None and sets_size:
        raise UsageError(f"--size {options.size} and the recipe {text!r} both set the size of the views; drop one")
    size = options.size or model.view_size
    if not sets_size and size is not None:
        text = f"{text}{'&' if parameters else '?'}size={size}"
    return parse_recipe(text)


def check_classes(names: tuple[str, ...] | None, model: OpenedModel) -> None:
    """A teacher of other classes gives confident logits too, so check before it runs."""
    if names is not None and len(names) != model.num_classes:
        raise Refused(
            f"the data has {len(names)} classes, the teacher {model.spec!r} predicts {model.num_classes}; "
            "use a teacher of these classes, or data without labels"
        )


def check_labels(index: SourceIndex, model: OpenedModel) -> None:
    """The same check for data without class names."""
    highest = int(index.labels.max(initial=-1))
    if highest >= model.num_classes:
        raise Refused(
            f"the data has the label {highest}, the teacher {model.spec!r} predicts {model.num_classes} classes; "
            "use a teacher of these classes, or data without labels"
        )


def archive_spec(
    options: CacheOptions, source: Source, index: SourceIndex, recipe: Recipe, num_classes: int
) -> ArchiveSpec:
    count = len(index)
    if not count:
        raise Refused(f"{options.data}: every image was excluded")
    return ArchiveSpec(
        num_samples=count,
        num_views=options.views or 1,
        num_classes=num_classes,
        class_names=index.class_names,
        block_rows=options.block_rows or default_block_rows(count, recipe.size),
        recipe=recipe.to_json(),
        seed=options.seed or 0,
        view_arrays=recipe.arrays(),
        canaries_per_view=default_canaries(count),
        source=source.description,
        excluded=tuple({"key": key, "reason": reason} for key, reason in index.excluded),
        environment=view_environment(),
        **{name: getattr(options, name) for name in TERMS},
    )


def default_canaries(count: int) -> int:
    """The canaries of each view of so many samples."""
    return min(count, max(MIN_CANARIES, min(CANARIES_PER_VIEW, count // SAMPLES_PER_CANARY)))


def default_block_rows(count: int, view_size: int) -> int:
    """A power of two with at most `BLOCKS_PER_VIEW` blocks per view, within limits."""
    rows = MIN_BLOCK_ROWS_SMALL_VIEWS if view_size < SMALL_INPUT else MIN_BLOCK_ROWS
    while rows < MAX_BLOCK_ROWS and rows * BLOCKS_PER_VIEW < count:
        rows *= 2
    return rows


def describe_teacher(options: CacheOptions, teacher: Teacher) -> dict[str, Any]:
    """The network and every setting that affects the stored values. On resume, all of them must be the same."""
    settings = {
        "device": teacher.device.type,
        "precision": teacher.precision,
        "channels_last": options.channels_last,
        "compile": options.compile,
        "batch_size": options.batch_size,
        "codec": options.codec,
        "fidelity": options.fidelity,
        "feature_fidelity": options.feature_fidelity,
        "keep_shift": options.keep_shift,
    }
    return teacher.model.describe() | settings


def use_stored_settings(plan: Plan, stored: ArchiveSpec) -> Plan:
    """The plan for an existing archive: settings that this run does not set are those of the archive."""
    options = plan.options
    sets_recipe = options.recipe is not None or options.size is not None
    is_set = {
        "canaries_per_view": False,
        "seed": options.seed is not None,
        "recipe": sets_recipe,
        "view_arrays": sets_recipe,
        "block_rows": options.block_rows is not None,
        **dict.fromkeys(TERMS, False),
        # The reasons are those of the first run.
        "excluded": {item["key"] for item in plan.spec.excluded} != {item["key"] for item in stored.excluded},
    }
    stored_values = {name: getattr(stored, name) for name, value in is_set.items() if not value}
    return replace(plan, spec=replace(plan.spec, **stored_values))
