"""ml-dr ("Reinforce Data"): one file of torch.save per image, of crops, flips and the largest probabilities.

SOURCE/<i>.pth.tar holds (i, [{"params": P, "prob": ([p, ...], [class, ...])}, ...]), and SOURCE/config.pth.tar the
settings. i is the position of the image in the order of torchvision's ImageFolder, which is that of `folder:` where
class folders have no folders inside. P is [[top, left, height, width], flip] in pixels, or the same as a dictionary of
the names `random_resized_crop` and `random_horizontal_flip`.

Sources with other augmentations are refused: what their numbers mean depends on the version of torchvision, and a mixed
image has crops of its partner that are no view of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from redistill_cache.errors import Refused, UsageError
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.storage import disk_trouble, walk_regular

from redistill.interchange.crops import audit_of_crops, crops_recipe, views_of_top
from redistill.interchange.foreign import ForeignViews
from redistill.interchange.options import ImportOptions
from redistill.interchange.pickles import load_record, load_torch

__all__ = ["MlDrFolder"]

SUFFIX, CONFIG = ".pth.tar", "config.pth.tar"
MAX_FILES = 20_000_000
CROP, FLIP = "random_resized_crop", "random_horizontal_flip"
# Those that change no pixel of the view.
WITHOUT_EFFECT = ("uint8", "to_tensor", "normalize")
MAX_PIXEL = 1 << 30


@dataclass(frozen=True)
class Record:
    """The views of one image: boxes [N, 4], flips [N], probabilities [N, K] and their classes."""

    boxes: np.ndarray
    flips: np.ndarray
    top: np.ndarray
    ids: np.ndarray


class MlDrFolder:
    """A folder of ml-dr's files."""

    def __init__(self, options: ImportOptions, num_classes: int | None) -> None:
        if num_classes is None:
            raise UsageError(
                "the number of classes is not in the source and the data has no class names; add --classes"
            )
        if options.accept:
            raise UsageError("--accept: images are found by their position, so none may be missing or extra; drop it")
        self.num_classes, self._root = num_classes, options.source
        with disk_trouble("read", self._root):
            files = walk_regular(self._root, most=MAX_FILES)
        stems = [file.removesuffix(SUFFIX) for file in files if file.endswith(SUFFIX)]
        positions = sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit() and stem == str(int(stem)))
        if not positions or CONFIG not in files:
            raise Refused(f"{self._root} has no files 0{SUFFIX} ... and {CONFIG}; expected a folder of ml-dr")
        self.names: PackedKeys = pack_keys(map(str, positions))
        self._check_config()
        first = self._load(0)
        count, self.kept = first.top.shape
        self.num_views = options.views or count
        if self.num_views > count:
            raise Refused(f"{self._root} has {count} views of each image, expected {self.num_views} for --views")
        self._shape = first.top.shape
        self.view_bytes = 64 + self.kept * 32
        self.recipe = crops_recipe(options.recipe)
        self._temperature = options.temperature or 1.0
        self.description: Mapping[str, Any] = {
            "layout": "ml-dr",
            "views": count,
            "labels": f"{self.kept} largest probabilities",
            "temperature": self._temperature,
        }
        self.audit = (
            "images: found by their position in the data, which the source cannot confirm; see top-1",
            *audit_of_crops(options, self.recipe, self.kept, num_classes),
            *([f"views: the first {self.num_views} of {count}"] if self.num_views < count else []),
        )

    def names_of(self, keys: PackedKeys) -> Iterable[str]:
        other = next((key for key in keys if key.count("/") != 1), None)
        if other is not None:
            raise Refused(
                f"{other!r} is in a folder inside a class folder, or in none, so its position may not be that of "
                "torchvision's ImageFolder; use a folder of class folders"
            )
        return map(str, range(len(keys)))

    def read(self, records: np.ndarray, views: range, sizes: np.ndarray) -> ForeignViews:
        loaded = [self._load(int(record)) for record in records]
        part = slice(views.start, views.stop)
        for number, record in zip(records.tolist(), loaded, strict=True):
            if record.top.shape != self._shape:
                raise Refused(
                    f"{self._path(number)}: expected {self._shape[0]} views of {self.kept} probabilities as in the "
                    f"first file, found {list(record.top.shape)}"
                )
        boxes, flips, top, ids = (
            np.stack([getattr(record, name)[part] for record in loaded], axis=1)
            for name in ("boxes", "flips", "top", "ids")
        )
        outside = (boxes[..., :2] < 0) | (boxes[..., 2:] < 1) | (boxes[..., :2] + boxes[..., 2:] > sizes)
        if outside.any():
            view, row, _ = (int(at[0]) for at in np.nonzero(outside))
            raise Refused(
                f"{self._path(int(records[row]))}: view {views.start + view} is outside of an image of {sizes[row, 0]} "
                f"x {sizes[row, 1]} (height x width); use the images, in the order, that the source was made from"
            )
        where = f"{self._path(int(records[0]))} or one of the {len(records) - 1} after it"
        params: dict[str, np.ndarray] = {"crop": boxes.astype(np.int32), "flip": flips.astype(np.uint8)}
        lost: Counter[str] = Counter()
        content = (boxes, flips)
        return views_of_top(ids, top, self.num_classes, self._temperature, where, content, params, lost)

    def _check_config(self) -> None:
        with disk_trouble("read", self._root):
            config = load_torch(self._root / CONFIG)
        settings = config.get("reinforce") if isinstance(config, dict) else None
        augmentation = settings.get("image_augmentation") if isinstance(settings, dict) else None
        if not isinstance(augmentation, dict):
            raise Refused(f"{self._root / CONFIG}: expected reinforce.image_augmentation, found none")
        active = {str(name) for name, value in augmentation.items() if value is not None and not is_off(value)}
        others = sorted(active - {CROP, FLIP, *WITHOUT_EFFECT})
        if others or not {CROP, FLIP} <= active:
            raise Refused(
                f"{self._root / CONFIG}: expected the augmentations {CROP} and {FLIP} alone, found "
                f"{', '.join(sorted(active))[:200] or 'none'}; others cannot be imported exactly"
            )

    def _path(self, number: int) -> Path:
        return self._root / f"{self.names[number]}{SUFFIX}"

    def _load(self, number: int) -> Record:
        return load_record(self._path(number), lambda content: parse_record(content, int(self.names[number])))


def is_off(value: object) -> bool:
    """An augmentation that is listed and not used."""
    return isinstance(value, dict) and any(value.get(name) is False for name in ("enable", "enabled"))


def parse_record(content: object, position: int) -> Record:
    match content:
        case (int() as stated, list() as views) if views:
            if stated != position:
                raise Refused(f"it says that it is of image {stated}, its name that it is of image {position}")
            parsed = [parse_view(view) for view in views]
            boxes, flips, top, ids = zip(*parsed, strict=True)
            if len({len(row) for row in top}) > 1:
                raise Refused("its views have different numbers of probabilities")
            return Record(np.array(boxes, np.int64), np.array(flips), np.array(top), np.array(ids, np.int64))
    raise Refused("expected (position, list of views)")


def parse_view(view: object) -> tuple[list[int], bool, list[float], list[int]]:
    params = view.get("params") if isinstance(view, dict) else None
    if isinstance(params, dict):
        used = {name for name in params if name not in WITHOUT_EFFECT}
        params = [params.get(CROP), params.get(FLIP)] if used == {CROP, FLIP} else None
    match params, view:
        case [(tuple() | list()) as box, bool() as flip], {"prob": (list() as top, list() as ids)}:
            numbers = len(box) == 4 and all(type(edge) is int and abs(edge) < MAX_PIXEL for edge in box)
            whole = all(type(number) is int and abs(number) < MAX_PIXEL for number in ids)
            if numbers and whole and len(top) == len(ids) > 0 and all(type(p) is float for p in top):
                return list(box), flip, top, ids
    raise Refused("expected views of {params: [[top, left, height, width], flip], prob: ([p, ...], [class, ...])}")
