"""Words for error messages, which are one line each."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["first_line", "listed"]

NAMED = 3


def listed(words: Iterable[str], separator: str = ", ") -> str:
    """The first few, and how many more."""
    words = list(words)
    rest = [f"and {len(words) - NAMED} more"] if len(words) > NAMED else []
    return separator.join(words[:NAMED] + rest)


def first_line(error: BaseException) -> str:
    """What a library says, cut to its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
