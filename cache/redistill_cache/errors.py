"""The exceptions for user errors, and the exit code of a command that ends with each.

    RedistillError                 base; one line: what was expected, what was found, what to do
    ├── UsageError                 2  invalid option, name or spec string              (also ValueError)
    ├── Refused                    3  data, archive, disk or model do not fit together
    │   ├── NotAnArchive           3  the path does not hold an archive                (also FileNotFoundError)
    │   ├── NewerFormat            3  written in a newer version of the format
    │   ├── Incomplete             3  not sealed, or blocks are missing
    │   ├── SpecMismatch           3  resumed with a different specification
    │   └── OutOfRange             3  no such view, row, teacher or signal             (also IndexError)
    └── Damaged                    4  bytes differ from those that were committed

Bugs are not in this tree: an AssertionError or TypeError keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "Damaged",
    "Incomplete",
    "NewerFormat",
    "NotAnArchive",
    "OutOfRange",
    "RedistillError",
    "Refused",
    "SpecMismatch",
    "UsageError",
]


class RedistillError(Exception):
    """Base of all errors that a user can fix. `str(error)` is one line."""

    exit_code = 1


class UsageError(RedistillError, ValueError):
    """An invalid option, name or spec string."""

    exit_code = 2


class Refused(RedistillError):
    """The input is valid, but its parts do not fit together; nothing was changed."""

    exit_code = 3


class NotAnArchive(Refused, FileNotFoundError):
    """The path does not hold a redistill archive."""

    # OSError would print "[Errno ...]" forms.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class NewerFormat(Refused):
    """The archive has a format version that this version of redistill cannot read, or cannot add to."""


class Incomplete(Refused):
    """Blocks are missing, or the archive was never sealed."""


class SpecMismatch(Refused):
    """An archive was resumed with a specification that differs in a field that determines its content."""


class OutOfRange(Refused, IndexError):
    """The archive has no such view, row, teacher or signal. As an IndexError, it ends `for item in dataset`."""


class Damaged(RedistillError):
    """Bytes on disk differ from those that were committed."""

    exit_code = 4
