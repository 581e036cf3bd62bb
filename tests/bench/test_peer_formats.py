"""The formats that bench/peers.py measures: every reader returns exactly the rows that were written."""

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
    """The rows [views, images, ...] to expect, computed independently of the format."""
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
    """Logits are exact; probabilities are rounded to their type; decoded sums depend on the order of addition."""
    if isinstance(form, ImagePickles):
        return {"rtol": 1e-5, "atol": 0}
    if isinstance(form, ViewRecords):
        return {"rtol": 1e-3, "atol": 6e-8}
    return {"rtol": 1e-4, "atol": 1e-5} if isinstance(form, ArchiveRows) and form.known_only else {"rtol": 0, "atol": 0}


def read_values(form: Format, values: Values[str, np.ndarray]) -> np.ndarray:
    if isinstance(form, ArchiveRows):
        return form.dense(values, CLASSES)
    return values["probability"] if "probability" in values else values["logits"]


@pytest.mark.filterwarnings("ignore")  # of the packages of other formats
@pytest.mark.parametrize("form", [LIMIT, *PEERS, *ARCHIVES], ids=lambda form: form.name)
def test_a_reader_returns_what_was_written(form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if form.needs:
        pytest.importorskip(form.needs, reason=f"needs {form.needs}: pip install 'redistill[peers]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "rows").mkdir()
    rows = Rows.drawn(KNOWN, VIEWS, IMAGES)
    form.write(tmp_path / "rows", rows)
    close_enough = tolerance(form)
    reader = form.open(tmp_path / "rows")
    true_values = expected(form, rows)
    for shuffle in (None, np.random.default_rng(1)):
        seen = np.zeros((VIEWS, IMAGES), int)
        order = []
        for views, images, values in reader.epochs(shuffle):
            np.testing.assert_allclose(read_values(form, values), true_values[views, images], **close_enough)
            np.add.at(seen, (views, images), 1)
            order.extend(images.tolist())
        assert (seen == 1).all()
        assert (order != sorted(order)) or shuffle is None
    images = np.random.default_rng(2).permutation(IMAGES)[:50]
    values = reader.batch(1, images)
    if values is not None:
        np.testing.assert_allclose(read_values(form, values), true_values[1, images], **close_enough)
    reader.close()


def test_the_classes_of_the_largest_probabilities_are_stored(tmp_path: Path):
    rows = Rows.drawn(KNOWN, 1, 20)
    for form in (ImagePickles(k=3), ViewRecords(k=3)):
        folder = tmp_path / form.name.replace("/", " ")
        folder.mkdir()
        form.write(folder, rows)
        values = form.open(folder).batch(0, np.arange(20))
        assert (values["index"] == np.argsort(-rows.logits[0], axis=1)[:, :3]).all()
        assert (form.dense(values, CLASSES).argmax(1) == rows.logits[0].argmax(1)).all()
