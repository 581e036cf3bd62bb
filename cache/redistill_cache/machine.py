"""How much of this machine is ours: cores and memory, less where a container or a batch system has set limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["usable_cores", "usable_memory"]

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Whole cores that may be kept busy, at least one. A container often sees all cores and may use the time of few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in groups("cpu", cgroups, membership):
        quota = words(folder / "cpu.max") or words(folder / "cpu.cfs_quota_us") + words(folder / "cpu.cfs_period_us")
        if len(quota) == 2 and all(word.isdigit() for word in quota) and int(quota[1]):  # "max" and -1: no limit
            cores = min(cores, int(quota[0]) // int(quota[1]))
    return max(1, cores)


def usable_memory(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes of memory; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    for folder in groups("memory", cgroups, membership):
        for word in words(folder / "memory.max") or words(folder / "memory.limit_in_bytes"):
            if word.isdigit():
                total = min(total, int(word))
    return total


def groups(controller: str, cgroups: Path, membership: Path) -> Iterator[Path]:
    """The folders of the groups this process is in, from its own to the root: each may set a limit of its own.

    A line is `0::/path` in version 2 and `4:cpu,cpuacct:/path` in version 1, where every controller has a tree.
    """
    for line in lines(membership):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        inner = root / path.strip().lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents)


def words(file: Path) -> list[str]:
    return " ".join(lines(file)).split()


def lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
