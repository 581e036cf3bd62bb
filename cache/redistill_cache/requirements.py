"""The rules that names, numbers and texts of a specification keep, and the one form of saying which was broken.

They hold for a caller (`UsageError`) and for a file (`Refused`, see parsing.py) alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from redistill_cache import limits
from redistill_cache.errors import UsageError

__all__ = ["check_int", "check_name", "check_signal_name", "check_text", "check_unique", "is_name", "require"]

# Names become folders on any file system, so: lower case only, and nothing a zarr hierarchy already uses.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
SIGNAL_NAME = re.compile(r"(?!.*\.\.)[a-z0-9](?:[a-z0-9_.-]{0,62}[a-z0-9_])?")
RESERVED = ("zarr.json", "side", "c")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair: no UTF-8 can hold it


def require(condition: bool, where: str, expected: str, found: object) -> None:
    """`UsageError` unless the condition holds."""
    if not condition:
        raise UsageError(f"{where} must be {expected}, found {ascii(found)[:80]}")


def is_name(text: str) -> bool:
    """Can this be the name of a teacher, an array or side data? Only then may it become part of a path."""
    return bool(NAME.fullmatch(text)) and text not in RESERVED


def check_name(name: str, where: str) -> None:
    fits = isinstance(name, str) and is_name(name)
    require(fits, where, "1 to 64 of a-z, 0-9, '_' and '-', starting with a letter or digit", name)


def check_signal_name(name: str, where: str) -> None:
    """Layers of networks have dots in their names."""
    fits = isinstance(name, str) and SIGNAL_NAME.fullmatch(name) and name not in RESERVED
    require(bool(fits), where, "1 to 64 of a-z, 0-9, '_', '-' and single dots inside", name)


def check_int(value: int, where: str, low: int, high: int) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(fits, where, f"an integer from {low} to {high}", value)


def check_text(value: str, where: str) -> None:
    fits = isinstance(value, str) and len(value) <= limits.MAX_TEXT and not SURROGATE.search(value)
    require(fits, where, f"a text of at most {limits.MAX_TEXT} characters", value)


def check_unique(names: Iterable[str], where: str, most: int) -> None:
    names = list(names)
    require(len(names) <= most, where, f"at most {most} entries", len(names))
    require(len(set(names)) == len(names), where, "without duplicates", names)
