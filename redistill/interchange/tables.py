"""Tables of file names and rows of logits, one view of each image: the central crop.

.npz      arrays `keys` (or `names`), text [N], and `logits`, numbers [N, C]
.npy      numbers [N, C]; the names are the lines of a second file
.csv      name,value,...,value in each line; a first line that begins with name, key, file or filename is a header
.parquet  a column `key` (or `name`) of text and a column `logits` of lists of numbers; needs pyarrow

Rows are read in pieces. A table that cannot be read at any row (.npy can) is first copied to a temporary file beside
the archive, which has no name and vanishes with the process.
"""

from __future__ import annotations

import csv
import math
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import numpy as np
from redistill_cache import limits
from redistill_cache.errors import Refused, UsageError
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.storage import disk_trouble, open_regular
from redistill_cache.wording import human_bytes, one_line

from redistill.caching.estimate import existing_parent, free_bytes
from redistill.interchange.foreign import ForeignViews
from redistill.interchange.options import ImportOptions
from redistill.interchange.probabilities import check_probabilities, logits_of
from redistill.views.recipe import CenterCrop, Recipe
from redistill.views.recipe_spec import parse_recipe

__all__ = ["Table", "open_table"]

FLOATS = ("float16", "float32", "float64")
PIECE_BYTES = 8 << 20
MAX_LINE_BYTES = 32 << 20
NAME_COLUMNS, ROW_COLUMN = ("keys", "names", "key", "name"), "logits"
HEADERS = ("name", "key", "file", "filename")
MAX_ROW_GROUP_BYTES = 4 << 30
# What reading a damaged table raises.
READING_RAISES = (
    zipfile.BadZipFile,
    zlib.error,
    csv.Error,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    UnicodeError,
    ValueError,
)


class Table:
    """A table as a source of one view of each image."""

    num_views = 1
    kept: int | None = None

    def __init__(self, names: PackedKeys, rows: np.ndarray, options: ImportOptions) -> None:
        self.names, self._rows, self._match = names, rows, options.match
        self.num_classes = int(rows.shape[1])
        self._temperature = (options.temperature or 1.0) if options.values == "probabilities" else None
        self.recipe = central_recipe(options.recipe)
        self.view_bytes = self.num_classes * (rows.dtype.itemsize + 4)
        self.description: Mapping[str, Any] = {
            "layout": "table",
            "file": options.source.suffix[1:].lower(),
            "values": options.values,
            "dtype": rows.dtype.name,
            "names": options.match,
        } | ({} if self._temperature is None else {"temperature": self._temperature})
        self.audit = tuple(self._audit(options))

    def _audit(self, options: ImportOptions) -> Iterator[str]:
        if options.recipe is None:
            yield "crop, size and interpolation: not in the source; assumed to be those of the default recipe"
        if self._temperature is not None:
            stated = "stated by the user" if options.temperature else "not in the source; assumed to be 1"
            yield f"temperature of the probabilities: {stated}; the logits are its product with their logarithm"
        if self._rows.dtype.name != "float32":
            kind = self._rows.dtype.name
            done = "had rounded the values before" if kind == "float16" else "is rounded to float32"
            yield f"precision: the source has {kind}, which {done}"

    def names_of(self, keys: PackedKeys) -> Iterable[str]:
        if self._match == "key":
            return keys
        names = (PurePosixPath(key).name for key in keys)
        return names if self._match == "name" else (name.partition(".")[0] for name in names)

    def read(self, records: np.ndarray, views: range, sizes: np.ndarray) -> ForeignViews:  # noqa: ARG002
        rows = np.asarray(self._rows[records])
        where = "the table"
        lost: Counter[str] = Counter()
        if self._temperature is not None:
            lost = check_probabilities(rows, where)
        with np.errstate(over="ignore"):
            single = rows.astype(np.float32, copy=False)
        bad = ~(np.abs(single) <= limits.MAX_VALUE).all(1)
        if bad.any():
            name = self.names[int(records[np.argmax(bad)])]
            raise Refused(
                f"{where} has NaN, infinity or a value above 2^100 in {int(bad.sum())} rows, such as that of {name!r}; "
                "such rows cannot be stored"
            )
        if self._temperature is None and _look_like_probabilities(single):
            raise Refused(
                f"{where}: all rows are from 0 to 1 and sum to 1, so they are probabilities; add --values probabilities"
            )
        temperature = self._temperature

        def logits(_: int, part: slice) -> np.ndarray:
            return single[part] if temperature is None else logits_of(rows[part], temperature)

        return ForeignViews((rows[None],), single.argmax(1)[None], logits, lost=lost)


def _look_like_probabilities(rows: np.ndarray) -> bool:
    if rows.min(initial=0) < 0 or rows.max(initial=0) > 1:
        return False
    return bool((np.abs(rows.sum(1, dtype=np.float64) - 1) < 1e-2).all())


def central_recipe(text: str | None) -> Recipe:
    recipe = parse_recipe(text or "center")
    if not isinstance(recipe.crop, CenterCrop) or len(recipe.steps) > 1:
        raise UsageError(f"--recipe {text!r}: a table has one view without random choices; expected center?size=...")
    return recipe


def open_table(options: ImportOptions, classes: int | None) -> Table:
    """Names and rows of the file, by its suffix; `classes` are those of the data, if it says."""
    path, suffix = options.source, options.source.suffix.lower()
    if (suffix == ".npy") != (options.names is not None):
        raise UsageError(
            f"{path}: the rows of an .npy file have no names; add --names FILE"
            if suffix == ".npy"
            else f"--names is for an .npy file, and {path.name!r} has names of its own; drop it"
        )
    readers = {".npz": read_npz, ".npy": read_npy, ".csv": read_csv, ".parquet": read_parquet}
    if suffix not in readers:
        raise UsageError(f"{path}: expected a table {', '.join(readers)}, found {suffix or 'no suffix'}")
    expected = replace(options, classes=classes)
    with disk_trouble("read", path):
        try:
            names, rows = readers[suffix](expected)
        except READING_RAISES as error:
            raise Refused(f"{path} is not a {suffix} table, is truncated or damaged: {one_line(error)}") from None
    if len(names) != len(rows):
        raise Refused(f"{path}: expected a name for each of the {len(rows):,} rows, found {len(names):,}")
    return Table(names, rows, options)


# -- numpy's files ----------------------------------------------------------------------------------------------------


def read_npz(options: ImportOptions) -> tuple[PackedKeys, np.ndarray]:
    with _regular(options.source) as file, zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        names = next((name for name in NAME_COLUMNS[:2] if f"{name}.npy" in members), None)
        if names is None or f"{ROW_COLUMN}.npy" not in members:
            found = ", ".join(sorted(members)[:5])[:200] or "nothing"
            raise Refused(f"{options.source}: expected the arrays keys and logits, found {found}")
        with archive.open(members[f"{ROW_COLUMN}.npy"]) as member:
            shape, dtype = _header(member, members[f"{ROW_COLUMN}.npy"].file_size, "logits")
            _check_shape(shape, dtype, options)
            rows = _copied(_pieces(member, shape, dtype), shape, dtype, options.out)
        with archive.open(members[f"{names}.npy"]) as member:
            return pack_keys(_names(member, members[f"{names}.npy"].file_size, len(rows))), rows


def read_npy(options: ImportOptions) -> tuple[PackedKeys, np.ndarray]:
    with _regular(options.source) as file:
        shape, dtype = _header(file, options.source.stat().st_size, "the table")
        _check_shape(shape, dtype, options)
        rows = np.memmap(file, dtype, "r", file.tell(), shape)
    assert options.names is not None
    with _regular(options.names) as file:
        return pack_keys(_lines(file)), rows


def _header(file: IO[bytes], size: int, what: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array that has exactly the bytes that follow; objects, which are pickles, are refused."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of .npy")
    shape, is_fortran, dtype = readers[version](file)
    if dtype.hasobject or dtype.fields or dtype.subdtype:
        raise Refused(f"{what}: expected an array of numbers or texts, found one of Python objects; such are not read")
    if is_fortran and len(shape) > 1:
        raise Refused(f"{what}: the array is stored by columns; save numpy.ascontiguousarray of it")
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise Refused(f"{what}: the array states {math.prod(shape) * dtype.itemsize} bytes, its file has others")
    return shape, dtype


def _pieces(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    at_once, left = max(1, PIECE_BYTES // row_bytes), shape[0]
    while left:
        count = min(at_once, left)
        data = file.read(count * row_bytes)
        if len(data) != count * row_bytes:
            raise EOFError("it ends within its rows")
        yield np.frombuffer(data, dtype).reshape(count, *shape[1:])
        left -= count
    file.read(1)  # at the end of a member zip compares its checksum


def _names(file: IO[bytes], size: int, count: int) -> Iterator[str]:
    shape, dtype = _header(file, size, "keys")
    if len(shape) != 1 or dtype.kind not in "US" or shape[0] != count:
        raise Refused(f"expected {count:,} names as an array of text, found {dtype} {list(shape)}")
    if not 1 <= dtype.itemsize <= 4 * limits.MAX_KEY_BYTES:
        raise Refused(f"expected names of at most {limits.MAX_KEY_BYTES} bytes, found texts of {dtype.itemsize}")
    for piece in _pieces(file, shape, dtype):
        yield from (name.decode() if isinstance(name, bytes) else name for name in piece.tolist())


def _lines(file: BinaryIO) -> Iterator[str]:
    while line := file.readline(limits.MAX_KEY_BYTES + 2):
        text = line.rstrip(b"\r\n")
        if len(text) > limits.MAX_KEY_BYTES or not text:
            raise Refused(f"--names: expected a name of 1 to {limits.MAX_KEY_BYTES} bytes in every line")
        yield text.decode()


# -- other files ------------------------------------------------------------------------------------------------------


def read_csv(options: ImportOptions) -> tuple[PackedKeys, np.ndarray]:
    names: list[str] = []
    with _regular(options.source) as file:
        return _gathered(_csv_rows(file, names, options), names, options)


def _csv_rows(file: BinaryIO, names: list[str], options: ImportOptions) -> Iterator[np.ndarray]:
    def lines() -> Iterator[str]:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise Refused(f"{options.source}: a line of more than {MAX_LINE_BYTES} bytes; expected name,value,...")
            yield line.decode("utf-8-sig" if not names else "utf-8")

    for number, cells in enumerate(csv.reader(lines()), start=1):
        if number == 1 and cells and cells[0].strip().lower() in HEADERS:
            continue
        if not cells:
            raise Refused(f"{options.source}: line {number} is empty")
        names.append(cells[0])
        try:
            yield np.array(cells[1:], np.float64)
        except ValueError:
            bad = next(cell for cell in cells[1:] if not _is_number(cell))
            raise Refused(f"{options.source}: line {number} has {bad[:40]!r} where a number was expected") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_parquet(options: ImportOptions) -> tuple[PackedKeys, np.ndarray]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise Refused(f"{options.source}: reading parquet needs pyarrow; pip install 'redistill[parquet]'") from None
    names: list[str] = []
    try:
        with _regular(options.source) as file:
            return _gathered(_parquet_rows(ParquetFile(file), names, options), names, options)
    except (ArrowException, OSError) as error:  # it reports damage as either
        raise ValueError(one_line(error)) from None


def _parquet_rows(table: Any, names: list[str], options: ImportOptions) -> Iterator[np.ndarray]:  # noqa: ANN401
    columns = table.schema_arrow.names
    name = next((column for column in NAME_COLUMNS[2:] if column in columns), None)
    if name is None or ROW_COLUMN not in columns:
        raise Refused(f"{options.source}: expected the columns key and logits, found {', '.join(columns)[:200]}")
    groups = [table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups)]
    if max(groups, default=0) > MAX_ROW_GROUP_BYTES:
        raise Refused(f"{options.source}: a row group of {human_bytes(max(groups))}; write smaller ones")
    for batch in table.iter_batches(batch_size=256, columns=[name, ROW_COLUMN]):
        names.extend(batch.column(name).to_pylist())
        column = batch.column(ROW_COLUMN)
        if column.null_count or None in names[-len(column) :]:
            raise Refused(f"{options.source}: a name or a row is null")
        for i in range(len(column)):
            yield column[i].values.to_numpy(zero_copy_only=False)


# -- rows in a temporary file -----------------------------------------------------------------------------------------


def _gathered(rows: Iterator[np.ndarray], names: list[str], options: ImportOptions) -> tuple[PackedKeys, np.ndarray]:
    """The names, and the rows as one array of as many columns as the first one has."""
    first = next(rows, None)
    if first is None:
        raise Refused(f"{options.source} has no rows")
    if first.dtype.name not in FLOATS or first.ndim != 1:
        raise Refused(f"{options.source}: expected rows of numbers, found {first.dtype}")
    dtype = np.dtype(np.float32 if first.dtype == np.float64 else first.dtype)
    _check_shape((1, len(first)), dtype, options)
    with disk_trouble("write", options.out), tempfile.TemporaryFile(dir=existing_parent(options.out)) as file:
        count = 0
        for row in _chained(first, rows):
            count += 1
            if row.shape != first.shape or row.dtype != first.dtype:
                raise Refused(
                    f"{options.source}: row {count} has {row.size} values of {row.dtype}, the first one {first.size} "
                    f"of {first.dtype}"
                )
            with np.errstate(over="ignore"):
                file.write(row.astype(dtype).tobytes())
            if count % 4096 == 0:
                _refuse_full_disk(options.out, 4096 * row.nbytes)
        file.flush()
        return pack_keys(names), np.memmap(file, dtype, "r", shape=(count, len(first)))


def _chained(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _copied(pieces: Iterator[np.ndarray], shape: tuple[int, ...], dtype: np.dtype[Any], out: Path) -> np.ndarray:
    _refuse_full_disk(out, math.prod(shape) * dtype.itemsize)
    with disk_trouble("write", out), tempfile.TemporaryFile(dir=existing_parent(out)) as file:
        for piece in pieces:
            file.write(piece.tobytes())
        file.flush()
        return np.memmap(file, dtype, "r", shape=shape)


def _refuse_full_disk(out: Path, needed: int) -> None:
    if needed > (free := free_bytes(out)):
        raise Refused(
            f"a copy of the table beside {out} takes {human_bytes(needed)}, found {human_bytes(free)} free; free some "
            "space, or choose another disk"
        )


def _check_shape(shape: tuple[int, ...], dtype: np.dtype[Any], options: ImportOptions) -> None:
    """Before anything of this size is read."""
    if len(shape) != 2 or dtype.name not in FLOATS:
        raise Refused(f"{options.source}: expected logits as floats [N, C], found {dtype} {list(shape)}")
    if not 1 <= shape[0] <= limits.MAX_SAMPLES or not 2 <= shape[1] <= limits.MAX_CLASSES:
        raise Refused(f"{options.source}: a table of {shape[0]} rows and {shape[1]} classes cannot be an archive")
    if options.classes is not None and shape[1] != options.classes:
        raise Refused(
            f"{options.source} has rows of {shape[1]} values, expected {options.classes}, the number of classes of the "
            "data or of --classes"
        )


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    with open(open_regular(path), "rb") as file:  # noqa: PTH123  an open descriptor
        yield file
