"""`folder:PATH`: a folder of class folders, in the layout of torchvision's ImageFolder.

* The class of an image is the first folder of its path, at any depth. Classes are numbered in the order of their names
  (by code point), and the images of a class are ordered by path, so the order does not depend on the disk.
* The key is the path below PATH with '/' between its parts: 'n01440764/n01440764_10026.JPEG'.
* Images are files that end in .jpg .jpeg .png .webp .gif .bmp, in any case. Other files are skipped and counted in
  `skipped`; files and folders whose names start with '.', and '__MACOSX', are ignored.
* Links to files and folders are followed, as data sets are often folders of links; a link to a folder that contains it
  is refused. A broken link is a bad image, found when the source is indexed.
* Images beside the class folders are refused, as is a folder without class folders. With `?labels=none` they are
  accepted, every image has the label -1 and there are no class names.
* A class folder without images is refused, as it usually is a mistake; `?allow_empty=1` keeps it as a class.
* `?split=val` reads PATH/val, and so on.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from redistill_cache.errors import Refused, UsageError
from redistill_cache.keys import PackedKeys, pack_keys

from redistill.sources.base import NO_FILE, NO_LABEL, Sample, Source, file_stamp, local_path
from redistill.sources.images import EXTENSIONS, MAX_ENCODED_BYTES, BadImage
from redistill.specs import Spec

__all__ = ["FolderSource", "open_folder", "skipped_files"]

SPLITS = {"train", "val", "valid", "validation", "test"}


class FolderSource:
    """The images of a folder; files are listed when it is opened, and read one by one."""

    def __init__(
        self, root: Path, *, labelled: bool = True, allow_empty: bool = False, spec: str | None = None
    ) -> None:
        if not root.is_dir():
            raise Refused(f"{str(root)!r} is not a folder; expected a folder of class folders with images")
        self.root = root.resolve()
        self.spec = f"folder:{root}" if spec is None else spec
        self.description = {"kind": "folder"}
        self.skipped: Counter[str] = Counter()
        names = self._class_folders() if labelled else [""]
        counts: list[int] = []
        self.keys: PackedKeys = pack_keys(self._list(names, counts))
        self.labels: np.ndarray = np.repeat(np.arange(len(names)) if labelled else [NO_LABEL], counts).astype(np.int64)
        self.class_names: tuple[str, ...] | None = tuple(names) if labelled else None
        self._check(dict(zip(names, counts, strict=True)), allow_empty)

    @property
    def location(self) -> str:
        return f"folder:{self.root}"

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, i: int) -> Sample:
        key = self.keys[i]
        return Sample(_read(self.root / key, key), int(self.labels[i]), key)

    def stamps(self) -> np.ndarray:
        root, out = str(self.root), np.tile(np.array(NO_FILE, np.int64), (len(self), 1))
        for i, key in enumerate(self.keys):
            try:
                status = os.stat(f"{root}/{key}")  # noqa: PTH116  a Path for each of a million files takes seconds
            except OSError:
                continue
            out[i] = file_stamp(status)
        return out

    # -- listing --------------------------------------------------------------------------------------------------

    def _class_folders(self) -> list[str]:
        names, loose = [], []
        with os.scandir(self.root) as entries:
            for entry in entries:
                if _hidden(entry.name):
                    continue
                if entry.is_dir():
                    _check_name(entry.name, self.root)
                    names.append(entry.name)
                elif self._is_image(entry.name):
                    loose.append(entry.name)
        if loose:
            raise Refused(
                f"expected only class folders in {str(self.root)!r}, found {len(loose)} images such as {min(loose)!r}; "
                "move them into class folders, or add '?labels=none' to use images without labels"
            )
        return sorted(names)

    def _list(self, names: list[str], counts: list[int]) -> Iterator[str]:
        """All keys in order, class by class; `counts` receives the number of images of each class."""
        above = (_identity(self.root),) if names != [""] else ()
        for name in names:
            keys = sorted(self._images(self.root / name, f"{name}/" if name else "", above))
            counts.append(len(keys))
            yield from keys

    def _images(self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Keys of the images below `folder`, in any order; `above` are the folders that contain it."""
        identity = _identity(folder)
        if identity in above:
            raise Refused(f"{str(folder)!r} links back to a folder that contains it; remove the link")
        with os.scandir(folder) as entries:
            for entry in entries:
                if _hidden(entry.name):
                    continue
                if entry.is_dir():
                    yield from self._images(Path(entry.path), f"{prefix}{entry.name}/", (*above, identity))
                elif self._is_image(entry.name):
                    _check_name(entry.name, folder)
                    yield prefix + entry.name

    def _is_image(self, name: str) -> bool:
        extension = os.path.splitext(name)[1].lower()  # noqa: PTH122  see stamps
        if extension in EXTENSIONS:
            return True
        self.skipped[extension] += 1
        return False

    def _check(self, counts: dict[str, int], allow_empty: bool) -> None:
        """Refuse a folder whose number of images by class shows that it is not a data set."""
        if not any(counts.values()):
            others = ", ".join(
                f"{count} {extension or 'without extension'}" for extension, count in self.skipped.most_common(5)
            )
            raise Refused(
                f"no images in {str(self.root)!r}: expected class folders with files that end in "
                f"{' '.join(EXTENSIONS)}, found {others or 'no files'}"
            )
        empty = [name for name, count in counts.items() if not count]
        if empty and not allow_empty:
            raise Refused(
                f"{len(empty)} class folders of {str(self.root)!r} have no images, such as {empty[0]!r}; "
                "remove them, or add '?allow_empty=1' to keep them as classes"
            )
        if self.class_names and set(self.class_names) <= SPLITS:
            raise Refused(
                f"{str(self.root)!r} contains the splits {', '.join(self.class_names)}, not classes; "
                f"did you mean 'folder:{self.root / self.class_names[0]}'?"
            )


def skipped_files(source: Source) -> str:
    """The files of a folder that are no images in a format that is read, by extension; empty if there are none."""
    if not isinstance(source, FolderSource) or not source.skipped:
        return ""
    kinds = ", ".join(f"{count:,} {kind or 'without extension'}" for kind, count in source.skipped.most_common(5))
    return f"files that are not read: {kinds}; images end in {' '.join(EXTENSIONS)}"


def open_folder(spec: Spec) -> FolderSource:
    """A source from `folder:PATH?labels=none&allow_empty=1&split=train`."""
    spec.refuse_unknown({"labels", "allow_empty", "split"})
    if not spec.name:
        raise UsageError(f"expected 'folder:PATH', found {spec.text!r} without a path")
    labels = spec.take("labels", "folders")
    if labels not in ("folders", "none"):
        raise UsageError(f"{spec.text!r}: expected labels=folders or none, found {labels!r}")
    root = local_path(spec.name) / spec.take("split", "")
    return FolderSource(root, labelled=labels == "folders", allow_empty=spec.take("allow_empty", False), spec=spec.text)


def _read(path: Path, key: str) -> bytes:
    """The bytes of one file; one that cannot be read is a bad image."""
    try:
        # O_NONBLOCK: opening a FIFO named .jpg must not wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(key, "not a regular file")
            if status.st_size > MAX_ENCODED_BYTES:
                raise BadImage(key, f"{status.st_size} bytes, more than the limit of {MAX_ENCODED_BYTES}")
            return file.read()
    except OSError as error:
        raise BadImage(key, error.strerror or str(error)) from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _check_name(name: str, folder: Path) -> None:
    """Keys are stored as UTF-8, so a name that is not UTF-8 cannot be a key."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Refused(f"the file name {name!r} in {str(folder)!r} is not UTF-8; rename it") from None
