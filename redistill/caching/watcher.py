"""Who wants to know how stage 1 goes. The library itself never prints."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Silent", "Watcher"]


class Watcher(Protocol):
    """Told of every step; `index` and `advance` are called often."""

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def index(self, done: int, total: int) -> None: ...
    def advance(self, images: int, total: int, blocks: int, written: int) -> None:
        """Images answered for of those that were missing; blocks and bytes committed by this process."""


class Silent:
    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def index(self, done: int, total: int) -> None: ...
    def advance(self, images: int, total: int, blocks: int, written: int) -> None: ...
