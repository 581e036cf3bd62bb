"""Standard output and error that never end a command: what cannot be written is dropped, as results are files."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Stream", "open_streams"]


class Stream(io.FileIO):
    """A file descriptor whose writes do not fail. After the first error it is /dev/null, for child processes too."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.error: OSError | None = None
        """Why output was lost."""

    def write(self, data: ReadableBuffer, /) -> int:
        while True:
            try:
                written: int | None = super().write(data)
            except OSError as error:
                self.error = error
                redirect_to_null(self.fileno())
                continue
            if written is not None:
                return written
            select.select([], [self], [])  # another process has set the pipe to non-blocking mode


def redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
        return
    os.dup2(null, descriptor)
    os.close(null)


def open_streams() -> Stream | None:
    """Replace sys.stdout and sys.stderr, unless the caller has; returns the new standard output.

    A descriptor that is closed at the start would be given to the next file that is opened, and that file would
    receive messages: it is /dev/null instead.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            redirect_to_null(descriptor)
    output = None
    if sys.stdout is sys.__stdout__:
        output = Stream(1)
        sys.stdout = text(output, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = text(Stream(2), sys.stderr)
    return output


def text(stream: Stream, old: TextIO | None) -> io.TextIOWrapper:
    """In the encoding of the old stream; a character that it lacks is escaped."""
    encoding = "utf-8" if old is None else old.encoding
    errors = "backslashreplace" if old is None or old.errors == "strict" else old.errors
    return io.TextIOWrapper(io.BufferedWriter(stream), encoding, errors, line_buffering=True)
