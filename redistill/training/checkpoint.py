"""The state of a run in one file: written whole or not at all, checked, and read without running anybody's code."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from redistill_cache.errors import Damaged, Refused, SpecMismatch
from redistill_cache.storage import LEFTOVER, LOCAL, disk_trouble, is_leftover

from redistill.progress import Progress
from redistill.specs import first_line
from redistill.training.member import Member

__all__ = ["LAST", "PREVIOUS", "has_checkpoint", "load_checkpoint", "save_checkpoint"]

LAST = "last.ckpt"
PREVIOUS = "last.previous.ckpt"
SET_ASIDE = "last.damaged.ckpt"
VERSION = 2
# Behind the file that torch wrote, where torch does not mind it: its own check sums are not looked at when it reads.
SEAL = b"\nsha256:"

Options = Mapping[str, Any]


def has_checkpoint(out: Path) -> bool:
    return (out / LAST).exists() or (out / PREVIOUS).exists()


def save_checkpoint(
    out: Path,
    members: Sequence[Member],
    options: Options,
    archive: str | None,
    place: tuple[int, int],
) -> None:
    """The run after so many epochs, and so many batches of the next. At any moment a whole file of a save is there."""
    state = {
        "version": VERSION,
        "options": dict(options),
        "archive": archive,
        "epoch": place[0],
        "batch": place[1],
        "members": {member.spec.name: member.state() for member in members},
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0, io.SEEK_END)
    buffer.write(SEAL + hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    last, fresh = out / LAST, out / f"{LAST}.{uuid.uuid4().hex}{LEFTOVER}"
    with disk_trouble("write", last, "; the checkpoint before it is untouched"):
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


def load_checkpoint(
    out: Path, members: Sequence[Member], options: Options, archive: str | None, progress: Progress
) -> tuple[int, int]:
    """Put the members where the run in `out` was left: (epoch, batches done); the beginning where nothing was left."""
    found = newest_state(out, progress)
    if found is None:
        return 0, 0
    path, state = found
    if state["archive"] != archive:
        raise Refused(
            f"{path} was trained from the archive {state['archive']}, this one is {archive}; use another --out"
        )
    refuse_difference(out, state["options"], options)
    place = (int(state["epoch"]), int(state["batch"]))
    for member in members:
        member.load(state["members"][member.spec.name], place)
    return place


def newest_state(out: Path, progress: Progress) -> tuple[Path, dict[str, Any]] | None:
    """Of the last checkpoint, or of the one before where that is damaged."""
    for path in (out / LAST, out / PREVIOUS):
        try:
            state = read_state(path)
        except Damaged as error:
            if path.name == PREVIOUS or not (out / PREVIOUS).exists():
                raise Damaged(f"{error}; remove it to start the run again") from None
            progress.warning(f"{error}; goes on from {PREVIOUS}")
            with contextlib.suppress(FileNotFoundError):  # else the next save would put it over the good one
                LOCAL.rename(path, out / SET_ASIDE)
            continue
        if state is not None:
            return path, state
    return None


def read_state(path: Path) -> dict[str, Any] | None:
    """What was saved, once it is proven to be that; None where nothing is."""
    with disk_trouble("read", path):
        try:
            data = memoryview(path.read_bytes())
        except FileNotFoundError:  # killed between two renames, or set aside by another process just now
            return None
    inside, seal = data[: -len(SEAL) - 64], bytes(data[-len(SEAL) - 64 :])
    if seal != SEAL + hashlib.sha256(inside).hexdigest().encode():
        raise Damaged(f"{path} is damaged: its bytes are not those that were written")
    try:
        state = torch.load(io.BytesIO(inside), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise Refused(
            f"{path} cannot be read by this torch ({first_line(error)}); use the one it was made with"
        ) from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise Refused(f"{path} is no checkpoint of this version of redistill; use another --out")
    return state


def refuse_difference(out: Path, before: Options, now: Options) -> None:
    """A run goes on with what it was started with, or not at all."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            was, is_now = (f"{side[name]!r:.80}" if name in side else "not given" for side in (before, now))
            raise SpecMismatch(
                f"{out} holds a run with {name} = {was}, now it is {is_now}; say the same to go on with it, or give "
                "another --out"
            )


def sweep(out: Path) -> None:
    """Remove what a killed process left half written."""
    for path in out.glob(f"*{LEFTOVER}"):
        if is_leftover(path):
            path.unlink(missing_ok=True)
