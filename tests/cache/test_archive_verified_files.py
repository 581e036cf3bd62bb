"""Where the hashes of verified files are cached, and reading without such a place."""

from __future__ import annotations

import pwd
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import open_archive
from redistill_cache.verified_files import cache_folder

from tests.tiny_archive import stored_logits


def test_the_cache_folder_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "redistill"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == Path.home() / ".cache" / "redistill"


def test_a_machine_without_a_home_hashes_every_time(sealed: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # no entry in the password file either
    assert cache_folder() == Path("/dev/null/redistill")
    assert np.array_equal(open_archive(sealed).logits(0), stored_logits(0))
