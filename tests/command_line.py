"""Command lines of tests."""

from __future__ import annotations

__all__ = ["without"]


def without(defaults: tuple[str, ...], *given: str) -> list[str]:
    """Pairs of an option and its value, without the options that are given: an option can be given once only."""
    pairs = zip(defaults[::2], defaults[1::2], strict=True)
    return [part for pair in pairs if pair[0] not in given for part in pair]
