"""What an archive says about itself: the specification, as frozen data, and its strict reading from JSON.

The specification decides every byte of metadata (layout.py turns it into zarr.json files), so it is all that a reader
parses: zarr never sees a document that came with an archive.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from redistill_cache import limits
from redistill_cache.arrays import ArraySpec
from redistill_cache.errors import NewerFormat, Refused, UsageError
from redistill_cache.strict_json import Fields, Json, canonical, json_copy

__all__ = [
    "FORMAT",
    "VERSION",
    "ArchiveSpec",
    "SideArray",
    "SignalSpec",
    "TeacherSpec",
    "archive_identity",
    "parse_archive_spec",
    "parse_teacher_spec",
    "teacher_identity",
]

FORMAT = "redistill-archive"
VERSION = (1, 0)

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
DTYPES = (*INTEGERS, "float16", "float32", "float64")
CODECS = ("linear", "float16", "float32", "compander", "topk")

# Names become folders on any file system, so: lower case only, and nothing a zarr hierarchy already uses.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
SIGNAL_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_.-]{0,62}[a-z0-9_])?")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair: no UTF-8 can hold it
RESERVED = ("zarr.json", "side", "c")


def _require(condition: bool, where: str, expected: str, found: object) -> None:
    if not condition:
        raise UsageError(f"{where} must be {expected}, found {ascii(found)[:80]}")


def _check_name(name: str, where: str, pattern: re.Pattern[str] = NAME) -> None:
    fits = isinstance(name, str) and pattern.fullmatch(name) and name not in RESERVED and ".." not in name
    _require(bool(fits), where, "1 to 64 of a-z, 0-9, '_' and '-', starting with a letter or digit", name)


def _check_int(value: int, where: str, low: int, high: int) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(fits, where, f"an integer from {low} to {high}", value)


def _check_text(value: str, where: str) -> None:
    fits = isinstance(value, str) and len(value) <= limits.MAX_TEXT and not _SURROGATE.search(value)
    _require(fits, where, f"a text of at most {limits.MAX_TEXT} characters", value)


def _check_unique(names: Iterable[str], where: str, most: int) -> None:
    names = list(names)
    _require(len(names) <= most, where, f"at most {most} entries", len(names))
    _require(len(set(names)) == len(names), where, "without duplicates", names)


def check_array(array: ArraySpec, where: str) -> None:
    """Refuse an ArraySpec that cannot be stored. Products are taken of checked factors only."""
    _check_name(array.name, f"{where}: name of an array")
    where = f"{where}: array {array.name!r}:"
    _require(array.dtype in DTYPES, f"{where} dtype", f"one of {', '.join(DTYPES)}", array.dtype)
    _require(len(array.row_shape) <= 6, f"{where} row_shape", "of at most 6 dimensions", array.row_shape)
    for size in array.row_shape:
        _check_int(size, f"{where} row_shape", 1, limits.MAX_ROW_BYTES)
    _require(
        array.row_bytes <= limits.MAX_ROW_BYTES, f"{where} a row", f"<= {limits.MAX_ROW_BYTES} bytes", array.row_bytes
    )
    if array.chunk_rows is not None:
        _check_int(array.chunk_rows, f"{where} chunk_rows", 1, limits.MAX_BLOCK_ROWS)
    _check_int(array.level, f"{where} zstd level", 1, 22)
    _require(isinstance(array.transpose, bool), f"{where} transpose", "true or false", array.transpose)
    _require(bool(array.row_shape) or not array.transpose, f"{where} transpose", "false for rows of one value", True)


@dataclass(frozen=True)
class SideArray:
    """An array written once for a signal: the basis of a codec, an offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        _check_name(self.name, "name of a side array")
        where = f"side array {self.name!r}:"
        _require(self.dtype in DTYPES, f"{where} dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        _require(1 <= len(self.shape) <= 6, f"{where} shape", "of 1 to 6 dimensions", self.shape)
        for size in self.shape:
            _check_int(size, f"{where} shape", 1, limits.MAX_SIDE_BYTES)
        _require(self.nbytes <= limits.MAX_SIDE_BYTES, where, f"<= {limits.MAX_SIDE_BYTES} bytes", self.nbytes)

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class SignalSpec:
    """One thing a teacher says of every view: its logits, or a feature layer. `width` values a row once decoded."""

    name: str
    codec: str
    width: int
    config: Mapping[str, Json] = field(default_factory=dict)
    arrays: tuple[ArraySpec, ...] = ()
    side: tuple[SideArray, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name, "name of a signal", SIGNAL_NAME)
        where = f"signal {self.name!r}"
        _require(self.codec in CODECS, f"{where}: codec", f"one of {', '.join(CODECS)}", self.codec)
        _check_int(self.width, f"{where}: width", 1, limits.MAX_WIDTH)
        object.__setattr__(self, "config", json_copy(self.config, f"{where}: config"))
        object.__setattr__(self, "arrays", tuple(self.arrays))
        object.__setattr__(self, "side", tuple(self.side))
        for array in self.arrays:
            check_array(array, where)
        _check_unique((array.name for array in self.arrays), f"{where}: arrays", limits.MAX_ARRAYS)
        _check_unique((array.name for array in self.side), f"{where}: side arrays", limits.MAX_ARRAYS)
        total = sum(array.nbytes for array in self.side)
        _require(total <= limits.MAX_SIDE_BYTES, f"{where}: side data", f"<= {limits.MAX_SIDE_BYTES} bytes", total)

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
            "arrays": [_array_json(array) for array in self.arrays],
            "side": [asdict(array) | {"shape": list(array.shape)} for array in self.side],
        }


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher of an archive: its signals, and a description of the model (never a place or code to load)."""

    name: str
    signals: tuple[SignalSpec, ...]
    model: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name(self.name, "name of a teacher")
        object.__setattr__(self, "signals", tuple(self.signals))
        object.__setattr__(self, "model", json_copy(self.model, f"teacher {self.name!r}: model"))
        _require(len(self.signals) >= 1, f"teacher {self.name!r}", "a teacher with at least one signal", 0)
        _check_unique((signal.name for signal in self.signals), f"teacher {self.name!r}: signals", limits.MAX_SIGNALS)

    def signal(self, name: str) -> SignalSpec | None:
        return next((signal for signal in self.signals if signal.name == name), None)

    def resolved(self, block_rows: int) -> TeacherSpec:
        """The same with every chunk size decided."""
        signals = (
            replace(signal, arrays=tuple(resolve_chunk(array, block_rows) for array in signal.arrays))
            for signal in self.signals
        )
        return replace(self, signals=tuple(signals))

    def to_json(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "version": f"{VERSION[0]}.{VERSION[1]}",
            "model": self.model,
            "signals": [signal.to_json() for signal in self.signals],
        }


@dataclass(frozen=True, kw_only=True)
class ArchiveSpec:
    """What every view of an archive shares: samples, classes, recipe, and how rows are cut into blocks.

    `recipe` and `source` are descriptions, never code, paths or URLs. `environment` (library versions) is recorded and
    decides nothing. `excluded` lists samples of the source that are not in the archive: {"key": ..., "reason": ...}.
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
    environment: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_int(self.num_samples, "num_samples", 1, limits.MAX_SAMPLES)
        _check_int(self.num_views, "num_views", 1, limits.MAX_VIEWS)
        _check_int(self.num_classes, "num_classes", 1, limits.MAX_CLASSES)
        _check_int(self.block_rows, "block_rows", 1, limits.MAX_BLOCK_ROWS)
        _check_int(self.seed, "seed", 0, 2**64 - 1)
        _check_int(self.canaries_per_view, "canaries_per_view", 0, min(limits.MAX_CANARIES, self.num_samples))
        for key in ("view_arrays", "excluded"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for key in ("recipe", "source", "environment"):
            object.__setattr__(self, key, json_copy(getattr(self, key), key))
        self._check_names()
        for array in self.view_arrays:
            check_array(array, "view parameters")
        _check_unique((array.name for array in self.view_arrays), "view_arrays", limits.MAX_ARRAYS)
        size = len(canonical(self.to_json()))
        _require(size <= limits.MAX_ROOT_BYTES - 1024, "the specification", f"<= {limits.MAX_ROOT_BYTES} bytes", size)

    def _check_names(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
            for name in self.class_names:
                _check_text(name, "a class name")
            expected = f"{self.num_classes} names, one per class"
            _require(len(self.class_names) == self.num_classes, "class_names", expected, len(self.class_names))
        _require(len(self.excluded) <= limits.MAX_EXCLUDED, "excluded", "a short list", len(self.excluded))
        for item in self.excluded:
            _require(set(item) == {"key", "reason"}, "an excluded sample", "a key and a reason", dict(item))
            _check_text(item["key"], "key of an excluded sample")
            _check_text(item["reason"], "reason of an excluded sample")
        _check_text(self.licence, "licence")
        _check_text(self.citation, "citation")

    @property
    def blocks_per_view(self) -> int:
        return -(-self.num_samples // self.block_rows)

    def resolved(self) -> ArchiveSpec:
        """The same with every chunk size decided: what is stored and compared."""
        arrays = tuple(resolve_chunk(array, self.block_rows) for array in self.view_arrays)
        return replace(self, view_arrays=arrays)

    def to_json(self) -> dict[str, Json]:
        return {
            "format": FORMAT,
            "version": f"{VERSION[0]}.{VERSION[1]}",
            "num_samples": self.num_samples,
            "num_views": self.num_views,
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "block_rows": self.block_rows,
            "recipe": self.recipe,
            "seed": self.seed,
            "view_arrays": [_array_json(array) for array in self.view_arrays],
            "canaries_per_view": self.canaries_per_view,
            "source": self.source,
            "excluded": [dict(item) for item in self.excluded],
            "licence": self.licence,
            "citation": self.citation,
            "environment": self.environment,
        }


# -- chunk sizes ------------------------------------------------------------------------------------------------------

CHUNK_BYTES = 1 << 20


def resolve_chunk(array: ArraySpec, block_rows: int) -> ArraySpec:
    """Decide how many rows are compressed together: a divisor of `block_rows`, near the wish or near a mebibyte."""
    wish = array.chunk_rows or max(1, CHUNK_BYTES // array.row_bytes)
    wish = min(wish, block_rows, max(1, limits.MAX_CHUNK_BYTES // array.row_bytes))
    rows = min(_divisors(block_rows), key=lambda rows: (abs(math.log(rows / wish)), rows))
    if rows * array.row_bytes > limits.MAX_CHUNK_BYTES:
        raise UsageError(
            f"array {array.name!r}: block_rows={block_rows} has no divisor that gives chunks of at most "
            f"{limits.MAX_CHUNK_BYTES >> 20} MiB; choose one with more divisors, a power of two for instance"
        )
    return replace(array, chunk_rows=rows, row_shape=tuple(array.row_shape))


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


# -- identity ---------------------------------------------------------------------------------------------------------


def archive_identity(value: Mapping[str, Json]) -> str:
    """What binds a commit record to its archive: a hash of the specification as stored.

    The number of views may grow later, so it does not count. A teacher's records are bound to `teacher_identity`.
    """
    rest = {key: item for key, item in value.items() if key != "num_views"}
    return hashlib.sha256(canonical(rest)).hexdigest()


def teacher_identity(archive: str, value: Mapping[str, Json]) -> str:
    """The same for the records of one teacher; `archive` is the identity of its archive."""
    return hashlib.sha256(canonical([archive, dict(value)])).hexdigest()


# -- reading ----------------------------------------------------------------------------------------------------------


def _array_json(array: ArraySpec) -> dict[str, Json]:
    return asdict(array) | {"row_shape": list(array.row_shape)}


def _parse_array(value: Json, where: str, block_rows: int) -> ArraySpec:
    fields = Fields(value, where)
    array = ArraySpec(
        name=fields.text("name", 64),
        dtype=fields.text("dtype", 16),
        row_shape=fields.integers("row_shape", 6),
        chunk_rows=fields.integer("chunk_rows", 1, block_rows),
        transpose=fields.flag("transpose"),
        level=fields.integer("level", 1, 22),
    )
    fields.done()
    check_array(array, where)
    chunk_rows = array.chunk_rows or 0
    if block_rows % chunk_rows or chunk_rows * array.row_bytes > limits.MAX_CHUNK_BYTES:
        fields.refuse("chunk_rows", f"a divisor of {block_rows} with chunks <= {limits.MAX_CHUNK_BYTES} bytes")
    return array


def _parse_side(value: Json, where: str) -> SideArray:
    fields = Fields(value, where)
    side = SideArray(fields.text("name", 64), fields.text("dtype", 16), fields.integers("shape", 6))
    fields.done()
    return side


def _parse_signal(value: Json, where: str, block_rows: int) -> SignalSpec:
    fields = Fields(value, where)
    signal = SignalSpec(
        name=fields.text("name", 64),
        codec=fields.text("codec", 64),
        width=fields.integer("width", 1, limits.MAX_WIDTH),
        config=fields.mapping("config"),
        arrays=tuple(_parse_array(item, where, block_rows) for item in fields.items("arrays", limits.MAX_ARRAYS)),
        side=tuple(_parse_side(item, where) for item in fields.items("side", limits.MAX_ARRAYS)),
    )
    fields.done()
    return signal


def parse_version(fields: Fields, where: str) -> tuple[int, int]:
    """The format version, after refusing a major that this reader does not know."""
    text = fields.text("version", 16)
    match = re.fullmatch(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})", text)
    if not match:
        fields.refuse("version", "MAJOR.MINOR")
    major, minor = int(match[1]), int(match[2])
    if major != VERSION[0]:
        newer = major > VERSION[0]
        advice = "upgrade redistill (pip install -U redistill)" if newer else "that version was never released"
        kind = NewerFormat if newer else Refused
        raise kind(f"{where}: written in archive format {text}, this redistill reads {VERSION[0]}.x; {advice}")
    return major, minor


def parse_archive_spec(value: Json, where: str) -> ArchiveSpec:
    """The specification from the attributes of an archive's root zarr.json, which are not trusted."""
    fields = Fields(value, where)
    if fields.text("format", 64) != FORMAT:
        fields.refuse("format", repr(FORMAT))
    _, minor = parse_version(fields, where)
    block_rows = fields.integer("block_rows", 1, limits.MAX_BLOCK_ROWS)
    arrays = fields.items("view_arrays", limits.MAX_ARRAYS)
    try:
        spec = ArchiveSpec(
            num_samples=fields.integer("num_samples", 1, limits.MAX_SAMPLES),
            num_views=fields.integer("num_views", 1, limits.MAX_VIEWS),
            num_classes=fields.integer("num_classes", 1, limits.MAX_CLASSES),
            class_names=None if fields.is_null("class_names") else fields.texts("class_names", limits.MAX_CLASSES),
            block_rows=block_rows,
            recipe=fields.mapping("recipe"),
            seed=fields.integer("seed", 0, 2**64 - 1),
            view_arrays=tuple(_parse_array(item, f"{where}: view_arrays", block_rows) for item in arrays),
            canaries_per_view=fields.integer("canaries_per_view", 0, limits.MAX_CANARIES),
            source=fields.mapping("source"),
            excluded=tuple(_parse_excluded(item, where) for item in fields.items("excluded", limits.MAX_EXCLUDED)),
            licence=fields.text("licence", limits.MAX_TEXT),
            citation=fields.text("citation", limits.MAX_TEXT),
            environment=fields.mapping("environment"),
        )
    except UsageError as error:  # the same rules hold for a caller and for a file; only the blame differs
        raise Refused(f"{where}: {error}") from None
    fields.done(ignore_unknown=minor > VERSION[1])
    return spec


def _parse_excluded(value: Json, where: str) -> dict[str, str]:
    fields = Fields(value, f"{where}: excluded")
    item = {"key": fields.text("key", limits.MAX_TEXT), "reason": fields.text("reason", limits.MAX_TEXT)}
    fields.done()
    return item


def parse_teacher_spec(value: Json, where: str, block_rows: int) -> TeacherSpec:
    """A teacher from the attributes of its zarr.json, which are not trusted."""
    fields = Fields(value, where)
    _, minor = parse_version(fields, where)
    try:
        teacher = TeacherSpec(
            name=fields.text("name", 64),
            model=fields.mapping("model"),
            signals=tuple(
                _parse_signal(item, f"{where}: signals", block_rows)
                for item in fields.items("signals", limits.MAX_SIGNALS)
            ),
        )
    except UsageError as error:
        raise Refused(f"{where}: {error}") from None
    fields.done(ignore_unknown=minor > VERSION[1])
    return teacher
