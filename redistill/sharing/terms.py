"""The terms of an archive: licences as SPDX expressions, where the images come from, how to cite it.

The licences of the archive, of its images and of its teachers are three different statements, and each may be missing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from redistill_cache import Archive, ArchiveSpec, open_archive
from redistill_cache.addresses import is_address
from redistill_cache.errors import UsageError
from redistill_cache.fetching import fetched_description
from redistill_cache.packed import is_packed
from redistill_cache.spec import check_text

__all__ = ["LICENCES", "checked_terms", "data_source", "missing_for_publishing", "publishing_advice", "spdx"]

LICENCES = ("licence", "data_licence", "teacher_licence")
# The sources of images that say themselves what they are.
NAMED_SOURCES = {
    "cifar10": "CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html)",
    "cifar100": "CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html)",
    "synthetic": "images drawn by redistill",
}
# What a published archive must state, and the option of `redistill archive edit` that states it.
NEEDED = {
    "licence": "--licence SPDX",
    "source of the images": "--data-source TEXT",
    "citation": "--citation TEXT",
}


def spdx(text: str) -> str | None:
    """A licence as a canonical SPDX expression; None if it is not one."""
    try:
        return canonicalize_license_expression(text)
    except InvalidLicenseExpression:
        return None


def checked_terms(terms: Mapping[str, str]) -> dict[str, str]:
    """Terms as they are stored. `UsageError` for a licence that is no SPDX expression; "" states nothing."""
    checked = {}
    for name, text in terms.items():
        flag = f"--{name.replace('_', '-')}"
        check_text(text, flag)
        value = spdx(text) if name in LICENCES and text else text
        if value is None:
            raise UsageError(
                f"{flag} must be an SPDX expression such as CC-BY-4.0 or 'MIT AND CC0-1.0', found {text!r:.80}; see "
                "https://spdx.org/licenses, and write LicenseRef-NAME for a licence that is not listed there"
            )
        checked[name] = value
    return checked


def data_source(spec: ArchiveSpec) -> str:
    """Where the images come from, as the author or the kind of source says; "" if neither does."""
    kind = spec.source.get("kind")
    return spec.data_source or (NAMED_SOURCES.get(kind, "") if isinstance(kind, str) else "")


def spec_at(location: str | Path) -> ArchiveSpec:
    """The specification of the archive at a path or an address, of which no more than its metadata are fetched."""
    if is_address(location) or is_packed(location):
        with fetched_description(str(location)) as state:
            return state.spec
    return open_archive(location).spec


def missing_for_publishing(archive: Archive | str | Path) -> list[str]:
    """What a published archive must state and this one does not: keys of `NEEDED`."""
    spec = archive.spec if isinstance(archive, Archive) else spec_at(archive)
    stated = (spdx(spec.licence), data_source(spec), spec.citation.strip())
    return [name for name, value in zip(NEEDED, stated, strict=True) if not value]


def publishing_advice(path: str | Path, missing: list[str]) -> str:
    """One line: what is missing, and the command that states it."""
    options = " ".join(NEEDED[name] for name in missing)
    edited, then = (path, "") if not is_packed(path) else ("ARCHIVE", ", the one that was packed, and pack it again")
    return f"missing {', '.join(missing)}; redistill archive edit {shlex.quote(str(edited))} {options}{then}"
