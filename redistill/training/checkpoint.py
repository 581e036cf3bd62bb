"""The state of a run in one file: written whole or not at all, and read back without running anybody's code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from redistill_cache.errors import Refused
from redistill_cache.files import LOCAL
from redistill_cache.preconditions import refuse_difference
from redistill_cache.storage import disk_trouble

from redistill.training.member import Member
from redistill.wording import first_line

__all__ = ["LAST", "load_checkpoint", "save_checkpoint"]

LAST = "last.ckpt"
VERSION = 1


def save_checkpoint(
    out: Path, members: Sequence[Member], options: Mapping[str, Any], archive: str | None, epoch: int, batch: int
) -> None:
    """The run after `batch` batches of `epoch`. The file before it stays until this one is whole on disk."""
    state = {
        "version": VERSION,
        "options": dict(options),
        "archive": archive,
        "epoch": epoch,
        "batch": batch,
        "members": {member.spec.name: member.state() for member in members},
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with disk_trouble("write", out / LAST, "; the checkpoint before it is untouched"):
        LOCAL.publish(out / LAST, buffer.getbuffer())


def load_checkpoint(
    out: Path, members: Sequence[Member], options: Mapping[str, Any], archive: str | None
) -> tuple[int, int] | None:
    """Put the members where the run in `out` was left: (epoch, batches done); None where there is none."""
    path = out / LAST
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({first_line(error)}); remove it to start the run again") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise Refused(f"{path} is no checkpoint of this version; use --resume never with another --out")
    if state["archive"] != archive:
        raise Refused(
            f"{path} was trained from the archive {state['archive']}, this one is {archive}; use another --out"
        )
    refuse_difference(state["options"], dict(options), str(out))
    place = (int(state["epoch"]), int(state["batch"]))
    for member in members:
        member.load(state["members"][member.spec.name], place)
    return place
