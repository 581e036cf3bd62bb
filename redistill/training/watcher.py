"""Who wants to know how stage 2 goes. The library itself never prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Silent", "Watcher"]


class Watcher(Protocol):
    """Told of every step; `index` and `step` are called often."""

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def index(self, done: int, total: int) -> None: ...
    def step(self, images: int, total: int, figures: Mapping[str, Any]) -> None:
        """Images of the whole run, and what is worth showing of now."""

    def epoch(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """An epoch has ended: the figures of every member, by its name."""


class Silent:
    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def index(self, done: int, total: int) -> None: ...
    def step(self, images: int, total: int, figures: Mapping[str, Any]) -> None: ...
    def epoch(self, rows: Sequence[Mapping[str, Any]]) -> None: ...
