"""Progress reports of a long run. The library itself never prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["NoProgress", "Progress"]


class Progress(Protocol):
    """Receives what a run reports; `advance` is called often."""

    def stage(self, title: str) -> None:
        """The next part of a run of several parts begins."""

    def settings(self, settings: Mapping[str, str]) -> None:
        """The settings in effect of a run that is about to start, by name."""

    def info(self, text: str) -> None: ...
    def warning(self, text: str) -> None: ...
    def advance(self, task: str, done: int, total: int, **figures: object) -> None:
        """`done` of `total` images of a task ("index", "teacher" or "train"), and figures to show with it.

        Of a task that begins with "fetch", bytes.
        """

    def epoch(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """An epoch of training has ended: the figures of every member of the cohort."""


class NoProgress:
    """Ignores all reports. Subclass it to react to some of them."""

    def stage(self, title: str) -> None: ...
    def settings(self, settings: Mapping[str, str]) -> None: ...
    def info(self, text: str) -> None: ...
    def warning(self, text: str) -> None: ...
    def advance(self, task: str, done: int, total: int, **figures: object) -> None: ...
    def epoch(self, rows: Sequence[Mapping[str, Any]]) -> None: ...
