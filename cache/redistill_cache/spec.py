"""The specification of an archive as frozen, checked dataclasses.

It determines every byte of metadata (layout.py turns it into zarr.json files), so it is all that a reader parses: no
metadata of an archive is passed to zarr. The same rules hold for a caller (`UsageError`) and for a file (`Refused`, see
spec_files.py).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from redistill_cache import limits
from redistill_cache.errors import UsageError
from redistill_cache.strict_json import Json, canonical, json_copy

__all__ = [
    "ADDED_TERMS",
    "CHUNK_BYTES",
    "FORMAT",
    "LOGITS",
    "ROOT_MINOR",
    "RUN_SETTINGS",
    "TEACHER_MINOR",
    "TERMS",
    "VERSION",
    "ArchiveSpec",
    "ArraySpec",
    "Parent",
    "SideArray",
    "SignalSpec",
    "TeacherSpec",
    "additions_flaw",
    "archive_identity",
    "check_array",
    "check_int",
    "check_name",
    "check_signal_name",
    "check_text",
    "check_unique",
    "chunks_fit",
    "is_name",
    "require",
    "resolve_chunk",
    "teacher_identity",
]


# -- names, numbers and texts -----------------------------------------------------------------------------------------

# Names become folders on any file system, so: lower case only, and nothing that a zarr hierarchy already uses.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
SIGNAL_NAME = re.compile(r"(?!.*\.\.)[a-z0-9](?:[a-z0-9_.-]{0,62}[a-z0-9_])?")
RESERVED = ("zarr.json", "side", "c")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair: no UTF-8 can encode it


def require(condition: bool, where: str, expected: str, found: object) -> None:
    """`UsageError` unless the condition holds."""
    if not condition:
        raise UsageError(f"{where} must be {expected}, found {ascii(found)[:80]}")


def is_name(text: str) -> bool:
    """Whether this is a valid name of a teacher, an array or side data; only then may it become part of a path."""
    return bool(NAME.fullmatch(text)) and text not in RESERVED


def check_name(name: str, where: str) -> None:
    fits = isinstance(name, str) and is_name(name)
    require(fits, where, "1 to 64 of a-z, 0-9, '_' and '-', starting with a letter or digit", name)


def check_signal_name(name: str, where: str) -> None:
    """As `check_name`, but dots are allowed: names of network layers contain them."""
    fits = isinstance(name, str) and SIGNAL_NAME.fullmatch(name) and name not in RESERVED
    require(bool(fits), where, "1 to 64 of a-z, 0-9, '_', '-' and single dots inside", name)


def check_int(value: int, where: str, low: int, high: int) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(fits, where, f"an integer from {low} to {high}", value)


def check_text(value: str, where: str) -> None:
    fits = isinstance(value, str) and len(value) <= limits.MAX_TEXT and not SURROGATE.search(value)
    require(fits, where, f"a string of at most {limits.MAX_TEXT} characters", value)


def check_unique(names: Iterable[str], where: str, most: int) -> None:
    names = list(names)
    require(len(names) <= most, where, f"at most {most} entries", len(names))
    require(len(set(names)) == len(names), where, "without duplicates", names)


# -- arrays -----------------------------------------------------------------------------------------------------------

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
DTYPES = (*INTEGERS, "float16", "float32", "float64")


@dataclass(frozen=True)
class ArraySpec:
    """An array of shape [views, samples, *row_shape], one row per view and sample.

    `chunk_rows` rows are compressed together (None: the writer chooses about a mebibyte); with `transpose` the bytes
    of a chunk are stored column by column, so that columns of small integers compress well; `level` is that of zstd.
    """

    name: str
    dtype: str
    row_shape: tuple[int, ...] = ()
    chunk_rows: int | None = None
    transpose: bool = False
    level: int = 3

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.row_shape)

    def to_json(self) -> dict[str, Json]:
        return asdict(self) | {"row_shape": list(self.row_shape)}


@dataclass(frozen=True)
class SideArray:
    """An array that is written once for a signal, such as the basis of a codec."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        check_name(self.name, "name of a side array")
        where = f"side array {self.name!r}:"
        require(self.dtype in DTYPES, f"{where} dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        require(1 <= len(self.shape) <= 6, f"{where} shape", "of 1 to 6 dimensions", self.shape)
        for size in self.shape:
            check_int(size, f"{where} shape", 1, limits.MAX_SIDE_BYTES)
        require(self.nbytes <= limits.MAX_SIDE_BYTES, where, f"<= {limits.MAX_SIDE_BYTES} bytes", self.nbytes)

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def to_json(self) -> dict[str, Json]:
        return asdict(self) | {"shape": list(self.shape)}


def check_array(array: ArraySpec, where: str) -> None:
    """`UsageError` for an array that cannot be stored. Only checked sizes are multiplied."""
    check_name(array.name, f"{where}: name of an array")
    where = f"{where}: array {array.name!r}:"
    require(array.dtype in DTYPES, f"{where} dtype", f"one of {', '.join(DTYPES)}", array.dtype)
    require(len(array.row_shape) <= 6, f"{where} row_shape", "of at most 6 dimensions", array.row_shape)
    for size in array.row_shape:
        check_int(size, f"{where} row_shape", 1, limits.MAX_ROW_BYTES)
    require(
        array.row_bytes <= limits.MAX_ROW_BYTES, f"{where} a row", f"<= {limits.MAX_ROW_BYTES} bytes", array.row_bytes
    )
    if array.chunk_rows is not None:
        check_int(array.chunk_rows, f"{where} chunk_rows", 1, limits.MAX_BLOCK_ROWS)
    check_int(array.level, f"{where} zstd level", 1, 22)
    require(isinstance(array.transpose, bool), f"{where} transpose", "true or false", array.transpose)
    require(bool(array.row_shape) or not array.transpose, f"{where} transpose", "false for rows of one value", True)


# -- chunk sizes ------------------------------------------------------------------------------------------------------

CHUNK_BYTES = 1 << 20


def resolve_chunk(array: ArraySpec, block_rows: int) -> ArraySpec:
    """The array with `chunk_rows` set: a divisor of `block_rows` near the requested number, or near a mebibyte."""
    target = array.chunk_rows or max(1, CHUNK_BYTES // array.row_bytes)
    target = min(target, block_rows, max(1, limits.MAX_CHUNK_BYTES // array.row_bytes))
    rows = min(_divisors(block_rows), key=lambda rows: (abs(math.log(rows / target)), rows))
    if not chunks_fit(array, rows, block_rows):
        raise UsageError(
            f"array {array.name!r}: block_rows={block_rows} gives chunks of {rows * array.row_bytes} bytes, "
            f"{block_rows // rows} per block; expected at most {limits.MAX_CHUNK_BYTES} and {limits.MAX_CHUNKS}: "
            "choose fewer rows, and a power of two"
        )
    return replace(array, chunk_rows=rows, row_shape=tuple(array.row_shape))


def chunks_fit(array: ArraySpec, rows: int, block_rows: int) -> bool:
    return rows * array.row_bytes <= limits.MAX_CHUNK_BYTES and block_rows // rows <= limits.MAX_CHUNKS


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


# -- signals, teachers, archives --------------------------------------------------------------------------------------

FORMAT = "redistill-archive"
VERSION = (1, 0)
# The minor version of an archive whose specification says what version 1.0 cannot: see `ArchiveSpec.to_json`.
ROOT_MINOR = 1
# The minor version of a teacher whose specification says what version 1.0 cannot: see `TeacherSpec.to_json`.
TEACHER_MINOR = 1
# The signal of a network's output; others are named after layers.
LOGITS = "logits"
# What the author states about the archive, all of it text. A sealed archive may state other terms in its manifest.
ADDED_TERMS = ("data_source", "data_licence", "teacher_licence")
TERMS = ("licence", "citation", *ADDED_TERMS)
# Members of a teacher's `model` that describe how its values were computed and stored, not the network.
RUN_SETTINGS = frozenset(
    {
        "batch_size",
        "channels_last",
        "codec",
        "compile",
        "device",
        "feature_fidelity",
        "fidelity",
        "keep_shift",
        "precision",
        "signals",
    }
)
# All codecs of the format; codecs/catalogue.py implements each.
CODECS = ("linear", "float16", "float32", "compander", "topk")


@dataclass(frozen=True)
class SignalSpec:
    """One output of a teacher: its logits, or a feature layer. A decoded row has `width` values."""

    name: str
    codec: str
    width: int
    config: Mapping[str, Json] = field(default_factory=dict)
    arrays: tuple[ArraySpec, ...] = ()
    side: tuple[SideArray, ...] = ()

    def __post_init__(self) -> None:
        check_signal_name(self.name, "name of a signal")
        where = f"signal {self.name!r}"
        require(self.codec in CODECS, f"{where}: codec", f"one of {', '.join(CODECS)}", self.codec)
        check_int(self.width, f"{where}: width", 1, limits.MAX_WIDTH)
        object.__setattr__(self, "config", json_copy(self.config, f"{where}: config"))
        object.__setattr__(self, "arrays", tuple(self.arrays))
        object.__setattr__(self, "side", tuple(self.side))
        for array in self.arrays:
            check_array(array, where)
        check_unique((array.name for array in self.arrays), f"{where}: arrays", limits.MAX_ARRAYS)
        check_unique((array.name for array in self.side), f"{where}: side arrays", limits.MAX_ARRAYS)
        total = sum(array.nbytes for array in self.side)
        require(total <= limits.MAX_SIDE_BYTES, f"{where}: side data", f"<= {limits.MAX_SIDE_BYTES} bytes", total)

    @classmethod
    def of(cls, name: str, codec: Any) -> SignalSpec:  # noqa: ANN401  anything with the attributes of a Codec
        """The specification of signal `name` stored with `codec`."""
        side = tuple(SideArray(key, array.dtype.name, array.shape) for key, array in sorted(codec.side().items()))
        return cls(
            name=name, codec=codec.name, width=codec.width, config=codec.config(), arrays=codec.arrays(), side=side
        )

    def array(self, name: str) -> ArraySpec:
        return next(array for array in self.arrays if array.name == name)

    def to_json(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "codec": self.codec,
            "width": self.width,
            "config": self.config,
            "arrays": [array.to_json() for array in self.arrays],
            "side": [array.to_json() for array in self.side],
        }


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher of an archive: its signals, and a description of the model (never a path, URL or code).

    Signals that were added to a teacher later are a part of their own, with a name of its own: `adds_to` is the name of
    the teacher that they belong to, and `network` is the same.
    """

    name: str
    signals: tuple[SignalSpec, ...]
    model: Mapping[str, Json] = field(default_factory=dict)
    adds_to: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "name of a teacher")
        if self.adds_to is not None:
            check_name(self.adds_to, f"teacher {self.name!r}: the teacher it adds signals to")
            require(self.adds_to != self.name, f"teacher {self.name!r}", "added to another teacher", self.adds_to)
        object.__setattr__(self, "signals", tuple(self.signals))
        object.__setattr__(self, "model", json_copy(self.model, f"teacher {self.name!r}: model"))
        require(len(self.signals) >= 1, f"teacher {self.name!r}", "a teacher with at least one signal", 0)
        check_unique((signal.name for signal in self.signals), f"teacher {self.name!r}: signals", limits.MAX_SIGNALS)

    @property
    def owner(self) -> str:
        """The name of the teacher that these signals belong to: its own, or that of the teacher it adds to."""
        return self.adds_to or self.name

    @property
    def network(self) -> dict[str, Json]:
        """What `model` says about the network itself, weights included."""
        return {key: value for key, value in self.model.items() if key not in RUN_SETTINGS}

    def signal(self, name: str) -> SignalSpec | None:
        return next((signal for signal in self.signals if signal.name == name), None)

    def resolved(self, block_rows: int) -> TeacherSpec:
        """The same teacher with every chunk size set."""
        signals = (
            replace(signal, arrays=tuple(resolve_chunk(array, block_rows) for array in signal.arrays))
            for signal in self.signals
        )
        return replace(self, signals=tuple(signals))

    def to_json(self) -> dict[str, Json]:
        added: dict[str, Json] = {} if self.adds_to is None else {"adds_to": self.adds_to}
        newer = added or any(signal.config.get("metric") == "centred" for signal in self.signals)
        return added | {
            "name": self.name,
            "version": f"{VERSION[0]}.{TEACHER_MINOR if newer else VERSION[1]}",
            "model": self.model,
            "signals": [signal.to_json() for signal in self.signals],
        }


def additions_flaw(teachers: Mapping[str, TeacherSpec]) -> str | None:
    """Why these cannot be the teachers of one archive, or None: signals are added to a teacher of the same network."""
    for teacher in teachers.values():
        if teacher.adds_to is None:
            continue
        base = teachers.get(teacher.adds_to)
        if base is None or base.adds_to is not None:
            return (
                f"the signals of {teacher.name!r} are added to {teacher.adds_to!r}, which is no teacher of this archive"
            )
        if canonical(base.network) != canonical(teacher.network):
            return (
                f"the signals of {teacher.name!r} are of another network than teacher {base.name!r}, which they extend"
            )
    return None


ARCHIVE_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Parent:
    """The archive that a subset was taken from: its id, and the numbers that the views of the subset have there."""

    id: str
    views: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(self.views))
        is_id = isinstance(self.id, str) and bool(ARCHIVE_ID.fullmatch(self.id))
        require(is_id, "subset_of: id", "64 hexadecimal digits", self.id)
        for view in self.views:
            check_int(view, "subset_of: views", 0, limits.MAX_VIEWS - 1)
        rise = all(a < b for a, b in itertools.pairwise(self.views))
        require(rise, "subset_of: views", "numbers that rise", self.views)

    def to_json(self) -> dict[str, Json]:
        return {"id": self.id, "views": list(self.views)}


@dataclass(frozen=True, kw_only=True)
class ArchiveSpec:
    """What all views of an archive share: samples, classes, recipe, and how rows are cut into blocks.

    `recipe` and `source` are descriptions, never code, paths or URLs. `environment` (library versions) is only
    recorded. `excluded` lists samples of the source that are not in the archive: {"key": ..., "reason": ...}.
    `subset_of` is the archive that this one is a part of, if it was not written by a teacher.
    """

    num_samples: int
    num_views: int
    num_classes: int
    class_names: tuple[str, ...] | None = None
    block_rows: int = 65536
    recipe: Mapping[str, Json] = field(default_factory=dict)
    seed: int = 0
    view_arrays: tuple[ArraySpec, ...] = ()
    canaries_per_view: int = 0
    source: Mapping[str, Json] = field(default_factory=dict)
    excluded: tuple[Mapping[str, str], ...] = ()
    licence: str = ""
    citation: str = ""
    data_source: str = ""
    """Where the images come from: a name or a URL, which nothing opens."""
    data_licence: str = ""
    teacher_licence: str = ""
    environment: Mapping[str, Json] = field(default_factory=dict)
    subset_of: Parent | None = None

    def __post_init__(self) -> None:
        check_int(self.num_samples, "num_samples", 1, limits.MAX_SAMPLES)
        check_int(self.num_views, "num_views", 1, limits.MAX_VIEWS)
        check_int(self.num_classes, "num_classes", 1, limits.MAX_CLASSES)
        check_int(self.block_rows, "block_rows", 1, limits.MAX_BLOCK_ROWS)
        check_int(self.seed, "seed", 0, 2**64 - 1)
        check_int(self.canaries_per_view, "canaries_per_view", 0, min(limits.MAX_CANARIES, self.num_samples))
        for key in ("view_arrays", "excluded"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for key in ("recipe", "source", "environment"):
            object.__setattr__(self, key, json_copy(getattr(self, key), key))
        self._check_names()
        views = self.num_views if self.subset_of is None else len(self.subset_of.views)
        require(views == self.num_views, "subset_of: views", f"{self.num_views} numbers, one per view", views)
        for array in self.view_arrays:
            check_array(array, "view parameters")
        check_unique((array.name for array in self.view_arrays), "view_arrays", limits.MAX_ARRAYS)
        row_bytes = sum(array.row_bytes for array in self.view_arrays)
        most = f"at most {limits.MAX_VIEW_ROW_BYTES} bytes per view in total"
        require(row_bytes <= limits.MAX_VIEW_ROW_BYTES, "view_arrays", most, row_bytes)
        size = len(canonical(self.to_json()))
        require(size <= limits.MAX_ROOT_BYTES - 1024, "the specification", f"<= {limits.MAX_ROOT_BYTES} bytes", size)

    def _check_names(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
            for name in self.class_names:
                check_text(name, "a class name")
            count, most = len(self.class_names), limits.MAX_CLASS_NAMES
            require(count <= most, "class_names", f"at most {most} names, or none", count)
            require(count == self.num_classes, "class_names", f"{self.num_classes} names, one per class", count)
        most = limits.MAX_EXCLUDED
        require(len(self.excluded) <= most, "excluded", f"a list of at most {most} samples", len(self.excluded))
        for item in self.excluded:
            require(set(item) == {"key", "reason"}, "an excluded sample", "a key and a reason", dict(item))
            check_text(item["key"], "key of an excluded sample")
            check_text(item["reason"], "reason of an excluded sample")
        for name in TERMS:
            check_text(getattr(self, name), name)

    def check_teacher(self, teacher: TeacherSpec) -> None:
        """`UsageError` unless the logits of a teacher have one value per class."""
        for signal in teacher.signals:
            fits = signal.name != LOGITS or signal.width == self.num_classes
            expected = f"{self.num_classes}, the number of classes"
            require(fits, f"teacher {teacher.name!r}: width of the logits", expected, signal.width)

    def with_terms(self, terms: Mapping[str, str]) -> ArchiveSpec:
        """The same specification with some of `TERMS` replaced."""
        values: Mapping[str, Any] = terms
        return replace(self, **values)

    @property
    def added_terms(self) -> dict[str, str]:
        """Those of `ADDED_TERMS` that are stated; version 1.0 of the format does not have them."""
        return {name: value for name in ADDED_TERMS if (value := getattr(self, name))}

    @property
    def blocks_per_view(self) -> int:
        return -(-self.num_samples // self.block_rows)

    def resolved(self) -> ArchiveSpec:
        """The same specification with every chunk size set: what is stored and compared."""
        arrays = tuple(resolve_chunk(array, self.block_rows) for array in self.view_arrays)
        return replace(self, view_arrays=arrays)

    def to_json(self) -> dict[str, Json]:
        added: dict[str, Json] = {} if self.subset_of is None else {"subset_of": self.subset_of.to_json()}
        added |= self.added_terms
        return added | {
            "format": FORMAT,
            "version": f"{VERSION[0]}.{ROOT_MINOR if added else VERSION[1]}",
            "num_samples": self.num_samples,
            "num_views": self.num_views,
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "block_rows": self.block_rows,
            "recipe": self.recipe,
            "seed": self.seed,
            "view_arrays": [array.to_json() for array in self.view_arrays],
            "canaries_per_view": self.canaries_per_view,
            "source": self.source,
            "excluded": [dict(item) for item in self.excluded],
            "licence": self.licence,
            "citation": self.citation,
            "environment": self.environment,
        }


# -- identity ---------------------------------------------------------------------------------------------------------


def archive_identity(value: Mapping[str, Json]) -> str:
    """A hash of the specification as stored, which binds commit records to their archive.

    It leaves out the number of views, which may grow later. A teacher's records are bound to `teacher_identity`.
    """
    rest = {key: item for key, item in value.items() if key != "num_views"}
    return hashlib.sha256(canonical(rest)).hexdigest()


def teacher_identity(archive: str, value: Mapping[str, Json]) -> str:
    """As `archive_identity`, for the records of one teacher; `archive` is the identity of the archive."""
    return hashlib.sha256(canonical([archive, dict(value)])).hexdigest()
