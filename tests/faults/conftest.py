"""Every proof of this folder starts on a machine that has never verified an archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.scenario import hashes, write_archive


@pytest.fixture(autouse=True)
def _fresh_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """Id and files of an archive that was written without any trouble."""
    path = tmp_path_factory.mktemp("reference") / "r.redistill.zarr"
    return write_archive(path), hashes(path)
