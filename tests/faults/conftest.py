"""Fixtures of the fault tests. Every test starts with an empty cache folder, in which no file is marked as verified."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import redistill_cache.writer
from redistill_cache.layout import ArrayLayout
from redistill_cache.shards import encode_shard

from tests.faults.scenario import hashes, write_archive


@pytest.fixture(autouse=True)
def _fresh_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@functools.lru_cache(maxsize=256)
def encode_once(layout: ArrayLayout, shape: tuple[int, ...], data: bytes) -> bytes:
    return encode_shard(layout, np.frombuffer(data, layout.dtype).reshape(shape))


@pytest.fixture
def _shards_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode each shard of the scenario only once; encoding is a pure function, and it is called thousands of times."""
    monkeypatch.setattr(
        redistill_cache.writer,
        "encode_shard",
        lambda layout, rows: encode_once(layout, rows.shape, np.ascontiguousarray(rows).tobytes()),
    )


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """Id and file hashes of an archive that was written without faults."""
    path = tmp_path_factory.mktemp("reference") / "r.redistill.zarr"
    return write_archive(path), hashes(path)
