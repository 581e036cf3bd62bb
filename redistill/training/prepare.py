"""Everything a run needs, opened and checked against each other before the first step.

Checks that take no time come first: a typo in a loss is reported before a million images are indexed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from redistill_cache import Archive, open_archive
from redistill_cache.errors import Refused, UsageError
from torch import Tensor

from redistill.devices import pick_amp
from redistill.loading import default_workers
from redistill.losses.objective import Mix, Objective
from redistill.models import OpenedModel, open_model
from redistill.progress import Progress
from redistill.ranks import World
from redistill.signals import LOGITS
from redistill.specs import first_line
from redistill.teachers import Teacher
from redistill.training.archive_use import ArchiveUse
from redistill.training.feed import Feed
from redistill.training.member import Member
from redistill.training.options import MemberSpec, TrainOptions
from redistill.training.targets import CachedTargets, OnlineTargets, SharedViews
from redistill.training.validate import Validation, validation_recipe
from redistill.views import archive_recipe
from redistill.views.aligned import AlignedViews, aligned_views
from redistill.views.canaries import Alignment
from redistill.views.view_params import excluded_keys

__all__ = ["TrainSetup", "prepare"]


@dataclass(frozen=True)
class TrainSetup:
    """A run that is opened and checked."""

    archive: Archive
    use: ArchiveUse
    feed: Feed
    members: list[Member]
    targets: CachedTargets | OnlineTargets | None
    """None if no loss needs a teacher."""
    validation: Validation | None
    alignment: Alignment


def prepare(options: TrainOptions, world: World, progress: Progress, saved: ArchiveUse | None = None) -> TrainSetup:
    """`saved` is what an earlier part of the run read of the archive: a resumed run reads the same."""
    with world.local_first():
        archive = open_archive(options.archive)
    specs = options.members
    objectives = [Objective(spec.losses) for spec in specs]
    cached = options.online_teacher is None and any(objective.needs.teacher for objective in objectives)
    use = choose_use(options, archive, saved, cached)
    if options.views_per_image > use.views:
        raise Refused(f"--views-per-image must be at most the number of views, and the archive has {use.views}")
    if use.views < archive.num_views:
        progress.info(f"training uses the first {use.views} of the archive's {archive.num_views} views")
    for objective in objectives:
        refuse_objective(objective, archive, options, use.teachers)
    size = archive_recipe(archive).size if options.size is None else options.size
    students = [open_student(spec, archive, size, options) for spec in specs]
    amp = pick_amp(world.device, options.amp)
    targets = make_targets(options, objectives, archive, use.teachers, world, amp)
    if isinstance(targets, CachedTargets) and targets.shared_views.spilled:
        progress.info("the teacher rows of two views exceed --cache-memory; they are in a temporary file")
    workers = default_workers(world.rank.local_world_size) if options.workers is None else options.workers
    with world.local_first():
        views = open_views(options, archive, workers, progress)
        dataset = views.dataset
        validation = None
        if options.val_share is not None:
            held_out = held_out_rows(archive, options.val_share, options.order_seed)
            progress.info(
                f"validation: {len(held_out):,} of {archive.num_samples:,} images are held out, the share "
                f"{options.val} of every class, drawn with --order-seed {options.order_seed}"
            )
            validation = Validation.of_rows(
                dataset,
                held_out,
                class_names=archive.class_names,
                size=size,
                without=excluded_keys(archive),
                workers=workers,
                rank=world.rank.rank,
                world_size=world.size,
            )
            dataset = dataset.without(held_out)
        elif options.val is not None:
            validation = open_validation(options, archive, size, workers, world)
    feed = Feed(
        dataset,
        epochs=options.optim.epochs,
        batch_size=options.batch_size,
        seed=options.order_seed,
        views_per_image=options.views_per_image,
        num_views=use.views,
        rank=world.rank.rank,
        world_size=world.size,
        workers=workers,
        device=world.device,
    )
    feed.global_batches(0)  # refuses a batch size that is too small for the ranks
    members = [
        Member(spec, options, student, objective, world, amp)
        for spec, student, objective in zip(specs, students, objectives, strict=True)
    ]
    return TrainSetup(archive, use, feed, members, targets, validation, views.alignment)


def refuse_objective(objective: Objective, archive: Archive, options: TrainOptions, teachers: tuple[str, ...]) -> None:
    """Refuse an archive without what the objective needs: labels, whole rows, unshifted rows, one label per row."""
    if archive_recipe(archive).mixes:
        try_mixed_labels(objective, archive.num_classes)
    if objective.needs.labels and int(archive.labels.min()) < 0:
        raise Refused(
            f"loss {'+'.join(objective.specs)} needs labels, and the archive has samples without a label; "
            "use ce?weight=0"
        )
    if not objective.needs.teacher or options.online_teacher is not None:
        return
    for teacher in teachers:
        objective.refuse_codec(archive.codec(teacher, LOGITS))


def try_mixed_labels(objective: Objective, num_classes: int) -> None:
    """Compute the loss once with two labels per row: a term that cannot do this raises Refused."""
    logits, labels = torch.zeros(2, num_classes), torch.zeros(2, dtype=torch.int64)
    objective.eval()  # terms with a state change it in training mode only
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        objective(logits, logits, labels, mix=Mix(labels, torch.ones(2)))


def choose_use(options: TrainOptions, archive: Archive, saved: ArchiveUse | None, cached: bool) -> ArchiveUse:
    """The teachers and views of a run: those of its earlier part, or the named teachers and the views they share."""
    if saved is None:
        teachers = chosen_teachers(options, archive) if cached else ()
        views = min([archive.num_views, *map(archive.views_of, teachers)])
        return ArchiveUse.of(archive, teachers, views)
    teachers = options.teachers if cached and options.teachers else saved.teachers
    return saved.require(archive, teachers)


def chosen_teachers(options: TrainOptions, archive: Archive) -> tuple[str, ...]:
    for name in options.teachers:
        archive.teacher(name)
    known = sorted(archive.teachers)
    if not known:
        raise Refused(f"{archive.path} has no teacher; add one with redistill cache-teacher, or use --loss ce")
    if not options.teachers and len(known) > 1:
        raise Refused(
            f"{archive.path} has the teachers {', '.join(known)}; choose: --teacher-names {known[0]}, or "
            f"--teacher-names {','.join(known)} for the mean of their logits"
        )
    return options.teachers or tuple(known)


def make_targets(
    options: TrainOptions,
    objectives: Sequence[Objective],
    archive: Archive,
    teachers: tuple[str, ...],
    world: World,
    amp: torch.dtype | None,
) -> CachedTargets | OnlineTargets | None:
    if not any(objective.needs.teacher for objective in objectives):
        if options.online_teacher is not None:
            raise UsageError(f"--online-teacher {options.online_teacher} is not used: no --loss needs a teacher")
        return None
    if options.online_teacher is None:
        views = SharedViews(archive, teachers, options.views_per_image, options.cache_memory, world)
        return CachedTargets(views, world.device)
    model = open_model(options.online_teacher, num_classes=archive.num_classes, allow_python=options.allow_python)
    if model.num_classes != archive.num_classes:
        raise Refused(f"the online teacher has {model.num_classes} classes, the archive {archive.num_classes}")
    return OnlineTargets(Teacher(model, device=world.device, amp=amp, channels_last=options.channels_last))


def open_student(spec: MemberSpec, archive: Archive, size: int, options: TrainOptions) -> OpenedModel:
    """The network with initial weights of this seed, after a forward pass on one empty view."""
    opened = open_model(
        spec.student, num_classes=archive.num_classes, seed=spec.seed, allow_python=options.allow_python
    )
    if opened.num_classes != archive.num_classes:
        raise Refused(
            f"the student {spec.student!r} has {opened.num_classes} classes, the archive {archive.num_classes}; "
            f"omit num_classes=, or use weights for these classes"
        )
    try:
        with torch.no_grad():
            output = opened.module.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:  # from inside the network
        raise Refused(
            f"the student {spec.student!r} cannot process views of {size} px: {first_line(error)}; use --size, or "
            f"size={size} in its spec where the size is part of the network"
        ) from error
    if not isinstance(output, Tensor):
        raise Refused(f"the student {spec.student!r} returns {type(output).__name__}, expected a tensor of logits")
    if output.shape != (1, archive.num_classes):
        raise Refused(
            f"the student {spec.student!r} has outputs of shape {tuple(output.shape)[1:]}, expected "
            f"{archive.num_classes} logits"
        )
    # The header of the weights file has what this training uses, in place of what the authors of the network used.
    return replace(
        opened,
        trained_size=size,
        interpolation=validation_recipe(size).interpolation,
        resize=None,
        top1=None,
        class_names=archive.class_names,
    )


def open_views(options: TrainOptions, archive: Archive, workers: int, progress: Progress) -> AlignedViews:
    """The archive's views from the user's images, verified to be those the teacher was run on."""
    views = aligned_views(
        options.data,
        archive,
        size=options.size,
        allow_missing=options.allow_missing,
        workers=None if workers else 0,
        progress=partial(progress.advance, "index"),
    )
    if views.excluded:
        progress.info(f"images that the archive excludes, and that are skipped: {views.excluded:,}")
    if not views.joined.exact:
        progress.info(f"data and archive: {views.joined.summary()}")
    if views.alignment.verdict == "no canaries":
        progress.warning(views.alignment.message)
    else:
        progress.info(views.alignment.require().message)
    return views


def held_out_rows(archive: Archive, share: float, seed: int) -> np.ndarray:
    """The rows to validate on: this share of every class, a function of the archive's images and of the seed alone.

    Rows of equal images are held out together. A class keeps at least one image to train on.
    """
    labels = np.asarray(archive.labels)
    digests, rows_to_images = np.unique(np.asarray(archive.digests), axis=0, return_inverse=True)
    images = rows_to_images.reshape(-1)
    order = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64))).permutation(len(digests))
    held_out = np.zeros(len(digests), bool)
    for label in np.unique(labels[labels >= 0]):
        of_class = np.unique(images[labels == label])
        count = min(round(share * len(of_class)), len(of_class) - 1)
        held_out[of_class[np.argsort(order[of_class])[:count]]] = True
    if not held_out.any():
        raise Refused(f"--val {share:g}: this share of a class is less than one image; use a larger share")
    rows: np.ndarray = np.flatnonzero(held_out[images])
    return rows


def open_validation(options: TrainOptions, archive: Archive, size: int, workers: int, world: World) -> Validation:
    return Validation.open(
        options.val,
        class_names=archive.class_names,
        num_classes=archive.num_classes,
        size=size,
        archive=None if options.val_archive is None else open_archive(options.val_archive),
        teachers=options.teachers,
        on_bad_image=options.on_bad_image,
        workers=workers,
        rank=world.rank.rank,
        world_size=world.size,
    )
