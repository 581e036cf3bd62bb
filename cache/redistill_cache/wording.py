"""Text for error messages and terminals: one line of an error, untrusted text made printable, counts and bytes."""

from __future__ import annotations

__all__ = ["counted", "harmless", "human_bytes", "one_line"]

LONGEST = 200


def one_line(error: BaseException) -> str:
    """The message of an error of another library, in one line."""
    return " ".join(str(error).split())[:LONGEST] or type(error).__name__


def harmless(text: object) -> str:
    """Untrusted text with its control characters escaped, so that it cannot control a terminal or reorder a line."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text))


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
