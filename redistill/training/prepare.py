"""Everything that is held against everything else before the first step; each misfit is one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from redistill_cache import Archive, open_archive
from redistill_cache.errors import Refused, UsageError
from torch import nn

from redistill.devices import pick_amp
from redistill.loading import default_workers
from redistill.losses.objective import Mix, Objective
from redistill.models import OpenedModel, open_model
from redistill.progress import Progress
from redistill.ranks import World
from redistill.signals import LOGITS
from redistill.sources.index import index_source
from redistill.sources.open_source import open_source
from redistill.specs import first_line
from redistill.teachers import Teacher
from redistill.training.feed import Feed
from redistill.training.member import Member
from redistill.training.options import MemberSpec, TrainOptions
from redistill.training.shared_views import SharedViews
from redistill.training.targets import CachedTargets, OnlineTargets
from redistill.training.validate import Validation
from redistill.views import ArchiveViews, ViewDataset, join_archive
from redistill.views.canaries import check_canaries
from redistill.views.view_params import archive_recipe

__all__ = ["TrainSetup", "prepare"]


@dataclass(frozen=True)
class TrainSetup:
    """A run that fits together."""

    archive: Archive
    feed: Feed
    members: list[Member]
    targets: CachedTargets | OnlineTargets | None
    """None where no loss asks for a teacher."""
    validation: Validation | None


def prepare(options: TrainOptions, world: World, progress: Progress) -> TrainSetup:
    """What is quick to find out comes first: nobody should wait for a million images to read of a typing error."""
    with world.first_here_first():
        archive = open_archive(options.archive)
    specs = options.members
    size = archive_recipe(archive).size if options.size is None else options.size
    refuse_options(options, specs, archive)
    students = [open_student(spec, archive, size, options) for spec in specs]
    amp = pick_amp(world.device, options.amp)
    targets = make_targets(options, specs, archive, world, amp)
    if isinstance(targets, CachedTargets) and targets.residence.spilled:
        progress.info("the teacher's rows of two views exceed --cache-memory; they lie in a temporary file")
    workers = default_workers(world.rank.local_world) if options.workers is None else options.workers
    with world.first_here_first():
        dataset = aligned_dataset(options, archive, workers, progress)
        validation = open_validation(options, archive, size, workers, world)
    feed = Feed(
        dataset,
        epochs=options.optim.epochs,
        batch_size=options.batch_size,
        seed=options.order_seed,
        views_per_image=options.views_per_image,
        rank=world.rank.rank,
        world=world.size,
        workers=workers,
        pin=world.device.type == "cuda",
    )
    feed.batches(0)
    members = [Member(spec, options, opened, world, amp) for spec, opened in zip(specs, students, strict=True)]
    return TrainSetup(archive, feed, members, targets, validation)


def open_validation(
    options: TrainOptions, archive: Archive, size: int, workers: int, world: World
) -> Validation | None:
    if options.val is None:
        return None
    return Validation.open(
        options.val,
        class_names=archive.class_names,
        num_classes=archive.num_classes,
        size=size,
        archive=options.val_archive,
        teachers=options.teachers,
        workers=workers,
        rank=world.rank.rank,
        world=world.size,
    )


def aligned_dataset(options: TrainOptions, archive: Archive, workers: int, progress: Progress) -> ViewDataset:
    """The archive's views from the data at hand, which are proven to be those the teacher saw."""
    source = open_source(options.data)
    index = index_source(source, workers=None if workers else 0, progress=partial(progress.advance, "index"))
    joined = join_archive(index, archive, allow_missing=options.allow_missing)
    if not joined.exact:
        progress.info(f"data and archive: {joined.summary()}")
    if archive.spec.canaries_per_view:
        progress.info(check_canaries(source, archive, joined).require().message)
    else:
        progress.warning("the archive has no canaries: nothing proves that views here are those the teacher saw")
    return ViewDataset(source, ArchiveViews(archive, joined), size=options.size)


def refuse_options(options: TrainOptions, specs: Sequence[MemberSpec], archive: Archive) -> None:
    if options.views_per_image > archive.num_views:
        raise Refused(
            f"--views-per-image {options.views_per_image} needs that many views, the archive has {archive.num_views}"
        )
    for spec in specs:
        refuse_objective(spec, archive, options)


def refuse_objective(spec: MemberSpec, archive: Archive, options: TrainOptions) -> None:
    """A loss must get what it asks for: labels, whole rows, unshifted rows, one label a row."""
    objective = Objective(spec.losses)
    if archive_recipe(archive).mixes:
        try_mixing(objective, archive.num_classes)
    if objective.needs.labels and int(archive.labels.min()) < 0:
        raise Refused(
            f"loss {'+'.join(spec.losses)} needs labels, and the archive has samples without; use ce?weight=0"
        )
    if not objective.needs.teacher or options.online_teacher is not None:
        return
    for teacher in chosen_teachers(options, archive):
        _, signal = archive.signal(teacher, LOGITS)
        keeps_shift = signal.codec == "float32" or bool(signal.config.get("keep_shift", False))
        objective.refuse_codec(signal.codec, keeps_shift=keeps_shift)


def try_mixing(objective: Objective, num_classes: int) -> None:
    """Some losses have no value for two labels of a row; they say so themselves."""
    logits, labels = torch.zeros(2, num_classes), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        objective(logits, logits, labels, mix=Mix(labels, torch.ones(2)))


def chosen_teachers(options: TrainOptions, archive: Archive) -> tuple[str, ...]:
    for name in options.teachers:
        archive.teacher(name)
    if options.teachers or not archive.teachers:
        return options.teachers
    return tuple(archive.teachers)


def make_targets(
    options: TrainOptions, specs: Sequence[MemberSpec], archive: Archive, world: World, amp: torch.dtype | None
) -> CachedTargets | OnlineTargets | None:
    if not any(Objective(spec.losses).needs.teacher for spec in specs):
        if options.online_teacher is not None:
            raise UsageError(f"--online-teacher {options.online_teacher} is asked for, but no --loss needs a teacher")
        return None
    if options.online_teacher is None:
        names = chosen_teachers(options, archive)
        residence = SharedViews(archive, names, options.views_per_image, options.cache_memory, world)
        return CachedTargets(residence, world.device)
    model = open_model(options.online_teacher, num_classes=archive.num_classes, allow_python=options.allow_python)
    if model.num_classes != archive.num_classes:
        raise Refused(f"the online teacher has {model.num_classes} classes, the archive {archive.num_classes}")
    return OnlineTargets(Teacher(model, device=world.device, amp=amp, channels_last=options.channels_last))


def open_student(spec: MemberSpec, archive: Archive, size: int, options: TrainOptions) -> OpenedModel:
    """The network with fresh weights of this seed, tried on one view."""
    opened = open_model(
        spec.student, num_classes=archive.num_classes, seed=spec.seed, allow_python=options.allow_python
    )
    if opened.num_classes != archive.num_classes:
        raise Refused(
            f"the student {spec.student!r} has {opened.num_classes} classes, the archive {archive.num_classes}; "
            f"leave num_classes= out, or use weights of these classes"
        )
    try:
        with torch.no_grad():
            found = tuple(opened.module.eval()(torch.zeros(1, 3, size, size)).shape)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:  # from inside the network
        raise Refused(
            f"the student {spec.student!r} cannot take views of {size} px: {first_line(error)}; use --size"
        ) from error
    if found != (1, archive.num_classes):
        raise Refused(f"the student {spec.student!r} answers with {found[1:]}, expected {archive.num_classes} logits")
    return opened


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
