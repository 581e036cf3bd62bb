"""`folder:PATH`: a folder of class folders, in the layout of torchvision's ImageFolder.

* The class of an image is the first folder of its path, at any depth. Classes are numbered in the order of their names
  (by code point), and the images of a class are ordered by path, so the order does not depend on the disk.
* The key is the path below PATH with '/' between its parts: 'n01440764/n01440764_10026.JPEG'.
* Images are files that end in .jpg .jpeg .png .webp .gif .bmp, in any case. Other files are skipped and counted in
  `skipped`; files and folders whose names start with '.', and '__MACOSX', are ignored.
* Links to files and folders are followed, as data sets are often folders of links. A folder that two paths lead to is
  refused, so that links cannot multiply the images. A broken link is a bad image, found when the source is indexed.
* Images beside the class folders are refused, as is a folder without class folders. With `?labels=none` they are
  accepted, every image has the label -1 and there are no class names.
* A class folder without images is refused, as it usually is a mistake; `?allow_empty=1` keeps it as a class.
* `?split=val` reads PATH/val, and so on. `?max_pixels=N` allows images of up to N pixels; see `images`. `?index=FILE`
  takes digests and sizes from a file that `redistill index` has written.
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

from redistill.sources.base import NO_FILE, NO_LABEL, Sample, Source, file_stamp, local_path, pixel_limit, shared_index
from redistill.sources.images import EXTENSIONS, MAX_ENCODED_BYTES, BadImage
from redistill.specs import Spec

__all__ = ["FolderSource", "open_folder", "skipped_files"]

LONGEST_SHOWN = 150
SPLITS = {"train", "val", "valid", "validation", "test"}


class FolderSource:
    """The images of a folder; files are listed when it is opened, and read one by one."""

    def __init__(
        self,
        root: Path,
        *,
        labelled: bool = True,
        allow_empty: bool = False,
        max_pixels: int | None = None,
        index_file: Path | None = None,
        spec: str | None = None,
    ) -> None:
        if not root.is_dir():
            raise Refused(f"{str(root)!r} is not a folder; expected a folder of class folders with images")
        self.root = root.resolve()
        self.max_pixels, self.index_file = max_pixels, index_file
        self.spec = f"folder:{root}" if spec is None else spec
        self.description = {"kind": "folder"}
        self.skipped: Counter[str] = Counter()
        self._paths: dict[tuple[int, int], str] = {}  # the folders listed so far, by device and inode
        names = self._class_folders() if labelled else [""]
        counts: list[int] = []
        self.keys: PackedKeys = pack_keys(self._list(names, counts))
        self._paths.clear()
        self.labels: np.ndarray = np.repeat(np.arange(len(names)) if labelled else [NO_LABEL], counts).astype(np.int64)
        self.class_names: tuple[str, ...] | None = tuple(names) if labelled else None
        self._check(dict(zip(names, counts, strict=True)), allow_empty)

    @property
    def location(self) -> str:
        return f"folder:{self.root}" + ("" if self.max_pixels is None else f"?max_pixels={self.max_pixels}")

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, i: int) -> Sample:
        key = self.keys[i]
        return Sample(_read(self.root / key, key), int(self.labels[i]), key, self.max_pixels)

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
        folders, files = self._entries(str(self.root))
        loose = [name for name in files if self._is_image(name)]
        if loose:
            raise Refused(
                f"expected only class folders in {str(self.root)!r}, found {len(loose)} images such as {min(loose)!r}; "
                "move them into class folders, or add '?labels=none' to use images without labels"
            )
        return sorted(folders)

    def _list(self, names: list[str], counts: list[int]) -> Iterator[str]:
        """All keys in order, class by class; `counts` receives the number of images of each class."""
        for name in names:
            keys = sorted(self._images(f"{name}/" if name else ""))
            counts.append(len(keys))
            yield from keys

    def _images(self, prefix: str) -> Iterator[str]:
        """Keys of the images in the folder `prefix` and below, in any order."""
        prefixes = [prefix]  # not a recursion, whose depth a folder could exceed
        while prefixes:
            prefix = prefixes.pop()
            folders, files = self._entries(f"{self.root}/{prefix}".rstrip("/"))
            prefixes += [f"{prefix}{name}/" for name in folders]
            yield from (prefix + name for name in files if self._is_image(name))

    def _entries(self, folder: str) -> tuple[list[str], list[str]]:
        """The names of the folders and of the files in `folder`, each of which is listed once."""
        folders: list[str] = []
        files: list[str] = []
        try:
            status = os.stat(folder)  # noqa: PTH116  see stamps
            first = self._paths.setdefault((status.st_dev, status.st_ino), folder)
            if first != folder:
                raise Refused(f"{_shown(first)} and {_shown(folder)} are the same folder; remove the link")
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not _hidden(entry.name):
                        _check_name(entry.name, folder)
                        (folders if entry.is_dir() else files).append(entry.name)
        except OSError as error:
            path = folder if error.filename is None else os.fsdecode(error.filename)
            raise Refused(f"cannot list {_shown(path)}: {error.strerror or error}; mend or remove it") from error
        return folders, files

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
    """A source from `folder:PATH?labels=none&allow_empty=1&split=train&max_pixels=400000000`."""
    spec.refuse_unknown({"labels", "allow_empty", "split", "max_pixels", "index"})
    if not spec.name:
        raise UsageError(f"expected 'folder:PATH', found {spec.text!r} without a path")
    labels = spec.take("labels", "folders")
    if labels not in ("folders", "none"):
        raise UsageError(f"{spec.text!r}: expected labels=folders or none, found {labels!r}")
    root = local_path(spec.name) / spec.take("split", "")
    return FolderSource(
        root,
        labelled=labels == "folders",
        allow_empty=spec.take("allow_empty", False),
        max_pixels=pixel_limit(spec),
        index_file=shared_index(spec),
        spec=spec.text,
    )


def _read(path: Path, key: str) -> bytes:
    """The bytes of one file; one that cannot be read is a bad image."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  opening a device may have effects
            raise BadImage(key, "not a regular file")
        # O_NONBLOCK: should the file be a FIFO by now, opening it must not wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(key, "not a regular file")
            if status.st_size > MAX_ENCODED_BYTES:
                raise BadImage(key, f"{status.st_size} bytes, more than the limit of {MAX_ENCODED_BYTES}")
            return file.read(MAX_ENCODED_BYTES + 1) or b""  # some files of /proc have no size and no end
    except OSError as error:
        raise BadImage(key, error.strerror or str(error)) from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _shown(path: str) -> str:
    """A path in a message; one of thousands of bytes is cut."""
    return repr(path if len(path) <= LONGEST_SHOWN else f"{path[:LONGEST_SHOWN]}...")


def _check_name(name: str, folder: str) -> None:
    """Keys are stored as UTF-8, so a name that is not UTF-8 cannot be a key."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Refused(f"the file name {name!r} in {_shown(folder)} is not UTF-8; rename it") from None
