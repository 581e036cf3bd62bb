"""Addresses: the one place where they are parsed, and where their secrets are removed from text.

    https://example.org/lab/r50.redistill.zarr#sha256=ID     an archive that must have this id
    hf://datasets/ORG/NAME/r50.redistill                     a file or folder of the hub
    s3://bucket/r50.redistill.zarr   gs://...                through fsspec

An address may come from a stranger's file, so it names one file or folder on one server: no other scheme, no chain of
fsspec's ('::'), no '.' or '..'. User name, password and values such as '?token=' are secrets: they are
sent to the server and shown nowhere.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from redistill_cache.errors import UsageError

__all__ = [
    "SCHEMES",
    "Address",
    "address_of_path",
    "checked_id",
    "is_address",
    "parse_address",
    "redact",
    "split_pin",
    "with_pin",
]

SCHEMES = ("http", "https", "s3", "gs", "hf")
LOCAL_SCHEME = "file"
MAX_ADDRESS = 4096
HIDDEN = "***"

PIN = "#sha256="
ID = re.compile(r"[0-9a-f]{64}")
USER = re.compile(r"(?<=://)[^/\s'\"]*@")
SECRET = re.compile(
    r"(?i)((?:(?:token|secret|passwd|password|api[_-]?key|access[_-]?key|credential|signature)[\w-]*|\bsig)=)[^&\s'\"]+"
)


@dataclass(frozen=True)
class Address:
    """One file or folder on a server. `str` shows it without secrets."""

    parts: SplitResult = field(repr=False)
    """Without user and fragment, and without '/' at the end."""
    authorization: str | None = field(default=None, repr=False)
    """The header for user name and password."""
    pin: str | None = None
    """The id that an archive at this address must have."""

    def __str__(self) -> str:
        return str(self.local) if self.scheme == LOCAL_SCHEME else redact(self.url)

    @property
    def url(self) -> str:
        """For the server; holds the query."""
        return self.parts.geturl()

    @property
    def scheme(self) -> str:
        return self.parts.scheme

    @property
    def name(self) -> str:
        """The last part of the path, or the host where there is none."""
        return unquote(self.parts.path.rpartition("/")[2]) or self.parts.netloc

    @property
    def local(self) -> Path:
        """Of a file or folder on this machine."""
        assert self.scheme == LOCAL_SCHEME
        return Path(unquote(self.parts.path))

    def child(self, path: str) -> Address:
        """A file in this folder."""
        return Address(self.parts._replace(path=f"{self.parts.path}/{path}"), self.authorization)


def is_address(text: object) -> bool:
    return "://" in str(text)


def address_of_path(path: Path) -> Address:
    """A file or folder on this machine. No text is parsed to one: an address from a file reaches servers only."""
    return Address(SplitResult(LOCAL_SCHEME, "", quote(str(path.absolute())), "", ""))


def parse_address(text: str, schemes: Sequence[str] = SCHEMES) -> Address:
    """`UsageError` for everything but an address of these schemes that names one file or folder."""
    text, pin = split_pin(text)
    before, at, after = text.rpartition("@")
    shown = repr(f"{before.partition('://')[0]}://{HIDDEN}@{after}"[:200] if at else redact(text)[:200])
    expected = f"expected an address such as {schemes[0]}://HOST/PATH ({', '.join(schemes)})"
    if len(text) > MAX_ADDRESS or not text.isprintable() or re.search(r"[\s\\]", text):
        raise UsageError(f"{shown}: {expected} of at most {MAX_ADDRESS} characters, without spaces or backslashes")
    try:
        parts = urlsplit(text)
        _ = parts.port  # refuses what is no port
    except ValueError:
        raise UsageError(f"{shown} is not a valid address; {expected}") from None
    if parts.scheme not in schemes or not parts.hostname:
        raise UsageError(f"{shown} is not read; {expected}")
    if parts.fragment:
        raise UsageError(f"{shown}: only {PIN}ID may follow '#'; remove the rest")
    is_http = parts.scheme in ("http", "https")
    if "::" in (parts.path + parts.query if is_http else text):  # an IPv6 host may hold it
        raise UsageError(f"{shown}: '::' chains addresses, which are not read; name one address")
    if {".", ".."} & set(unquote(parts.path).split("/")):
        raise UsageError(f"{shown} has '.' or '..' as a part of its path; write the path without them")
    if HIDDEN in text:
        raise UsageError(f"{shown}: a secret was removed when this address was recorded; give the whole address")
    user, at, host = parts.netloc.rpartition("@")
    if at and not is_http:
        raise UsageError(f"{shown}: {parts.scheme}:// takes no password; configure the package of the bucket")
    if parts.query and not is_http:
        raise UsageError(f"{shown}: {parts.scheme}:// takes no '?'; remove it")
    header = "Basic " + base64.b64encode(unquote(user).encode()).decode() if at else None
    return Address(parts._replace(netloc=host, path=parts.path.rstrip("/")), header, pin)


# -- pins -------------------------------------------------------------------------------------------------------------


def split_pin(location: str) -> tuple[str, str | None]:
    """A path or an address, and the id that the archive there must have, from 'LOCATION#sha256=ID'."""
    head, mark, identity = location.rpartition(PIN)
    return (head, checked_id(identity)) if mark else (location, None)


def checked_id(identity: str) -> str:
    if not ID.fullmatch(identity):
        raise UsageError(f"expected the id of an archive, 64 of 0-9 and a-f, found {redact(identity)[:100]!r}")
    return identity


def with_pin(location: str, identity: str | None) -> str:
    return location if identity is None else f"{location}{PIN}{identity}"


# -- secrets ----------------------------------------------------------------------------------------------------------


def redact(text: str) -> str:
    """Text with what is secret in it masked: users and passwords of addresses, and values with a name like 'token'."""
    return SECRET.sub(rf"\1{HIDDEN}", USER.sub(f"{HIDDEN}@", text))
