"""A golden archive of format 1.0: written once; every later version must read it.

Regenerate (only for a new format, under a new name):
    python -c "from tests.faults.test_golden_archive import regenerate; regenerate()"
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import redistill_cache
from redistill_cache.verify import verify

from tests.faults import scenario

DATA = Path(__file__).resolve().parents[1] / "data"
ARCHIVE, VALUES = DATA / "golden-v1.redistill.zarr", DATA / "golden-v1.npz"
ID = "d32e5098bc00b75b31387856cb93160ade0826da3abe7d8002972ce1c48d2a70"


def regenerate() -> None:
    shutil.rmtree(ARCHIVE, ignore_errors=True)
    print(scenario.write_archive(ARCHIVE))
    np.savez_compressed(VALUES, logits=np.stack([scenario.decoded(view) for view in range(scenario.VIEWS)]))


def test_the_golden_archive_is_read_with_the_same_values(tmp_path: Path):
    path = tmp_path / "golden.redistill.zarr"
    shutil.copytree(ARCHIVE, path)  # a checkout may be read-only
    assert verify(path, full=True).ok
    archive = redistill_cache.open_archive(path)
    assert archive.id == ID
    assert list(archive.keys) == list(scenario.KEYS)
    assert np.array_equal(archive.labels, scenario.LABELS)
    expected = np.load(VALUES)["logits"]
    for view in range(archive.num_views):
        np.testing.assert_allclose(archive.logits(view), expected[view], rtol=1e-5, atol=1e-5)
        assert np.array_equal(archive.view_params(view)["crop"], scenario.view_params(view)["crop"])
        assert np.array_equal(archive.canaries(view)[1], scenario.canaries(view)["pixels"])
