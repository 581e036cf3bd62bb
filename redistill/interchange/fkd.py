"""FKD (Fast Knowledge Distillation): one file of torch.save per image, of crops and soft labels.

SOURCE/train/<class>/<stem>.tar, or SOURCE/<class>/<stem>.tar, holds [coords, flip, labels] of N crops of the image
whose name begins with <stem> and a dot:

    coords  [N, 4]     top / H, left / W, height / H, width / W
    flip    [N]        whether the crop was flipped, after it was resized
    labels  [N, 2, K]  classes (as floats) and probabilities of the K largest ("marginal")
            [N, 2]     the same with K = 1 ("smoothing")
            [N, C]     probabilities of all classes
            [N]        classes only ("hard"): there is nothing to distill from, so these are refused

Boxes are whole pixels of the image, so an image of another size is noticed: there they are not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from redistill_cache.errors import Refused, UsageError
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.storage import disk_trouble, walk_regular

from redistill.interchange.crops import audit_of_crops, crops_recipe, views_of_top
from redistill.interchange.foreign import ForeignViews
from redistill.interchange.options import ImportOptions
from redistill.interchange.pickles import array_of, load_record
from redistill.interchange.probabilities import check_probabilities, logits_of

__all__ = ["FkdFolder"]

SUFFIX = ".tar"
MAX_FILES = 20_000_000
# float16 holds every integer up to this one.
LARGEST_FLOAT16_CLASS = 2048
# In pixels, beside the rounding of the type: of the arithmetic that the edges went through.
EDGE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Record:
    """The file of one image: boxes [N, 4], flips [N], and probabilities; their classes where only some are kept."""

    coords: np.ndarray
    flip: np.ndarray
    ids: np.ndarray | None
    probabilities: np.ndarray

    def kind(self) -> tuple[object, ...]:
        """What must be the same in all files."""
        kept = self.probabilities.shape[1:], self.probabilities.dtype.name
        return len(self.coords), self.coords.dtype.name, self.ids is None, *kept


class FkdFolder:
    """A folder of FKD's files."""

    def __init__(self, options: ImportOptions, num_classes: int | None) -> None:
        if num_classes is None:
            raise UsageError(
                "the number of classes is not in the source and the data has no class names; add --classes"
            )
        self.num_classes = num_classes
        self._root = options.source / "train" if (options.source / "train").is_dir() else options.source
        with disk_trouble("read", self._root):
            files = sorted(walk_regular(self._root, most=MAX_FILES))
        self.names: PackedKeys = pack_keys(file.removesuffix(SUFFIX) for file in files if file.endswith(SUFFIX))
        if not len(self.names):
            raise Refused(f"{self._root} has no files CLASS/NAME{SUFFIX}; expected a folder of FKD or its train")
        self._others = len(files) - len(self.names)
        first = self._load(0)
        self._kind, crops = first.kind(), len(first.coords)
        self.num_views = options.views or crops
        if self.num_views > crops:
            raise Refused(f"{self._root} has {crops} crops of each image, expected {self.num_views} for --views")
        self.kept = None if first.ids is None else int(first.probabilities.shape[1])
        self.view_bytes = 48 + (num_classes * 8 if self.kept is None else self.kept * 20)
        self.recipe = crops_recipe(options.recipe)
        self._temperature = options.temperature or 1.0
        self.description: Mapping[str, Any] = {
            "layout": "fkd",
            "crops": crops,
            "labels": f"{self.kept} largest probabilities" if self.kept else "all probabilities",
            "dtype": first.probabilities.dtype.name,
            "dtype_of_boxes": first.coords.dtype.name,
            "temperature": self._temperature,
        }
        self.audit = tuple(self._audit(options))

    def _audit(self, options: ImportOptions) -> Iterator[str]:
        yield from audit_of_crops(options, self.recipe, self.kept, self.num_classes)
        if self.description["dtype"] == "float16":
            yield "precision of the probabilities: the source has float16"
        if self.num_views < self.description["crops"]:
            yield f"views: the first {self.num_views} of {self.description['crops']} crops"
        if self._others:
            yield f"{self._others:,} files that do not end in {SUFFIX} were not read"

    def names_of(self, keys: PackedKeys) -> Iterable[str]:
        paths = map(PurePosixPath, keys)
        return (str(path.with_name(path.name.partition(".")[0] or path.name)) for path in paths)

    def read(self, records: np.ndarray, views: range, sizes: np.ndarray) -> ForeignViews:
        loaded = [self._checked(int(record)) for record in records]
        lost: Counter[str] = Counter()
        where = f"{self._root.name}/{self.names[int(records[0])]}{SUFFIX} or one of the {len(records) - 1} after it"
        part = slice(views.start, views.stop)
        coords = np.stack([record.coords[part] for record in loaded], axis=1)
        flips = np.stack([record.flip[part] for record in loaded], axis=1)
        top = np.stack([record.probabilities[part] for record in loaded], axis=1)
        boxes = self._boxes(coords, sizes, records, lost)
        params = {"crop": boxes, "flip": flips.astype(np.uint8)}
        content = (coords, flips)
        if self.kept is None:
            lost += check_probabilities(top, where)
            return ForeignViews(
                (*content, top),
                top.argmax(-1),
                lambda v, rows: logits_of(top[v, rows], self._temperature),
                params,
                lost,
            )
        ids = np.stack([record.ids[part] for record in loaded if record.ids is not None], axis=1)
        return views_of_top(ids, top, self.num_classes, self._temperature, where, content, params, lost)

    def _boxes(self, coords: np.ndarray, sizes: np.ndarray, records: np.ndarray, lost: Counter[str]) -> np.ndarray:
        """int32 [v, n, 4]: top, left, height, width in pixels."""
        sides = np.tile(sizes.astype(np.float64), 2)  # height, width, height, width of each image
        exact = coords.astype(np.float64) * sides
        boxes = np.rint(exact)
        with np.errstate(invalid="ignore"):
            reach = np.spacing(np.abs(coords)).astype(np.float64) * sides  # twice the error of rounding to the type
            off = ~(np.abs(exact - boxes) <= reach + EDGE_TOLERANCE)  # NaN, too
        end = boxes[..., :2] + boxes[..., 2:]
        outside = (boxes[..., :2] < 0) | (boxes[..., 2:] < 1) | (end > sizes + reach[..., 2:] + reach[..., :2])
        for wrong, what in ((off.any(-1), "no whole pixels of"), (outside.any(-1), "outside of")):
            if wrong.any():
                view, row = (int(at[0]) for at in np.nonzero(wrong))
                raise Refused(
                    f"{self.names[int(records[row])]!r}: crop {view} is {what} an image of {sizes[row, 0]} x "
                    f"{sizes[row, 1]} (height x width); use images of the sizes that the crops were drawn on"
                )
        unsure = (reach / 2 >= 1 - np.abs(exact - boxes)).any(-1)
        lost[f"crops with an edge that {coords.dtype.name} may have moved by a pixel or more"] += int(unsure.sum())
        past = np.maximum(end - sizes, 0)
        lost["crops that reached beyond their image by such an edge; they were cut to it"] += int(past.any(-1).sum())
        boxes[..., 2:] -= past
        return boxes.astype(np.int32)

    def _checked(self, number: int) -> Record:
        record = self._load(number)
        if record.kind() != self._kind:
            raise Refused(
                f"{self._path(number)} is of another kind than the first file: expected crops, types and kept classes "
                f"{self._kind}, found {record.kind()}"
            )
        return record

    def _path(self, number: int) -> Path:
        return self._root / f"{self.names[number]}{SUFFIX}"

    def _load(self, number: int) -> Record:
        return load_record(self._path(number), lambda content: parse_record(content, self.num_classes))


def parse_record(content: object, num_classes: int) -> Record:
    if not isinstance(content, list | tuple) or len(content) != 3:
        found = f"{len(content)} values" if isinstance(content, list | tuple) else type(content).__name__
        raise Refused(f"expected a list of coords, flip and labels, found {found}")
    coords, flip, labels = (
        array_of(value, name) for value, name in zip(content, ("coords", "flip", "labels"), strict=True)
    )
    count = len(coords) if coords.ndim == 2 else 0
    if coords.shape != (count, 4) or count < 1 or coords.dtype.name not in ("float16", "float32", "float64"):
        raise Refused(f"expected coords as floats [N, 4], found {coords.dtype} {list(coords.shape)}")
    if flip.shape != (count,) or not np.isin(flip, (0, 1)).all():
        raise Refused(f"expected flip as {count} times 0 or 1, found {flip.dtype} {list(flip.shape)}")
    if labels.ndim == 1:
        raise Refused("labels are classes without probabilities (hard labels); there is nothing to distill from")
    if len(labels) != count or not re.fullmatch("float(16|32|64)", labels.dtype.name):
        raise Refused(f"expected labels as floats for {count} crops, found {labels.dtype} {list(labels.shape)}")
    if labels.ndim == 2 and labels.shape[1] == 2:
        if num_classes == 2:
            raise Refused("labels [N, 2] of two classes may be a class with its probability, or both probabilities")
        labels = labels[:, :, None]
    if labels.ndim == 2 and labels.shape[1] == num_classes:
        return Record(coords, flip, None, labels)
    if labels.ndim != 3 or labels.shape[1] != 2 or not 1 <= labels.shape[2] <= num_classes:
        expected = f"[N, 2, K] or [N, {num_classes}]"
        raise Refused(f"expected labels {expected} of {num_classes} classes, found {list(labels.shape)}")
    ids = labels[:, 0].astype(np.float64)
    if labels.dtype == np.float16 and num_classes > LARGEST_FLOAT16_CLASS:
        raise Refused(
            f"classes are stored in float16, which is exact up to {LARGEST_FLOAT16_CLASS} only, and there are "
            f"{num_classes}; the source is damaged beyond repair"
        )
    if not (np.abs(ids) < 1 << 24).all() or (ids != np.rint(ids)).any():
        raise Refused("expected whole numbers as classes in labels[:, 0]")
    return Record(coords, flip, ids.astype(np.int64), labels[:, 1])
