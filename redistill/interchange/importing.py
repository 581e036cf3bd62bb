"""`import_archive(options)`: logits that another program cached become an archive.

    images and their index -> source opened -> names joined -> every record checked, losses counted
        -> codec -> archive -> blocks of logits and view parameters -> canaries, rendered from the images -> sealed

Nothing is written before every record was read once. The archive is written by the ordinary writer, so an interrupted
import is continued by the same call, and everything works on the result that works on other archives.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from redistill_cache import ArchiveSpec, ArchiveWriter, SignalSpec, TeacherSpec, limits
from redistill_cache.codecs import BlockStats, Codec, Encoded, fit_codec, join_encoded
from redistill_cache.codecs.catalogue import compressed_size
from redistill_cache.codecs.topk import TopKCodec
from redistill_cache.errors import Refused, SpecMismatch
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.layout import Block
from redistill_cache.spec import LOGITS
from redistill_cache.storage import LOCAL

from redistill.caching.estimate import refuse_small_disk
from redistill.caching.open_archive import check_new_path
from redistill.caching.plan import default_block_rows, default_canaries
from redistill.caching.run import is_near_chance
from redistill.interchange.fkd import FkdFolder
from redistill.interchange.foreign import Foreign, ForeignViews
from redistill.interchange.mldr import MlDrFolder
from redistill.interchange.options import ImportOptions
from redistill.interchange.tables import open_table
from redistill.interrupts import StopRequest, raise_on_signals, stop_on_signals
from redistill.progress import NoProgress, Progress
from redistill.sources.base import Source
from redistill.sources.index import SourceIndex, index_source, pair_up, repeats
from redistill.sources.open_source import open_source
from redistill.views import DrawnViews, ViewDataset, join_archive
from redistill.views.canaries import canary_rows, fingerprints, view_environment

__all__ = ["ImportResult", "import_archive"]

# Memory for the records that are read together.
READ_BYTES = 256 << 20
LEAST_BLOCK_ROWS = 64
PIECE_VALUES, MAX_PIECE_ROWS = 1 << 22, 1024  # of rows that are encoded together
PILOT_ROWS, ROWS_PER_CLASS = (512, 16384), 8
TRIAL_ROWS = 2048
EXAMPLES = 2
NOT_IN_SOURCE = "the imported source has no logits of it"
PIXELS = (
    "pixels: the fingerprints of views are of the data as it is rendered here; whether the teacher saw the same pixels "
    "cannot be checked"
)


@dataclass(frozen=True)
class ImportResult:
    """The archive, or what it would be. `id` is None after a dry run."""

    path: str
    id: str | None
    samples: int
    views: int
    classes: int
    teacher: str
    codec: str
    bytes_per_view: float
    """Of the logits, estimated from some of the views."""
    audit: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """The inputs of an import. Row r of the archive is the image `index.rows[r]`, with the logits of `records[r]`."""

    options: ImportOptions
    source: Source
    foreign: Foreign
    index: SourceIndex
    records: np.ndarray
    spec: ArchiveSpec
    stop: StopRequest
    progress: Progress

    @property
    def part(self) -> str:
        return f"teachers/{self.options.teacher_name}"

    def pieces(self) -> Iterator[tuple[int, np.ndarray, range]]:
        """(block, rows, views) that are read together: blocks in order, each with some views at a time."""
        size = self.spec.block_rows
        at_once = max(1, READ_BYTES // (min(size, len(self.records)) * self.foreign.view_bytes))
        for block in range(self.spec.blocks_per_view):
            rows = np.arange(block * size, min((block + 1) * size, len(self.records)))
            for start in range(0, self.spec.num_views, at_once):
                self.stop.raise_if_set()
                yield block, rows, range(start, min(start + at_once, self.spec.num_views))

    def read(self, rows: np.ndarray, views: range) -> ForeignViews:
        return self.foreign.read(self.records[rows], views, self.index.sizes[rows])


def import_archive(options: ImportOptions, progress: Progress | None = None, *, dry_run: bool = False) -> ImportResult:
    """Write the archive, or finish it; with `dry_run`, only read and check the source."""
    progress = progress or NoProgress()
    with stop_on_signals() as stop:
        with raise_on_signals():
            job, notes = make_job(options, stop, progress)
            existing = None if dry_run else open_existing(job)
        survey = survey_source(job)
        codec, size = choose_codec(job)
        audit = (*job.foreign.audit, PIXELS, *notes, *survey.sentences())
        warn_of_chance(job, survey)
        if existing is None:
            refuse_small_disk(options.out, round(size * len(job.records) * job.spec.num_views))
        identity = None if dry_run else write_archive(job, existing, codec, survey, audit)
    return ImportResult(
        path=str(options.out),
        id=identity,
        samples=len(job.records),
        views=job.spec.num_views,
        classes=job.spec.num_classes,
        teacher=options.teacher_name,
        codec=codec.name,
        bytes_per_view=size,
        audit=audit,
    )


LAYOUTS: Mapping[str, Callable[[ImportOptions, int | None], Foreign]] = {
    "table": open_table,
    "fkd": FkdFolder,
    "ml-dr": MlDrFolder,
}
"""How a source is opened; the number of classes is that of the data, if it is known."""


# -- what is imported -------------------------------------------------------------------------------------------------


def make_job(options: ImportOptions, stop: StopRequest, progress: Progress) -> tuple[Job, list[str]]:
    """Open images and source, and join them; with sentences about names."""
    source = open_source(options.data)
    names = source.class_names
    if options.classes is not None and names is not None and len(names) != options.classes:
        raise Refused(f"the data has {len(names)} classes, --classes is {options.classes}; drop it, or use other data")
    classes = options.classes if names is None else len(names)
    foreign = LAYOUTS[options.layout](options, classes)
    index = index_source(source, progress=partial(progress.advance, "index"))
    highest = int(index.labels.max(initial=-1))
    if highest >= foreign.num_classes:
        raise Refused(f"the data has the label {highest}, the source has {foreign.num_classes} classes")
    records, notes = join_names(options, foreign, index)
    kept = np.flatnonzero(records >= 0)
    part = only_rows(index, kept)
    spec = archive_spec(options, source, part, foreign)
    return Job(options, source, foreign, part, records[kept], spec, stop, progress), notes


def join_names(options: ImportOptions, foreign: Foreign, index: SourceIndex) -> tuple[np.ndarray, list[str]]:
    """The record of every image, -1 where there is none. Refused where names differ in a way that is not accepted."""
    wanted, names = pack_keys(foreign.names_of(index.keys)), foreign.names
    hashes, known = wanted.hashes(), names.hashes()
    if len(ambiguous := repeats(hashes)):
        raise Refused(
            f"{len(ambiguous):,} images of the data have the name of another one in the source, such as "
            f"{wanted[int(ambiguous[0])]!r}; names must tell images apart (for a table: --match key)"
        )
    again = repeats(known)
    firsts = np.setdiff1d(np.arange(len(names)), again, assume_unique=True)
    images, at = pair_up(hashes, known[firsts])
    same = wanted.equal_at(images, names, firsts[at])
    records = np.full(len(index), -1, np.int64)
    records[images[same]] = firsts[at[same]]
    missing = np.flatnonzero(records < 0)
    extra = np.setdiff1d(firsts, records)
    if len(missing) == len(index):
        raise Refused(
            f"no image of the data has a name of {options.source}: the data has {wanted[0]!r}, the source "
            f"{names[0]!r}; use the data that the logits are of"
            + (", or another --match" * (options.layout == "table"))
        )
    found = (
        ("missing", "images of the data without logits", wanted, missing),
        ("extra", "names without an image", names, extra),
        ("duplicate", "names that occur again, of which the first counts", names, again),
    )
    problems = [(kind, problem_text(text, keys, rows)) for kind, text, keys, rows in found if len(rows)]
    refused = [kind for kind, _ in problems if kind not in options.accept]
    if refused:
        shown = "; ".join(text for kind, text in problems if kind in refused)
        raise Refused(f"{options.source}: {shown}; use the data of these logits, or --accept {','.join(refused)}")
    if len(missing) > limits.MAX_EXCLUDED:
        raise Refused(
            f"{len(missing):,} images of the data have no logits, and an archive lists at most "
            f"{limits.MAX_EXCLUDED:,}; use data of the other images only"
        )
    return records, [text for _, text in problems]


def problem_text(text: str, keys: PackedKeys, rows: np.ndarray) -> str:
    shown = ", ".join(repr(keys[int(row)]) for row in rows[:EXAMPLES])
    return f"{len(rows):,} {text} ({shown}{', ...' * (len(rows) > EXAMPLES)})"


def only_rows(index: SourceIndex, kept: np.ndarray) -> SourceIndex:
    """The index of these rows; the others are listed as excluded."""
    left_out = np.setdiff1d(np.arange(len(index)), kept, assume_unique=True)
    return replace(
        index,
        keys=index.keys.take(kept),
        labels=index.labels[kept],
        digests=index.digests[kept],
        sizes=index.sizes[kept],
        rows=index.rows[kept],
        excluded=tuple((index.keys[int(row)], NOT_IN_SOURCE) for row in left_out),
    )


def archive_spec(options: ImportOptions, source: Source, index: SourceIndex, foreign: Foreign) -> ArchiveSpec:
    count, rows = len(index), default_block_rows(len(index), foreign.recipe.size)
    while rows > LEAST_BLOCK_ROWS and rows * foreign.view_bytes > READ_BYTES:
        rows //= 2
    return ArchiveSpec(
        num_samples=count,
        num_views=foreign.num_views,
        num_classes=foreign.num_classes,
        class_names=index.class_names,
        block_rows=options.block_rows or rows,
        recipe=foreign.recipe.to_json(),
        view_arrays=foreign.recipe.arrays(),
        canaries_per_view=default_canaries(count),
        source=source.description,
        excluded=tuple({"key": key, "reason": reason} for key, reason in index.excluded),
        licence=options.licence,
        citation=options.citation,
        environment=view_environment(),
    )


# -- the first reading ------------------------------------------------------------------------------------------------


@dataclass
class Survey:
    """What the records hold, all together."""

    digest: str = ""
    lost: Counter[str] = field(default_factory=Counter)
    labelled: int = 0
    correct: int = 0

    def sentences(self) -> Iterator[str]:
        for text, count in sorted(self.lost.items()):
            if count:
                yield f"{count:,} {text}"
        if self.labelled:
            yield f"top-1 of the logits on {self.labelled:,} labelled views: {self.correct / self.labelled:.1%}"


def survey_source(job: Job) -> Survey:
    """Read every record once: refuses what is wrong before anything is written."""
    survey, digest = Survey(), hashlib.sha256()
    total, done = len(job.records) * job.spec.num_views, 0
    for _, rows, views in job.pieces():
        part = job.read(rows, views)
        for position in range(len(views)):  # so that it does not depend on how many views are read at a time
            for array in part.content:
                digest.update(f"{array.dtype.str}{array.shape[1:]}".encode())
                digest.update(np.ascontiguousarray(array[position]).data)
        labels = job.index.labels[rows]
        survey.labelled += int((labels >= 0).sum()) * len(views)
        survey.correct += int(((part.top1 == labels) & (labels >= 0)).sum())
        survey.lost += part.lost
        done += len(rows) * len(views)
        job.progress.advance("check", done, total)
    survey.digest = digest.hexdigest()
    return survey


def warn_of_chance(job: Job, survey: Survey) -> None:
    if is_near_chance(survey.correct, survey.labelled, job.spec.num_classes):
        job.progress.warning(
            f"the largest logits agree with the labels in {survey.correct / survey.labelled:.1%} of the views, chance "
            f"is {1 / job.spec.num_classes:.1%}; check the names and the order of the classes"
        )


def choose_codec(job: Job) -> tuple[Codec, float]:
    """The codec, fitted to rows that are spread evenly over all views, and its bytes per view."""
    rows = pilot_rows(job)
    kept, options = job.foreign.kept, job.options
    codec: Codec
    if kept is None:
        codec = fit_codec(options.codec, rows, fidelity=options.fidelity)
    else:
        codec = TopKCodec(job.spec.num_classes, kept)
    return codec, compressed_size(codec, codec.encode(rows[-TRIAL_ROWS:]))


def pilot_rows(job: Job) -> np.ndarray:
    total = len(job.records) * job.spec.num_views
    low, high = PILOT_ROWS
    count = min(total, max(low, min(ROWS_PER_CLASS * job.spec.num_classes, high)))
    if job.foreign.kept is not None:
        count = min(count, TRIAL_ROWS)
    views, rows = np.divmod(np.arange(count) * total // count, len(job.records))
    parts = []
    for view in np.unique(views).tolist():
        job.stop.raise_if_set()
        part = job.read(rows[views == view], range(view, view + 1))
        parts.append(part.logits(0, slice(None)))
    return np.concatenate(parts)


# -- writing ----------------------------------------------------------------------------------------------------------


def open_existing(job: Job) -> ArchiveWriter | None:
    """The archive that an earlier call began; None if there is none yet and one can be created."""
    path, name = job.options.out, job.options.teacher_name
    if not (path / "zarr.json").exists():
        check_new_path(path)
        return None
    writer = ArchiveWriter.resume(path, job.spec)
    if others := sorted(set(writer.teachers) - {name}):
        raise Refused(f"{path} holds the teacher {others[0]}, whose views may be others; import to a new archive")
    return writer


def write_archive(job: Job, writer: ArchiveWriter | None, codec: Codec, survey: Survey, audit: tuple[str, ...]) -> str:
    if writer is None:
        LOCAL.make_directories(job.options.out.absolute().parent)
        writer = ArchiveWriter.create(job.options.out, job.spec)
    refuse_other_source(job, writer, survey)
    index = job.index
    writer.write_samples(index.keys, index.labels, index.digests, index.sizes)
    model = {
        "name": job.options.teacher_name,
        "imported": {**job.foreign.description, "digest": survey.digest},
        "audit": list(audit),
        "codec": job.options.codec,
        "fidelity": job.options.fidelity,
    }
    teacher = TeacherSpec(job.options.teacher_name, (SignalSpec.of(LOGITS, codec),), model)
    writer.add_teacher(teacher, {LOGITS: codec.side()})
    write_blocks(job, writer, codec)
    write_canaries(job, writer)
    return writer.seal()


def refuse_other_source(job: Job, writer: ArchiveWriter, survey: Survey) -> None:
    """Blocks of two sources must not mix."""
    teacher = writer.teachers.get(job.options.teacher_name)
    imported = teacher.model.get("imported") if teacher is not None else None
    if isinstance(imported, dict) and imported.get("digest") != survey.digest:
        raise SpecMismatch(
            f"{writer.path} was started from a source with other content; use that one, or start a new archive"
        )


def write_blocks(job: Job, writer: ArchiveWriter, codec: Codec) -> None:
    """Logits and view parameters of every block that is missing; a source is read once for both."""
    missing = {
        part: {(block.view, block.index): block for block in writer.missing(part)} for part in ("views", job.part)
    }
    drawn = DrawnViews(job.index, job.foreign.recipe, seed=0, num_views=job.spec.num_views)
    total, done = len(job.records) * job.spec.num_views, 0
    for number, rows, views in job.pieces():
        done += len(rows) * len(views)
        if any((view, number) in blocks for blocks in missing.values() for view in views):
            part = job.read(rows, views)
            for position, view in enumerate(views):
                job.stop.raise_if_set()
                if block := missing["views"].get((view, number)):
                    params = {name: values[position] for name, values in part.params.items()}
                    writer.write(block, params or drawn.params(view, rows))
                if block := missing[job.part].get((view, number)):
                    write_logits(writer, block, codec, part, position)
        job.progress.advance("import", done, total)


def write_logits(writer: ArchiveWriter, block: Block, codec: Codec, part: ForeignViews, position: int) -> None:
    encoded = join_encoded(list(encoded_pieces(codec, part, position, len(block.rows))))
    arrays = {f"{LOGITS}/{name}": np.asarray(array) for name, array in encoded.arrays.items()}
    writer.write(block, arrays, {LOGITS: BlockStats.of(encoded).to_json()})


def encoded_pieces(codec: Codec, part: ForeignViews, position: int, count: int) -> Iterator[Encoded]:
    step = max(1, min(MAX_PIECE_ROWS, PIECE_VALUES // codec.width))
    for start in range(0, count, step):
        yield codec.encode(part.logits(position, slice(start, min(start + step, count))))


def write_canaries(job: Job, writer: ArchiveWriter) -> None:
    """Fingerprints of some views as stage 2 will render them, from the stored parameters."""
    blocks = writer.missing("canaries")
    if not blocks:
        return
    archive = writer.read_back()
    dataset = ViewDataset(job.source, archive, joined=join_archive(job.index, archive), check=False)
    for done, block in enumerate(blocks, start=1):
        job.stop.raise_if_set()
        rows = canary_rows(job.spec.seed, block.view, job.spec.num_samples, job.spec.canaries_per_view)
        writer.write(block, {"row": rows, "pixels": fingerprints(dataset, block.view, rows)})
        job.progress.advance("fingerprints", done, len(blocks))
