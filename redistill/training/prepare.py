"""Everything that is held against everything else before the first step; each misfit is one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from redistill_cache import Archive, open_archive
from redistill_cache.errors import Refused
from torch import nn

from redistill.devices import pick_amp
from redistill.loading import default_workers
from redistill.losses.objective import Objective
from redistill.models import OpenedModel, open_model
from redistill.signals import LOGITS
from redistill.sources.index import index_source
from redistill.sources.join import join
from redistill.sources.opening import open_source
from redistill.teachers import Teacher
from redistill.training.distributed import World
from redistill.training.feed import Feed
from redistill.training.member import Member
from redistill.training.options import MemberSpec, TrainOptions
from redistill.training.targets import CachedTargets, OnlineTargets
from redistill.training.validate import Validation
from redistill.training.watcher import Watcher
from redistill.views import ArchiveViews, ViewDataset
from redistill.views.canaries import check_canaries
from redistill.wording import first_line

__all__ = ["Run", "prepare"]


@dataclass(frozen=True)
class Run:
    """A run that fits together."""

    archive: Archive
    feed: Feed
    members: list[Member]
    targets: CachedTargets | OnlineTargets | None
    """None where no loss asks for a teacher."""
    validation: Validation | None


def prepare(options: TrainOptions, world: World, watcher: Watcher) -> Run:
    archive = open_archive(options.archive)
    workers = default_workers(world.rank.local_world) if options.workers is None else options.workers
    dataset = aligned_dataset(options, archive, workers, watcher)
    specs = options.members()
    for spec in specs:
        refuse_objective(spec, archive, options)
    amp = pick_amp(world.device, options.amp)
    members = []
    for spec in specs:
        opened = open_student(spec, archive, dataset.size, options)
        members.append(Member(spec, options, opened, world, amp))
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
    targets = make_targets(options, archive, world, amp) if any(m.objective.needs.teacher for m in members) else None
    if isinstance(targets, CachedTargets) and targets.spilled:
        watcher.say("the teacher's rows of two views exceed --cache-memory; they lie in a temporary file")
    validation = None
    if options.val is not None:
        validation = Validation.open(
            options.val,
            class_names=archive.class_names,
            num_classes=archive.num_classes,
            size=dataset.size,
            archive=options.val_archive,
            teachers=options.teachers,
            workers=workers,
            rank=world.rank.rank,
            world=world.size,
        )
    return Run(archive, feed, members, targets, validation)


def aligned_dataset(options: TrainOptions, archive: Archive, workers: int, watcher: Watcher) -> ViewDataset:
    """The archive's views from the data at hand, which are proven to be those the teacher saw."""
    source = open_source(options.data)
    index = index_source(source, workers=None if workers else 0, progress=watcher.index)
    joined = join(
        index,
        keys=archive.keys,
        labels=archive.labels,
        digests=archive.digests,
        class_names=archive.class_names,
        allow_missing=options.allow_missing,
    )
    if not joined.exact:
        watcher.say(f"data and archive: {joined.summary()}")
    if archive.spec.canaries_per_view:
        watcher.say(check_canaries(source, archive, joined).require().message)
    else:
        watcher.warn("the archive has no canaries: nothing proves that views here are those the teacher saw")
    return ViewDataset(source, ArchiveViews(archive, joined), size=options.size)


def refuse_objective(spec: MemberSpec, archive: Archive, options: TrainOptions) -> None:
    """A loss must get what it asks for: labels, whole rows, unshifted rows."""
    objective = Objective(spec.losses)
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


def chosen_teachers(options: TrainOptions, archive: Archive) -> tuple[str, ...]:
    for name in options.teachers:
        archive.teacher(name)
    if options.teachers or not archive.teachers:
        return options.teachers
    return tuple(archive.teachers)


def make_targets(
    options: TrainOptions, archive: Archive, world: World, amp: torch.dtype | None
) -> CachedTargets | OnlineTargets:
    if options.online_teacher is None:
        names = chosen_teachers(options, archive)
        return CachedTargets(archive, names, world.device, options.views_per_image, options.cache_memory)
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


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
