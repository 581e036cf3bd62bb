"""A source that counts how often its samples are read."""

from __future__ import annotations

from redistill.sources.base import Sample
from redistill.sources.open_source import open_source


class CountedSource:
    def __init__(self, data: str) -> None:
        self.source = open_source(data)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, i: int) -> Sample:
        self.reads += 1
        return self.source.sample(i)
