"""Every error a user can meet, and the exit code each one ends a command with.

    RedistillError                 base; one line: what was expected, what was found, what to do
    ├── UsageError                 2  an option, name or spec string that cannot be understood  (also ValueError)
    ├── Refused                    3  data, archive, disk or model do not fit together
    │   ├── NotAnArchive           3  nothing that looks like an archive is there           (also FileNotFoundError)
    │   ├── NewerFormat            3  written by a newer version of the format
    │   ├── Incomplete             3  not sealed, or blocks are missing
    │   ├── SpecMismatch           3  resumed with another specification
    │   └── OutOfRange             3  a view, row, teacher or signal the archive does not hold (also LookupError)
    └── Damaged                    4  bytes that are not the bytes that were committed

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
    """Base of all errors that are the user's to mend. `str(error)` is one line."""

    exit_code = 1


class UsageError(RedistillError, ValueError):
    """An option, a name or a spec string that cannot be understood."""

    exit_code = 2


class Refused(RedistillError):
    """What was given is understood, but does not fit together; nothing was changed."""

    exit_code = 3


class NotAnArchive(Refused, FileNotFoundError):
    """The path does not hold a redistill archive."""

    # OSError would print "[Errno ...]" forms; the message is ours.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class NewerFormat(Refused):
    """The archive's major format version is not one this reader knows."""


class Incomplete(Refused):
    """Blocks are missing, or the archive was never sealed."""


class SpecMismatch(Refused):
    """An archive was resumed with a specification that differs in a field that decides its content."""


class OutOfRange(Refused, LookupError):
    """A view, row, teacher or signal that the archive does not hold."""


class Damaged(RedistillError):
    """Bytes on disk are not the bytes that were committed."""

    exit_code = 4
