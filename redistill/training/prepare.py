"""Everything a run needs, opened and checked against each other before the first step.

Checks that take no time come first: a typo in a loss is reported before a million images are indexed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from redistill_cache import Archive, open_archive
from redistill_cache.errors import Refused, UsageError
from torch import Tensor, nn

from redistill.caching.additions import missing_signal
from redistill.devices import pick_amp
from redistill.loading import default_workers
from redistill.losses.objective import Objective, Source
from redistill.models import OpenedModel, open_model
from redistill.progress import Progress
from redistill.ranks import World
from redistill.signals import LOGITS, PENULTIMATE, PROBE_SIZE, Head
from redistill.sources.open_source import open_source
from redistill.specs import first_line
from redistill.teachers import Teacher
from redistill.training.advice import advice
from redistill.training.archive_use import ArchiveUse, ViewStream
from redistill.training.feed import Feed, views_of_epoch
from redistill.training.member import Member
from redistill.training.options import MemberSpec, TrainOptions, split_terms
from redistill.training.pairs import StudentLayers, TeacherLayers, connected, online_layers, stored_layers
from redistill.training.targets import CachedTargets, OnlineTargets, Read, SharedViews
from redistill.training.validate import Validation, validation_recipe
from redistill.views import ViewDataset, archive_recipe
from redistill.views.aligned import AlignedViews, aligned_views
from redistill.views.canaries import Alignment, check_canaries
from redistill.views.stream_order import refuse_mixing, stream_settings
from redistill.views.view_params import excluded_keys

__all__ = ["TrainSetup", "prepare"]

FITTED_ROWS, FITTED_VALUES = 50_000, 1 << 26
"""At most, of a loss that sees the teacher's features before the first step, and of the teacher's head."""
RIDGE = 1e-5
"""The penalty on the teacher's head, relative to the mean variance of its features."""


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
    fixed: Mapping[str, Any]
    """The options that a run must repeat to be resumed, with the pairs of layers that were chosen."""

    def fit(self) -> None:
        """Before the first step: losses that must see the teacher's features see those of the first view."""
        labels, dataset = np.asarray(self.archive.labels), self.feed.dataset
        rows = np.unique(dataset.indices(0) % dataset.num_rows)
        labelled = rows[labels[rows] >= 0]

        def read(source: Source) -> tuple[Tensor, Tensor]:
            teacher = source.teacher or self.use.teachers[0]
            rows = evenly(labelled, self.archive.signal(teacher, source.signal)[1].width)
            features = self.archive.features(0, rows, layer=source.signal, teacher=teacher)
            return torch.from_numpy(features).to(device), torch.from_numpy(labels[rows]).to(device)

        for member in self.members:
            device = member.world.device
            member.objective.fit(read)


def prepare(
    options: TrainOptions,
    world: World,
    progress: Progress,
    saved: ArchiveUse | None = None,
    *,
    epoch: int = 0,
    archive: Archive | None = None,
) -> TrainSetup:
    """`saved` is what an earlier part of the run read of the archive: a resumed run reads the same.

    Of an `archive` that is streamed, the views of this `epoch` are waited for.
    """
    if archive is None:
        with world.local_first():
            archive = open_archive(options.archive)
    specs = options.members
    drafts = [Objective(spec.losses) for spec in specs]
    cached = options.online_teacher is None and any(draft.needs.teacher for draft in drafts)
    teachers = () if saved is None else saved.teachers
    if cached:
        teachers = choose_teachers(options, archive, drafts, saved)
    resumed = None if saved is None else saved.require(archive, teachers)
    for draft in drafts:
        refuse_objective(draft, archive, options, teachers)
    size = archive_recipe(archive).size if options.size is None else options.size
    students = [open_student(spec, archive, size, options) for spec in specs]
    amp = pick_amp(world.device, options.amp)
    online = open_online_teacher(options, archive, drafts)
    layers = [
        StudentLayers(spec.student, opened.module, torch.zeros(1, 3, size, size))
        for spec, opened in zip(specs, students, strict=True)
    ]
    objectives = connect(options, archive, drafts, layers, teachers, online, saved, progress)
    specs = tuple(replace(spec, losses=objective.specs) for spec, objective in zip(specs, objectives, strict=True))
    reads = choose_reads(objectives, teachers) if cached else []
    use = resumed or choose_use(archive, teachers, reads)
    for line in advice(objectives, use.views, options.optim.epochs):
        progress.warning(line)
    if options.views_per_image > use.views:
        raise Refused(f"--views-per-image must be at most the number of views, and the archive has {use.views}")
    if archive.arrivals is not None:
        archive.arrivals.only(archive.part_of(read.teacher, read.signal)[0].name for read in reads)
    stream, first_views = open_stream(options, archive, use, epoch, world, progress)
    if use.views < archive.num_views:
        progress.info(f"training uses the first {use.views} of the archive's {archive.num_views} views")
    targets = make_targets(options, objectives, archive, reads, online, world, amp)
    if isinstance(targets, CachedTargets) and targets.shared_views.spilled:
        progress.info("the teacher rows of two views exceed --cache-memory; they are in a temporary file")
    workers = default_workers(world.rank.local_world_size) if options.workers is None else options.workers
    with world.local_first():
        views = open_views(options, archive, workers, progress, first_views)
        dataset = views.dataset
        if stream is not None and views.canaries is not None:
            stream.compared.update(first_views or ())
            stream.compare_view = lambda view: check_canaries(views.dataset, archive, views=[view]).require()
        dataset, validation = with_validation(options, archive, dataset, size, workers, world, progress)
    refuse_mixing(dataset.source, dataset.views.recipe)
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
        stream=stream,
    )
    feed.global_batches(0)  # refuses a batch size that is too small for the ranks
    members = [
        Member(
            spec,
            options,
            student,
            objective,
            world,
            amp,
            head=looked_at.head if objective.needs.taps else None,
            teacher_head=None if options.head is None else teacher_head(archive, use, objective, looked_at, progress),
        )
        for spec, student, objective, looked_at in zip(specs, students, objectives, layers, strict=True)
    ]
    fixed = fixed_options(options, specs) | stream_settings(dataset.source, dataset.views.source_rows)
    return TrainSetup(archive, use, feed, members, targets, validation, views.alignment, fixed)


def open_stream(
    options: TrainOptions, archive: Archive, use: ArchiveUse, epoch: int, world: World, progress: Progress
) -> tuple[ViewStream | None, Sequence[int] | None]:
    """What fetches the views of a streamed archive ahead of use, and the views of this epoch, which are here then."""
    if archive.arrivals is None:
        return None, None
    stream = ViewStream(archive.arrivals, world, progress)
    epochs = range(min(epoch, options.optim.epochs - 1), options.optim.epochs)
    of_epochs = [views_of_epoch(each, use.views, options.views_per_image) for each in epochs]
    archive.arrivals.require_room({view for views in of_epochs for view in views}, progress.info)
    stream.wait(of_epochs[0])
    return stream, of_epochs[0]


def with_validation(
    options: TrainOptions,
    archive: Archive,
    dataset: ViewDataset,
    size: int,
    workers: int,
    world: World,
    progress: Progress,
) -> tuple[ViewDataset, Validation | None]:
    """The rows to train on, and the validation on other images or on rows that are held out of these."""
    if options.val_share is None:
        return dataset, None if options.val is None else open_validation(options, archive, size, workers, world)
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
    return dataset.without(held_out), validation


def evenly(rows: np.ndarray, width: int) -> np.ndarray:
    """A bounded number of rows, from the first to the last."""
    count = min(len(rows), FITTED_ROWS, max(1, FITTED_VALUES // width))
    chosen: np.ndarray = rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]
    return chosen


def refuse_objective(objective: Objective, archive: Archive, options: TrainOptions, teachers: tuple[str, ...]) -> None:
    """Refuse an archive without what the objective needs: labels, whole rows, unshifted rows, one label per row."""
    if archive_recipe(archive).mixes:
        for term in objective.all_terms:
            term.refuse_mix()
    if objective.needs.labels and int(archive.labels.min()) < 0:
        raise Refused(
            f"loss {'+'.join(objective.specs)} needs labels, and the archive has samples without a label; "
            "use ce?weight=0"
        )
    if options.online_teacher is not None:
        return
    if Source(None, LOGITS) in objective.needs.sources:
        for teacher in teachers:
            if LOGITS not in archive.signals_of(teacher):
                raise missing_signal(archive, teacher, LOGITS)
            objective.refuse_codec(archive.codec(teacher, LOGITS))


def choose_teachers(
    options: TrainOptions, archive: Archive, drafts: Sequence[Objective], saved: ArchiveUse | None
) -> tuple[str, ...]:
    """The teachers of terms that name none: those of the run's earlier part, or as the options say."""
    if saved is not None:
        return options.teachers or saved.teachers
    terms = [term for draft in drafts for term in draft.all_terms]
    if all(term.teacher is not None and "teacher_logits" not in term.entry.inputs for term in terms):
        return options.teachers  # every term names the teacher that it uses
    return chosen_teachers(options, archive)


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


def connect(
    options: TrainOptions,
    archive: Archive,
    drafts: Sequence[Objective],
    students: Sequence[StudentLayers],
    teachers: tuple[str, ...],
    online: OpenedModel | None,
    saved: ArchiveUse | None,
    progress: Progress,
) -> list[Objective]:
    """The objectives with pairs of layers in every term on features, and parameters that depend on the seed alone."""
    found: dict[str | None, TeacherLayers] = {}
    for draft in drafts:
        for term in draft.all_terms:
            if term.teacher in found or "teacher_features" not in term.entry.inputs:
                continue
            if online is not None:
                if hasattr(term.entry.make, "fit"):
                    raise UsageError(
                        f"{term.text!r} sees features of many images before the first step; it needs an archive"
                    )
                if term.teacher is not None:
                    raise UsageError(
                        f"{term.text!r}: teacher= names one of the archive; leave it out with --online-teacher"
                    )
                side = online.input_size or PROBE_SIZE
                found[None] = online_layers(online.spec, online.module, torch.zeros(2, 3, side, side))
                continue
            if term.teacher is None and len(teachers) > 1:
                raise UsageError(
                    f"{term.text!r} uses the features of one teacher, and the run has {', '.join(teachers)}; add "
                    f"teacher={teachers[0]} to it"
                )
            name = archive.teacher(term.teacher or teachers[0]).name
            found[term.teacher] = stored_layers(archive, name, None if saved is None else saved.signals_of(name))
    objectives, lines = [], []
    for spec, draft, student in zip(options.members, drafts, students, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                int.from_bytes(hashlib.sha256(f"objective {spec.seed}".encode()).digest()[:8], "little") >> 1
            )
            objectives.append(connected(draft, student, found, archive.num_classes))
        lines += [
            f"{term.label} of {spec.student}: {', '.join(map(str, term.pairs or ()))} (layers, student:teacher)"
            for term in objectives[-1].all_terms
            if term.entry.on_features
        ]
    for line in dict.fromkeys(lines):
        progress.info(line)
    return objectives


def fixed_options(options: TrainOptions, specs: Sequence[MemberSpec]) -> dict[str, Any]:
    """With the losses as they were resolved, where that is the same for all students."""
    fixed = options.fixed_on_resume()
    losses = []
    for loss in options.losses:
        resolved = {
            "+".join(s.losses) for s, own in zip(specs, options.members, strict=True) if own.losses == split_terms(loss)
        }
        losses.append(resolved.pop() if len(resolved) == 1 else loss)
    return fixed | {"losses": losses}


def teacher_head(
    archive: Archive, use: ArchiveUse, objective: Objective, student: StudentLayers, progress: Progress
) -> Head:
    """The last layer of the teacher, by ridge regression from the rows of penultimate and logits in the archive."""
    match = objective.penultimate_match()
    if match is None or not use.teachers:
        raise UsageError(
            "--head teacher needs the loss features with match=mse and the pair penultimate:penultimate, from an "
            f"archive; found {'+'.join(objective.specs)}"
        )
    last = None if student.head is None else student.module.get_submodule(student.head)
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise Refused(f"--head teacher: the last layer of {student.name!r} has no bias to hold the teacher's")
    teacher = match[0].teacher or use.teachers[0]
    if LOGITS not in archive.signals_of(teacher):
        raise missing_signal(archive, teacher, LOGITS)
    rows = evenly(np.arange(archive.num_samples), archive.signal(teacher, PENULTIMATE)[1].width)
    features = archive.features(0, rows, layer=PENULTIMATE, teacher=teacher).astype(np.float64)
    logits = archive.logits(0, rows, teacher=teacher).astype(np.float64)
    logits -= logits.mean(1, keepdims=True)  # the codec may have dropped it; softmax ignores it
    head = ridge(features, logits)
    same = float(((features @ head.weight.numpy().T + head.bias.numpy()).argmax(1) == logits.argmax(1)).mean())
    progress.info(f"--head teacher: fitted to {len(rows):,} rows, of which {same:.1%} keep the teacher's class")
    return head


def ridge(features: np.ndarray, logits: np.ndarray) -> Head:
    """Weight and bias with the least squared error, and a penalty that only decides directions without variance."""
    mean, center = features.mean(0), logits.mean(0)
    centered = features - mean
    gram = centered.T @ centered
    gram[np.diag_indices_from(gram)] += RIDGE * max(float(np.trace(gram)) / len(gram), 1e-12)
    weight = np.linalg.solve(gram, centered.T @ (logits - center)).T
    return Head(torch.from_numpy(weight).float(), torch.from_numpy(center - weight @ mean).float())


def choose_reads(objectives: Sequence[Objective], teachers: tuple[str, ...]) -> list[Read]:
    """The signals that the objectives need and no other: logits of every teacher, features of one."""
    sources = dict.fromkeys(source for objective in objectives for source in objective.needs.sources)
    return [
        Read(teacher, source.signal, source.key)
        for source in sources
        for teacher in (teachers if source.teacher is None else (source.teacher,))
    ]


def choose_use(archive: Archive, teachers: tuple[str, ...], reads: Sequence[Read]) -> ArchiveUse:
    """The views that all signals have."""
    signals = list(dict.fromkeys((read.teacher, read.signal) for read in reads))
    views = min([archive.num_views, *(archive.views_of(*each) for each in signals)])
    return ArchiveUse.of(archive, teachers, signals, views)


def open_online_teacher(options: TrainOptions, archive: Archive, drafts: Sequence[Objective]) -> OpenedModel | None:
    if options.online_teacher is None:
        return None
    if not any(draft.needs.teacher for draft in drafts):
        raise UsageError(f"--online-teacher {options.online_teacher} is not used: no --loss needs a teacher")
    model = open_model(options.online_teacher, num_classes=archive.num_classes, allow_python=options.allow_python)
    if model.num_classes != archive.num_classes:
        raise Refused(f"the online teacher has {model.num_classes} classes, the archive {archive.num_classes}")
    return model


def make_targets(
    options: TrainOptions,
    objectives: Sequence[Objective],
    archive: Archive,
    reads: Sequence[Read],
    online: OpenedModel | None,
    world: World,
    amp: torch.dtype | None,
) -> CachedTargets | OnlineTargets | None:
    if online is not None:
        signals = dict.fromkeys(source.signal for objective in objectives for source in objective.needs.sources)
        return OnlineTargets(
            Teacher(online, device=world.device, amp=amp, channels_last=options.channels_last, layers=tuple(signals))
        )
    if not reads:
        return None
    views = SharedViews(archive, reads, options.views_per_image, options.cache_memory, world)
    return CachedTargets(views, world.device)


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


def open_views(
    options: TrainOptions, archive: Archive, workers: int, progress: Progress, compared: Sequence[int] | None
) -> AlignedViews:
    """The archive's views from the user's images, verified to be those the teacher was run on.

    The canaries of the views `compared` are compared, by default those of all.
    """
    views = aligned_views(
        open_source(options.data, stream_cache=options.stream_cache),
        archive,
        size=options.size,
        allow_missing=options.allow_missing,
        workers=None if workers else 0,
        progress=partial(progress.advance, "index"),
        views=compared,
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
