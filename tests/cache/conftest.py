"""A tiny archive that is written once, and copies of it that tests may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny_archive import make


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sealed archive of tests/tiny_archive.py. Tests must not change it."""
    path = tmp_path_factory.mktemp("sealed") / "a.redistill.zarr"
    make(path)
    return path


@pytest.fixture
def archive_copy(sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.redistill.zarr"
    shutil.copytree(sealed, path)
    return path
