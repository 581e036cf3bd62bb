"""The share of stage 1's blocks that this process writes: of torchrun's ranks, a SLURM array, srun's tasks, or --share.

The processes need no leader and no messages. Whoever comes first creates the archive; each writes the blocks of its
share and then missing blocks of other shares; whoever finds nothing missing seals. Two processes that compute the same
block write the same bytes, and the first commit counts. So any of them may start late, never start, or die, and a later
run may divide the blocks in another way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from redistill_cache.errors import UsageError
from redistill_cache.locks import locked

__all__ = ["Share", "parse_share", "prepared_once"]

T = TypeVar("T")


# What starts several processes, and the variables in which it gives each its number and how many there are.
STARTERS = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS"),
    "the SLURM array": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
}
# The tasks of an array may have any numbers: --array=3-9:2 has 3, 5, 7 and 9. Without gaps, these give 0 to 3 of 4.
ARRAY_START, ARRAY_END, ARRAY_STEP = "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP"
LOCAL_RANK, LOCAL_COUNT = ("LOCAL_RANK", "SLURM_LOCALID"), ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")


@dataclass(frozen=True)
class Share:
    """Share `index` of `count`, and this process among those of its kind on this machine."""

    index: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @classmethod
    def of(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> Share:
        """The share that `text` ("i/n") or the environment states; one that is stated twice must be the same."""
        stated = dict(_from_environment(environment))
        if {"torchrun", "srun"} <= stated.keys():
            # One torchrun on each node, started by srun: torchrun counts its processes on all nodes.
            each = _number(environment, LOCAL_COUNT[0]) or 1
            if stated["torchrun"][1] == stated["srun"][1] * each:
                del stated["srun"]
        if text is not None:
            index, count = parse_share(text)
        elif len(set(stated.values())) > 1:
            values = ", ".join(f"{index}/{count} from {name}" for name, (index, count) in stated.items())
            raise UsageError(f"expected one share for this process, found {values}; say which with --share I/N")
        else:
            index, count = next(iter(stated.values()), (0, 1))
        local_rank, local_count = (_first_number(environment, names) for names in (LOCAL_RANK, LOCAL_COUNT))
        return cls(index, count, local_rank or 0, max(1, local_count or 1, (local_rank or 0) + 1))

    @property
    def reports(self) -> bool:
        """One process of each machine shows its progress."""
        return self.local_rank == 0

    def work_order(self, blocks: Sequence[T], *, helps: bool = True) -> list[T]:
        """This share of the blocks and, if it helps, all others, in an order of its own.

        In one order, helpers that end at the same time would follow each other from block to block.
        """
        others = [block for i, block in enumerate(blocks) if i % self.count != self.index] if helps else []
        Random(self.index).shuffle(others)
        return [*blocks[self.index :: self.count], *others]


def parse_share(text: str) -> tuple[int, int]:
    """'3/8' -> (3, 8): shares are numbered from 0."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    index, count = map(int, match.groups()) if match else (0, 0)
    if not index < count:
        raise UsageError(f"--share must be I/N with I from 0 to N - 1, such as 0/8 to 7/8, found {text!r}")
    return index, count


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, share) of everything that started this process as one of several."""
    for name, variables in STARTERS.items():
        index, count = (_number(environment, variable) for variable in variables)
        if index is None or count is None:
            continue
        start, end = (_number(environment, variable) for variable in (ARRAY_START, ARRAY_END))
        if "SLURM_ARRAY_TASK_ID" in variables and start is not None and end is not None:
            step = _number(environment, ARRAY_STEP) or 1
            index, count = (index - start) // step, (end - start) // step + 1
        if not 0 <= index < count:
            found = " and ".join(f"{variable}={environment[variable]}" for variable in variables)
            raise UsageError(f"expected a number below the count, found {found}; start with {name}, or use --share I/N")
        if count > 1:
            yield name, (index, count)


def _first_number(environment: Mapping[str, str], names: Sequence[str]) -> int | None:
    return next((number for name in names if (number := _number(environment, name)) is not None), None)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,9}", text):
        raise UsageError(f"expected a number in {name}, found {text!r}")
    return int(text)


@contextmanager
def prepared_once(
    path: Path, ready: Callable[[], bool], notify: Callable[[str], None], check_stop: Callable[[], None]
) -> Iterator[None]:
    """One process of this machine prepares the archive at `path`; the others wait until it is `ready`, or has died.

    Without a usable cache folder, each prepares it: that costs time only, since one result wins.
    """

    def is_ready() -> bool:
        check_stop()
        return ready()

    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(locked(path.absolute(), f"prepares {path}", notify, is_ready))
        yield
