"""The state of a run in one file: written atomically, checksummed, and loaded without running code from it.

last.ckpt is the newest state, last.previous.ckpt the one before it. From the first save on,
a kill at any time leaves at least one of them intact.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from redistill_cache.errors import Damaged, Refused, SpecMismatch
from redistill_cache.storage import LEFTOVER, LOCAL, disk_trouble, is_leftover, open_regular

from redistill.progress import Progress
from redistill.specs import first_line
from redistill.training.archive_use import ArchiveUse
from redistill.training.member import Member

__all__ = ["LAST", "PREVIOUS", "has_checkpoint", "load_checkpoint", "save_checkpoint", "saved_use"]

LAST = "last.ckpt"
PREVIOUS = "last.previous.ckpt"
DAMAGED = "last.damaged.ckpt"
VERSION = 2
# Appended to the file that torch wrote, with a digest: torch does not verify its own checksums on reading.
SEAL = b"\nsha256:"

Options = Mapping[str, Any]


def has_checkpoint(out: Path) -> bool:
    return (out / LAST).exists() or (out / PREVIOUS).exists()


def save_checkpoint(
    out: Path, members: Sequence[Member], options: Options, archive: ArchiveUse, *, epoch: int, batch: int
) -> None:
    """Save the run after `batch` batches of `epoch`."""
    state = {
        "version": VERSION,
        "options": dict(options),
        "archive": archive.to_json(),
        "epoch": epoch,
        "batch": batch,
        "members": {member.spec.name: member.state() for member in members},
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0, io.SEEK_END)
    buffer.write(SEAL + hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    last, fresh = out / LAST, out / f"{LAST}.{uuid.uuid4().hex}{LEFTOVER}"
    with disk_trouble("write", last, "; the previous checkpoint is intact"):
        try:
            LOCAL.write(fresh, buffer.getbuffer())
            LOCAL.sync_file(fresh)
            if last.exists():
                LOCAL.rename(last, out / PREVIOUS)
            LOCAL.rename(fresh, last)
        except OSError:
            with contextlib.suppress(OSError):
                LOCAL.remove(fresh)
            raise
        LOCAL.sync_directory(out)


def saved_use(out: Path, progress: Progress) -> tuple[ArchiveUse | None, int]:
    """What the run in `out` reads of its archive, and the epoch that it is in.

    None without a checkpoint, or one that only has the archive's id.
    """
    newest = newest_state(out, progress)
    if newest is None:
        return None, 0
    archive = newest[1]["archive"]
    return (ArchiveUse.from_json(archive) if isinstance(archive, dict) else None), int(newest[1]["epoch"])


def load_checkpoint(
    out: Path, members: Sequence[Member], options: Options, archive: ArchiveUse, progress: Progress
) -> tuple[int, int]:
    """Restore the members from the newest checkpoint in `out`, and return its (epoch, batch); (0, 0) without one."""
    newest = newest_state(out, progress)
    if newest is None:
        return 0, 0
    path, state = newest
    saved = state["archive"]  # of earlier versions: the id alone
    if isinstance(saved, str) and saved != archive.archive:
        raise Refused(f"{path} was trained from archive {saved}, --archive is {archive.archive}; use another --out")
    saved_options = dict(state["options"])
    if saved_options["epochs"] < options["epochs"]:
        for member in members:
            member.refuse_more_epochs(saved_options["epochs"], options["epochs"])
        saved_options["epochs"] = options["epochs"]
    refuse_difference(out, saved_options, options)
    epoch, batch = int(state["epoch"]), int(state["batch"])
    for member in members:
        member.load(state["members"][member.spec.name], epoch, batch)
    return epoch, batch


def newest_state(out: Path, progress: Progress) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint, or the previous one if the last is damaged."""
    for path in (out / LAST, out / PREVIOUS):
        try:
            state = read_state(path)
        except Damaged as error:
            if path.name == PREVIOUS or not (out / PREVIOUS).exists():
                raise Damaged(f"{error}; remove it to restart the run from the beginning") from None
            progress.warning(f"{error}; resuming from {PREVIOUS}")
            with contextlib.suppress(FileNotFoundError):  # else the next save would overwrite the good one with it
                LOCAL.rename(path, out / DAMAGED)
            continue
        if state is not None:
            return path, state
    return None


def read_state(path: Path) -> dict[str, Any] | None:
    """The saved state, after its digest was verified; None if the file does not exist."""
    with disk_trouble("read", path):
        try:
            with os.fdopen(open_regular(Path(os.path.realpath(path))), "rb") as file:
                data = memoryview(file.read())
        except FileNotFoundError:  # killed between two renames, or just renamed by another rank
            return None
    content, seal = data[: -len(SEAL) - 64], bytes(data[-len(SEAL) - 64 :])
    if seal != SEAL + hashlib.sha256(content).hexdigest().encode():
        raise Damaged(f"{path} is damaged: its SHA-256 does not match the stored one")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise Refused(
            f"{path} cannot be read by torch {torch.__version__} ({first_line(error)}); use the version that saved it"
        ) from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise Refused(
            f"{path} is not a checkpoint of format version {VERSION}, the only one supported; use another --out"
        )
    return state


def refuse_difference(out: Path, saved: Options, current: Options) -> None:
    """A run is resumed with the options it was started with; `ArchiveUse` compares the teachers."""
    for name in sorted((saved.keys() | current.keys()) - {"teachers"}):
        if saved.get(name) != current.get(name):
            stored, now = (f"{side[name]!r:.80}" if name in side else "not given" for side in (saved, current))
            raise SpecMismatch(
                f"{out} holds a run with {name} = {stored}, found {name} = {now}; use the original value to resume, or "
                "another --out"
            )


def remove_partial_files(out: Path) -> None:
    """Remove the partial files of a killed process."""
    for path in out.glob(f"*{LEFTOVER}"):
        if is_leftover(path):
            path.unlink(missing_ok=True)
