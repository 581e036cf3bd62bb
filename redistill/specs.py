"""Spec strings, the small language of data, models and losses: `scheme:name?key=value&key=value`.

folder:/data/train                 data       scheme "folder", name "/data/train"
synthetic?classes=20&size=32       data       scheme "synthetic", name ""
cifar:resnet8x4?weights=w.pt       model      scheme "cifar", name "resnet8x4"
power?lam=0.6667&temperature=4     loss       scheme "power", name ""

Also the wording shared by error messages.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar
from urllib.parse import unquote

from redistill_cache.addresses import redact
from redistill_cache.errors import UsageError

__all__ = ["TYPE_NAMES", "Spec", "did_you_mean", "first_line", "listed", "parse_spec"]


T = TypeVar("T", str, int, float, bool)

TYPE_NAMES: Mapping[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass(frozen=True)
class Spec:
    """A parsed spec string. `options` are text; `take` converts them. `text` is for messages: it holds no secrets."""

    scheme: str
    name: str = ""
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    text: str = ""

    def __str__(self) -> str:
        return self.text

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Refuse any option that is not one of `known`."""
        known = sorted(known)
        for key in self.options:
            if key not in known:
                hint = did_you_mean(key, known) if known else "it takes no options"
                raise UsageError(f"{self.text!r}: unknown option {key!r}; {hint}")

    def take(self, key: str, default: T) -> T:
        """The option `key` in the type of `default`, or `default` if it is missing."""
        text = self.options.get(key)
        if text is None:
            return default
        kind = type(default)
        try:
            if kind is bool:
                if text.lower() not in TRUE | FALSE:
                    raise ValueError(text)
                return kind(text.lower() in TRUE)
            return kind(text)
        except ValueError:
            raise UsageError(f"{self.text!r}: option {key} must be {TYPE_NAMES[kind]}, found {text!r}") from None


def parse_spec(text: str) -> Spec:
    """Split a spec string: options start at the first '?', and the scheme ends at the first ':' before it."""
    head, question, tail = text.partition("?")
    scheme, _, name = head.partition(":")
    if not scheme:
        raise UsageError(f"{text!r} has no scheme; expected something like 'folder:PATH' or 'power?lam=0.6667'")
    options: dict[str, str] = {}
    for pair in tail.split("&") if question else []:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"{text!r}: expected key=value after '?', found {pair!r}")
        if key in options:
            raise UsageError(f"{text!r}: option {key!r} occurs twice")
        options[key] = unquote(value)
    return Spec(scheme=scheme, name=name, options=MappingProxyType(options), text=redact(text))


# -- wording of error messages ----------------------------------------------------------------------------------------

LISTED = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an "unknown name" message: the most similar known names, or all of them when none is similar."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


def listed(words: Iterable[str], separator: str = ", ") -> str:
    """The first few, and how many more."""
    words = list(words)
    rest = [f"and {len(words) - LISTED} more"] if len(words) > LISTED else []
    return separator.join(words[:LISTED] + rest)


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
