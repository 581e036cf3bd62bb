"""The terms of an archive: its licence, where its images come from, and how to cite it."""

from __future__ import annotations

import shlex
from pathlib import Path

from redistill_cache import open_archive

__all__ = ["missing_for_publishing", "publishing_advice"]

# What a published archive must state, and the option of `redistill archive edit` that states it.
NEEDED = {"licence": "--licence SPDX", "source of the images": "--data-source TEXT", "citation": "--citation TEXT"}


def missing_for_publishing(archive: str | Path) -> list[str]:
    """What a published archive must state and this one does not: keys of `NEEDED`."""
    spec = open_archive(archive).spec
    stated = (spec.licence.strip(), spec.source, spec.citation.strip())
    return [name for name, value in zip(NEEDED, stated, strict=True) if not value]


def publishing_advice(path: str | Path, missing: list[str]) -> str:
    """One line: what is missing, and the command that states it."""
    options = " ".join(NEEDED[name] for name in missing)
    return f"missing {', '.join(missing)}; redistill archive edit {shlex.quote(str(path))} {options}"
