"""Writing the packed form of an archive. Its bytes follow from the archive; memory does not depend on its size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from redistill_cache import layout, limits, packed
from redistill_cache.copies import refuse_partial_copy
from redistill_cache.download import Notify, say
from redistill_cache.errors import Damaged, Refused
from redistill_cache.journal import sha256
from redistill_cache.locks import locked, new_partial, publish_partial, remove_partials
from redistill_cache.open_state import VERIFY_ADVICE, ArchiveState, committed_file, read_state
from redistill_cache.storage import LOCAL, disk_trouble, read_if_there, read_small, refuse_full_disk

__all__ = ["file_bytes", "pack", "sealed_archive", "tar_bytes"]

PIECE = 1 << 20
PackProgress = Callable[[int, int], None]


def pack(archive: Path, out: Path, *, progress: PackProgress | None = None, notify: Notify = say) -> dict[str, int]:
    """Write the packed form of a sealed archive to the folder `out`; returns its files with their sizes.

    Every file is hashed on the way. What an interrupted call finished is compared, not written again.
    """
    out = out.absolute()
    state, manifest = sealed_archive(archive, "packing it")
    tars = packed.contents(state.files, state.num_views)
    sizes = {name: packed.tar_size(state.files, members) for name, members in tars.items()}
    with disk_trouble("write", out):
        LOCAL.make_directories(out)
        with locked(out, f"packs to {out}", notify):
            _refuse_others(out, tars, manifest)
            for name in [*tars, packed.MANIFEST]:
                remove_partials(out / name)
            refuse_full_disk(out, sum(size for name, size in sizes.items() if not (out / name).exists()))
            done = 0
            for name, members in tars.items():
                _write(out / name, state, members)
                done += sizes[name]
                if progress is not None:
                    progress(done, sum(sizes.values()))
            if not (out / packed.MANIFEST).exists():
                LOCAL.publish(out / packed.MANIFEST, manifest)
            sizes[packed.MANIFEST] = len(manifest)
            signature = read_if_there(archive / layout.SIGNATURE, limits.MAX_RECORD_BYTES)
            if signature is not None:
                LOCAL.publish(out / packed.SIGNATURE, signature)
                sizes[packed.SIGNATURE] = len(signature)
    return sizes


def sealed_archive(archive: Path, action: str) -> tuple[ArchiveState, bytes]:
    """A whole archive and its manifest, to make another copy of it."""
    archive = archive.absolute()
    with disk_trouble("read", archive):
        refuse_partial_copy(archive, action)
        state = read_state(archive, allow_partial=False)
        manifest = read_small(archive / layout.MANIFEST, limits.MAX_MANIFEST_BYTES)
    if state.extended or sha256(manifest) != state.id:
        raise Refused(f"{archive} is being changed, views are added to it; repeat {action} when that is finished")
    return state, manifest


def _refuse_others(out: Path, tars: dict[str, list[str]], manifest: bytes) -> None:
    """Refuse a folder with another archive."""
    other = sorted(path.name for path in out.glob("*.tar") if path.name not in tars)
    packed_manifest = out / packed.MANIFEST
    if other or (packed_manifest.exists() and read_small(packed_manifest, limits.MAX_MANIFEST_BYTES) != manifest):
        raise Refused(f"{out} holds {[*other, packed.MANIFEST][0]} of another archive; choose another folder")


def _write(path: Path, state: ArchiveState, members: Sequence[str]) -> None:
    """A tar, unless it is there."""
    if path.exists() and _is_there(path, state, members):
        return
    with new_partial(path) as file:
        file.writelines(tar_bytes(state, members))
    publish_partial(file, path)


def _is_there(path: Path, state: ArchiveState, members: Sequence[str]) -> bool:
    with path.open("rb") as file:
        return all(file.read(len(piece)) == piece for piece in tar_bytes(state, members)) and not file.read(1)


def tar_bytes(state: ArchiveState, members: Sequence[str]) -> Iterator[bytes]:
    """The bytes of a tar, in pieces."""
    for name in members:
        size = state.files[name].size
        yield packed.header(name, size)
        yield from file_bytes(state, name)
        yield packed.padding(size)
    yield packed.END


def file_bytes(state: ArchiveState, name: str) -> Iterator[bytes]:
    """The bytes of a file of an archive, in pieces; `Damaged` after the last one if they are not the committed ones."""
    entry = state.files[name]
    digest, rest = hashlib.sha256(), entry.size
    with committed_file(state, name, hashing="never") as (fd, problem):
        while rest and not problem:
            piece = os.read(fd, min(PIECE, rest))
            problem = None if piece else "was cut short while it was read"
            digest.update(piece)
            rest -= len(piece)
            yield piece
    if problem or digest.hexdigest() != entry.sha256:
        reason = problem or "does not have the SHA-256 that was committed"
        raise Damaged(f"{state.path / name} {reason}; {VERIFY_ADVICE}")
