"""TOML files of others: `tomllib` reads them after a scan has bounded what it can be made to do.

tomllib's memory grows with the square of the parts of a dotted key, and it recurses into nested arrays.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from redistill_cache.errors import Refused, UsageError
from redistill_cache.storage import read_small
from redistill_cache.wording import one_line

__all__ = ["read_toml"]

# Far above any file we write: about fifty options, and lists of a few seeds or losses.
MAX_BYTES = 1 << 18
MAX_DEPTH = 8
MAX_DOTS = 8  # of one key
MAX_VALUES = 10_000
INT_LIMIT = 2**63

# What brackets and dots do not count in: a string of one of four kinds, or a comment. None needs backtracking.
TEXT = re.compile(
    r"""
    \"\"\" (?: \\. | [^\\] )*? (?: "{3,5} | \Z )
    | ''' .*? (?: '{3,5} | \Z )
    | " (?: \\. | [^"\\\n] )* "?
    | ' [^'\n]* '?
    | \# [^\n]*
    """,
    re.DOTALL | re.VERBOSE,
)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a file. UsageError in one line: missing, no regular file, not TOML, or beyond the limits."""
    try:
        text = read_small(Path(os.path.realpath(path)), MAX_BYTES).decode()  # a link of the user's is no attack
        check_extent(text)
        tables = tomllib.loads(text)
        check_integers(tables)
    except FileNotFoundError:
        raise UsageError(f"no {what} at {path}") from None
    except Refused as error:
        raise UsageError(str(error)) from None
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"{path} is not readable TOML: {one_line(error)}") from None
    return tables


def check_extent(text: str) -> None:
    """Count values, levels and parts of keys before any of them is created. ValueError when there are too many."""
    bare = TEXT.sub("_", text).translate({ord(" "): None, ord("\t"): None})
    values = sum(map(bare.count, ",=["))
    if values > MAX_VALUES:
        raise ValueError(f"{values} values, more than the limit of {MAX_VALUES}")
    dots = max(word.count(".") for word in re.split(r"[^\w.-]+", bare))
    if dots > MAX_DOTS:
        raise ValueError(f"a key of {dots + 1} parts, more than the limit of {MAX_DOTS + 1}")
    depth = deepest = 0
    for bracket in re.findall(r"[][{}]", bare):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ValueError(f"nested {deepest} deep, more than the limit of {MAX_DEPTH}")


def check_integers(value: object) -> None:
    """TOML's integers have 64 bits; tomllib's may have a million digits, which cannot be printed."""
    if isinstance(value, int) and not -INT_LIMIT <= value < INT_LIMIT:
        raise ValueError("an integer does not fit 64 bits")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            check_integers(item)
