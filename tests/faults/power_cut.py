"""A model of the contents of a disk after a power cut.

A disk guarantees nothing about writes after the last fsync. In this model
* the data of a file that was never synced is whole, short, empty, or full of zeroed 512-byte sectors;
* a change of a directory (a new name, a rename, a removed name) since its last sync survives or is lost, each at
  random and in any order. Journalling file systems are less harsh: they lose only the newest changes.

`PowerCutDisk` performs every operation on a real directory, so that the code under test can read what it wrote,
and logs it; a `DiskModel` applies the log and writes one possible state after the power cut.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from redistill_cache.storage import Files

__all__ = ["DiskModel", "Operation", "PowerCut", "PowerCutDisk"]

SECTOR = 512

Operation = tuple[str, tuple[str, ...], bytes]  # name of the primitive, paths relative to the mount, data


class PowerCut(BaseException):
    """The machine stopped. Not an Exception, so that no handler of the code under test catches it."""


@dataclass(eq=False)
class FileNode:
    data: bytes
    synced: bool = False


@dataclass(eq=False)
class FolderNode:
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[tuple[tuple[str, Node | None], ...]] = field(default_factory=list)
    now: dict[str, Node] = field(default_factory=dict)

    def change(self, *entries: tuple[str, Node | None]) -> None:
        apply(self.now, entries)
        self.pending.append(entries)

    def sync(self) -> None:
        self.durable = dict(self.now)
        self.pending = []


Node = FileNode | FolderNode


def apply(names: dict[str, Node], entries: tuple[tuple[str, Node | None], ...]) -> None:
    for name, node in entries:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class DiskModel:
    """Directory entries and file contents: the current ones, and those that are certain to survive."""

    def __init__(self) -> None:
        self.root = FolderNode()

    @classmethod
    def of_tree(cls, mount: Path) -> DiskModel:
        """A model in which the files of a real folder are durable."""
        model = cls()
        model.root = durable_folder(mount)
        return model

    def _folder(self, path: str) -> tuple[FolderNode, str]:
        *parents, name = path.split("/")
        node: Node = self.root
        for parent in parents:
            assert isinstance(node, FolderNode)
            node = node.now[parent]
        assert isinstance(node, FolderNode)
        return node, name

    def apply(self, operation: Operation) -> None:
        name, paths, data = operation
        folder, entry = self._folder(paths[0])
        if name == "make_directory":
            folder.change((entry, FolderNode()))
        elif name == "write":
            folder.change((entry, FileNode(data)))
        elif name == "sync_file":
            node = folder.now[entry]
            assert isinstance(node, FileNode)
            node.synced = True
        elif name == "sync_directory":
            node = folder.now[entry] if entry else self.root
            assert isinstance(node, FolderNode)
            node.sync()
        elif name == "remove":
            folder.change((entry, None))
        else:
            target, new = self._folder(paths[1])
            assert target is folder, "the storage layer only renames and links inside one directory"
            node = folder.now[entry]
            folder.change((new, node)) if name == "link" else folder.change((entry, None), (new, node))

    def write_current(self, destination: Path) -> None:
        """Write the current files, as after a process is killed."""
        place_folder(self.root, destination, lambda folder: folder.now, lambda node: node.data)

    def write_synced_only(self, destination: Path) -> None:
        """Write only the data and directory entries that were synced."""
        place_folder(
            self.root, destination, lambda folder: folder.durable, lambda node: node.data if node.synced else b""
        )

    def write_random_state(self, destination: Path, rng: random.Random) -> None:
        """Write one random possible state after a power cut."""
        name_survival = rng.choice((0.0, 0.5, 0.9, 1.0))
        data_survival = rng.choice((0.0, 0.5, 1.0))

        def surviving_names(folder: FolderNode) -> dict[str, Node]:
            names = dict(folder.durable)
            for entries in folder.pending:
                if rng.random() < name_survival:
                    apply(names, entries)
            return names

        def surviving_data(node: FileNode) -> bytes:
            return node.data if node.synced else torn(node.data, data_survival, rng)

        place_folder(self.root, destination, surviving_names, surviving_data)


def place_folder(
    root: FolderNode,
    destination: Path,
    names_of: Callable[[FolderNode], dict[str, Node]],
    data_of: Callable[[FileNode], bytes],
) -> None:
    """Write the files of the model to a real disk; a file with two names becomes one file with two links."""
    placed: dict[FileNode, Path] = {}

    def place(folder: FolderNode, path: Path) -> None:
        path.mkdir()
        for name, node in names_of(folder).items():
            inner = path / name
            if isinstance(node, FolderNode):
                place(node, inner)
            elif node in placed:
                os.link(placed[node], inner)
            else:
                inner.write_bytes(data_of(node))
                placed[node] = inner

    place(root, destination)


def durable_folder(path: Path) -> FolderNode:
    names: dict[str, Node] = {}
    for inner in path.iterdir():
        names[inner.name] = durable_folder(inner) if inner.is_dir() else FileNode(inner.read_bytes(), synced=True)
    return FolderNode(durable=names, now=dict(names))


def torn(data: bytes, survival: float, rng: random.Random) -> bytes:
    """A random part of data that was written but never synced."""
    sectors = [data[start : start + SECTOR] for start in range(0, len(data), SECTOR)]
    sectors = [sector if rng.random() < survival else bytes(len(sector)) for sector in sectors]
    if rng.random() < 0.5:
        sectors = sectors[: rng.randint(0, len(sectors))]
    return b"".join(sectors)


class PowerCutDisk(Files):
    """Works on a real directory under `mount`, logs every operation, and fails from operation `cut_at` on."""

    def __init__(self, mount: Path, cut_at: int | None = None) -> None:
        self.mount = mount
        self.cut_at = cut_at
        self.log: list[Operation] = []

    def _do(self, name: str, paths: tuple[Path, ...], perform: Callable[[], None], data: bytes = b"") -> None:
        if self.cut_at is not None and len(self.log) >= self.cut_at:
            raise PowerCut
        perform()
        relative = tuple(str(path.relative_to(self.mount)).removeprefix(".") for path in paths)
        self.log.append((name, relative, data))

    def make_directory(self, path: Path) -> None:
        self._do("make_directory", (path,), lambda: super(PowerCutDisk, self).make_directory(path))

    def write(self, path: Path, data: bytes | memoryview) -> None:
        whole = super().write
        self._do("write", (path,), lambda: whole(path, data), bytes(data))

    def sync_file(self, path: Path) -> None:
        # Only the log matters; a real fsync would slow down ten thousand runs.
        self._do("sync_file", (path,), lambda: None)

    def sync_directory(self, path: Path) -> None:
        self._do("sync_directory", (path,), lambda: None)

    def rename(self, old: Path, new: Path) -> None:
        self._do("rename", (old, new), lambda: super(PowerCutDisk, self).rename(old, new))

    def link(self, old: Path, new: Path) -> None:
        self._do("link", (old, new), lambda: super(PowerCutDisk, self).link(old, new))

    def rename_exclusively(self, old: Path, new: Path) -> None:
        self._do("rename", (old, new), lambda: super(PowerCutDisk, self).rename_exclusively(old, new))

    def remove(self, path: Path) -> None:
        self._do("remove", (path,), lambda: super(PowerCutDisk, self).remove(path))

    def remove_directory(self, path: Path) -> None:
        self._do("remove", (path,), lambda: super(PowerCutDisk, self).remove_directory(path))
