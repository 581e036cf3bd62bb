"""The cores and the memory this process may use, which a container or a batch system may limit."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from redistill_cache.errors import Refused
from redistill_cache.wording import human_bytes

__all__ = ["require_memory", "usable_cores", "usable_memory"]

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Whole cores this process may keep busy, at least one. A container often sees all cores but has a CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in control_groups("cpu", cgroups, membership):
        quota = fields(group / "cpu.max") or fields(group / "cpu.cfs_quota_us") + fields(group / "cpu.cfs_period_us")
        if len(quota) == 2 and all(field.isdigit() for field in quota) and int(quota[1]):  # "max" and -1: no limit
            cores = min(cores, int(quota[0]) // int(quota[1]))
    return max(1, cores)


def usable_memory(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes of memory this process may use; None where the system does not report it."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    for group in control_groups("memory", cgroups, membership):
        for field in fields(group / "memory.max") or fields(group / "memory.limit_in_bytes"):
            if field.isdigit():
                total = min(total, int(field))
    return total


# Cached because rows are read in every step, and a limit rarely changes while a process runs.
memory_limit = functools.cache(usable_memory)


def require_memory(nbytes: int, what: str) -> None:
    """`Refused` when `what` needs more memory than this process may use, before the kernel would kill the process."""
    limit = memory_limit()
    if limit is not None and nbytes > limit:
        raise Refused(
            f"{what}: needs {human_bytes(nbytes)} of memory, this process may use {human_bytes(limit)}; "
            "use a machine or a container with more memory"
        )


def control_groups(controller: str, cgroups: Path, membership: Path) -> Iterator[Path]:
    """The folders of the control groups of this process, innermost first: each may set a limit.

    A line is `0::/path` in version 2 and `4:cpu,cpuacct:/path` in version 1, where each controller has a tree.
    """
    for line in lines(membership):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        innermost = root / path.strip().lstrip("/")
        yield from (group for group in (innermost, *innermost.parents) if group == root or root in group.parents)


def fields(file: Path) -> list[str]:
    return " ".join(lines(file)).split()


def lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
