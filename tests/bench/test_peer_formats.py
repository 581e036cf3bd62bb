"""What bench/peers.py measures, it measures right: every reader returns exactly what its writer was given."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from redistill_cache.codecs import fit_codec

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from peer_formats import LIMIT, PEERS, ArchiveRows, Format, Rows, Values
from peer_formats.image_pickles import ImagePickles
from peer_formats.view_records import ViewRecords

VIEWS, IMAGES, CLASSES = 2, 300, 150
KNOWN = np.random.default_rng(0).normal(scale=3, size=(400, CLASSES)).astype(np.float32)
ARCHIVES = (
    ArchiveRows("archive, float16", "", fit_codec("float16", KNOWN), known_only=False),
    ArchiveRows("archive, linear", "", fit_codec("linear", KNOWN, certified=False), known_only=True),
)


def expected(form: Format, rows: Rows) -> np.ndarray:
    """The rows [views, images, ...] that must come back, by another way than the format's own."""
    if isinstance(form, ArchiveRows):
        if not form.known_only:
            exact = rows.logits.astype(np.float64)
            return (exact - exact.max(-1, keepdims=True)).astype(np.float16).astype(np.float32)
        return np.asarray(form.codec.decode(form.codec.encode(rows.known).arrays))[rows.pick]
    if isinstance(form, ImagePickles | ViewRecords):
        probability = np.exp(rows.logits.astype(np.float64))
        return -np.sort(-probability / probability.sum(-1, keepdims=True), axis=-1)[..., : form.k]
    return rows.logits.astype(np.float16)


def tolerance(form: Format) -> dict[str, float]:
    """Logits come back as they were, probabilities as their type holds them, products to how they are summed."""
    if isinstance(form, ImagePickles):
        return {"rtol": 1e-5, "atol": 0}
    if isinstance(form, ViewRecords):
        return {"rtol": 1e-3, "atol": 6e-8}
    return {"rtol": 1e-4, "atol": 1e-5} if isinstance(form, ArchiveRows) and form.known_only else {"rtol": 0, "atol": 0}


def found(form: Format, values: Values[str, np.ndarray]) -> np.ndarray:
    if isinstance(form, ArchiveRows):
        return form.dense(values, CLASSES)
    return values["probability"] if "probability" in values else values["logits"]


@pytest.mark.filterwarnings("ignore")  # the peers' packages have some of their own
@pytest.mark.parametrize("form", [LIMIT, *PEERS, *ARCHIVES], ids=lambda form: form.name)
def test_a_reader_returns_what_was_written(form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if form.needs:
        pytest.importorskip(form.needs, reason=f"needs {form.needs}: pip install 'redistill[peers]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "rows").mkdir()
    rows = Rows.drawn(KNOWN, VIEWS, IMAGES)
    form.write(tmp_path / "rows", rows)
    near = tolerance(form)
    reader = form.open(tmp_path / "rows")
    true = expected(form, rows)
    for shuffle in (None, np.random.default_rng(1)):
        seen = np.zeros((VIEWS, IMAGES), int)
        order = []
        for views, images, values in reader.epochs(shuffle):
            np.testing.assert_allclose(found(form, values), true[views, images], **near)
            np.add.at(seen, (views, images), 1)
            order.extend(images.tolist())
        assert (seen == 1).all()
        assert (order != sorted(order)) or shuffle is None
    images = np.random.default_rng(2).permutation(IMAGES)[:50]
    values = reader.batch(1, images)
    if values is not None:
        np.testing.assert_allclose(found(form, values), true[1, images], **near)
    reader.close()


def test_classes_of_the_largest_are_kept(tmp_path: Path):
    rows = Rows.drawn(KNOWN, 1, 20)
    for form in (ImagePickles(k=3), ViewRecords(k=3)):
        folder = tmp_path / form.name.replace("/", " ")
        folder.mkdir()
        form.write(folder, rows)
        values = form.open(folder).batch(0, np.arange(20))
        assert (values["index"] == np.argsort(-rows.logits[0], axis=1)[:, :3]).all()
        assert (form.dense(values, CLASSES).argmax(1) == rows.logits[0].argmax(1)).all()
