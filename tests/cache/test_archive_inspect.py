"""The JSON description of an archive, with fixed keys."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import ArchiveWriter, open_archive
from redistill_cache.errors import Damaged
from redistill_cache.inspect import describe

from tests.attacks.forge import reseal
from tests.tiny_archive import SPEC, block_data, contents, fill, logits, samples, start, stored_logits


def kl(exact: np.ndarray, decoded: np.ndarray, temperature: float) -> float:
    def log_softmax(rows: np.ndarray) -> np.ndarray:
        scaled = rows.astype(np.float64) / temperature
        shifted = scaled - scaled.max(1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    p, q = log_softmax(exact), log_softmax(decoded)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def test_a_sealed_archive(sealed: Path):
    identity = hashlib.sha256((sealed / "_redistill/manifest.json").read_bytes()).hexdigest()
    description = describe(open_archive(sealed))
    assert json.loads(json.dumps(description)) == description, "plain JSON"
    total = sum(map(len, contents(sealed).values()))
    assert description["id"] == identity
    assert description["complete"]
    assert (description["num_samples"], description["num_views"], description["num_classes"]) == (50, 3, 6)
    assert description["total_bytes"] == total
    assert description["bytes_per_view"] == pytest.approx(total / 150)
    assert description["recipe"] == SPEC.recipe
    assert description["excluded"] == [{"key": "bad.png", "reason": "truncated"}]
    assert (description["licence"], description["citation"]) == ("CC-BY-4.0", "Nobody (2026)")
    assert description["models"] == {"tiny": {"name": "demo:tiny", "weights": "0" * 64}}
    assert set(description["view_parameters"]) == {"crop", "flip"}


def test_bytes_and_fidelity_of_a_signal(sealed: Path):
    signal = describe(open_archive(sealed))["teachers"]["tiny"]["logits"]
    files = contents(sealed).items()
    written = sum(len(data) for name, data in files if name.startswith("teachers/tiny/logits/") and "/c." in name)
    assert signal["codec"] == "float16"
    assert signal["bytes_per_view"] * 150 + signal["side_bytes"] == pytest.approx(written)
    assert sum(signal["bytes_per_view_by_array"].values()) == pytest.approx(signal["bytes_per_view"])
    fidelity = signal["fidelity"]
    assert fidelity["bound"] == 3e-8
    for temperature, name in ((1.0, "t1"), (4.0, "t4")):
        lost = sum(kl(logits(view), stored_logits(view), temperature) for view in range(3)) / 3
        assert fidelity[f"mean_kl_{name}"] == pytest.approx(lost, rel=0.02, abs=1e-12)
        assert lost < fidelity[f"max_kl_{name}"] <= 3e-8


def test_an_unfinished_archive(tmp_path: Path):
    path = tmp_path / "a.redistill.zarr"
    writer = start(path)
    fill(writer, ["views"])
    description = describe(open_archive(path, allow_partial=True))
    assert (description["id"], description["complete"]) == (None, False)
    assert description["committed_blocks"] == 2 + 12
    assert description["teachers"]["tiny"]["logits"]["fidelity"] is None


def test_a_signal_with_missing_statistics_has_no_fidelity(tmp_path: Path):
    path = tmp_path / "a.redistill.zarr"
    writer = start(path)
    fill(writer, ["views", "canaries"])
    for number, block in enumerate(writer.missing("teachers/tiny")):
        arrays, stats = block_data(block)
        assert stats is not None
        writer.write(block, arrays, stats if number else {"layer4.1": stats["layer4.1"]})
    writer.seal()
    description = describe(open_archive(path))["teachers"]["tiny"]
    assert description["logits"]["fidelity"] is None
    assert set(description["layer4.1"]["fidelity"]) >= {"bound", "mean_relative", "max_relative"}


def test_invalid_statistics_are_damage(archive_copy: Path):
    reseal(archive_copy, teachers={"tiny": {"logits": {"rows": 1}}})
    with pytest.raises(Damaged, match="fidelity statistics"):
        describe(open_archive(archive_copy))


def test_a_sealed_prefix_of_views(tmp_path: Path):
    path = tmp_path / "a.redistill.zarr"
    writer = ArchiveWriter.create(path, replace(SPEC, num_views=9))
    writer.write_samples(**samples())
    for part in writer.parts():
        for block in writer.missing(part):
            if block.view < 2:
                writer.write(block, *block_data(block))
    writer.seal(views=2)
    assert describe(open_archive(path))["num_views"] == 2
