"""Exports: read back by numpy, webdataset and redistill itself; the same bytes whatever happened in between."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from redistill_cache import ArchiveSpec, ArchiveWriter, SignalSpec, TeacherSpec, open_archive
from redistill_cache.codecs import BlockStats, fit_codec
from redistill_cache.errors import OutOfRange, RedistillError, Refused, UsageError

from redistill.interchange.exporting import ExportResult, export_archive, sample_name
from redistill.interchange.importing import import_archive
from redistill.interchange.options import ExportOptions, ImportOptions
from redistill.sources.open_source import open_source
from tests.image_source import ImageSource
from tests.redistill.interchange.fkd_files import write_fkd

# webdataset leaves the closing of its files to the garbage collector.
reads_webdataset = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, images, keys, logits) -> Path:
    """Four views of 30 images, with crops and flips."""
    root = tmp_path_factory.mktemp("archive")
    write_fkd(root / "fkd", images, keys, logits)
    options = ImportOptions(
        source=root / "fkd", layout="fkd", data=f"folder:{images}", out=root / "a", recipe="rrc?size=24", block_rows=16
    )
    import_archive(options)
    return root / "a"


def export(archive: Path, out: Path, to: str, *, dry_run: bool = False, **changed) -> ExportResult:
    return export_archive(ExportOptions(archive=str(archive), out=out, to=to, **changed), dry_run=dry_run)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def odd_archive(path: Path, keys: list[str]) -> Path:
    """An archive of one view with these keys, and a layer whose name is that of another array."""
    rows = np.arange(len(keys) * 3, dtype=np.float32).reshape(-1, 3) * 30_000
    codec = fit_codec("float32", rows, keep_shift=True)
    features = fit_codec("float32", rows, metric="centred")
    writer = ArchiveWriter.create(path, ArchiveSpec(num_samples=len(keys), num_views=1, num_classes=3, block_rows=8))
    count = len(keys)
    writer.write_samples(keys, np.full(count, -1), np.zeros((count, 32), np.uint8), np.full((count, 2), 9, np.uint32))
    writer.add_teacher(TeacherSpec("t", (SignalSpec.of("logits", codec), SignalSpec.of("labels", features))))
    for block in writer.missing("teachers/t"):
        parts = {"logits": codec.encode(rows[block.start : block.stop])}
        parts["labels"] = features.encode(rows[block.start : block.stop])
        arrays = {f"{name}/{key}": np.asarray(a) for name, part in parts.items() for key, a in part.arrays.items()}
        writer.write(block, arrays, {name: BlockStats.of(part).to_json() for name, part in parts.items()})
    writer.seal()
    return path


def test_npz_files_hold_the_rows_of_a_view(archive: Path, tmp_path: Path, keys):
    opened = open_archive(archive)
    result = export(archive, tmp_path / "n", "npz", views=(2, 0))
    assert (result.views, result.files, result.kept, result.archive) == ((2, 0), 2, 0, opened.id)
    for view in (2, 0):
        with np.load(tmp_path / "n" / f"view-{view:04d}.npz", allow_pickle=False) as arrays:
            assert arrays["keys"].tolist() == keys
            np.testing.assert_array_equal(arrays["labels"], opened.labels)
            np.testing.assert_array_equal(arrays["digests"], opened.digests)
            np.testing.assert_array_equal(arrays["logits"], opened.logits(view))
            for name, values in opened.view_params(view).items():
                np.testing.assert_array_equal(arrays[name], values)
    assert result.total_bytes == sum(path.stat().st_size for path in (tmp_path / "n").glob("*.npz"))
    first = digests(tmp_path / "n")
    (tmp_path / "n" / "view-0002.npz").unlink()
    (tmp_path / "n" / "view-0002.npz.0123.partial").write_bytes(b"left by a killed process")
    assert export(archive, tmp_path / "n", "npz", views=(2, 0), teacher="imported").kept == 1
    assert digests(tmp_path / "n") == first
    half = export(archive, tmp_path / "h", "npz", views=(1,), dtype="float16")
    with np.load(tmp_path / "h" / "view-0001.npz") as arrays:
        np.testing.assert_allclose(arrays["logits"], opened.logits(1), atol=0.01)
        assert arrays["logits"].dtype == np.float16
    assert half.files == 1


def test_an_exported_view_is_a_table_to_import(tmp_path: Path, images, keys, logits):
    np.savez(tmp_path / "t.npz", keys=np.array(keys), logits=logits)
    options = ImportOptions(
        source=tmp_path / "t.npz", layout="table", data=f"folder:{images}", out=tmp_path / "a", recipe="center?size=24"
    )
    first = import_archive(replace(options, codec="float32"))
    export(tmp_path / "a", tmp_path / "n", "npz")
    table = tmp_path / "n" / "view-0000.npz"
    second = import_archive(replace(options, codec="float32", source=table, out=tmp_path / "b"))
    np.testing.assert_array_equal(open_archive(tmp_path / "b").logits(0), open_archive(tmp_path / "a").logits(0))
    assert first.id == second.id  # the same rows of the same images


@reads_webdataset
def test_webdataset_reads_samples_with_views_and_images(archive: Path, tmp_path: Path, images, keys):
    opened, out = open_archive(archive), tmp_path / "100% of w"
    result = export(archive, out, "webdataset", views=(0, 3), images=f"folder:{images}", per_tar=8)
    tars = sorted(map(str, out.glob("*.tar")))
    assert (result.files, len(tars)) == (4, 4)
    rows = {view: opened.logits(view) for view in (0, 3)}
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [key.partition(".")[0] for key in keys]
    for row, sample in enumerate(samples):
        described = sample["json"]
        assert (described["key"], described["row"], described["label"]) == (keys[row], row, int(keys[row][1]))
        for stated in described["views"]:
            view = stated.pop("view")
            np.testing.assert_array_equal(sample[f"v{view}.logits.npy"], rows[view][row])
            assert stated == {name: values[0].tolist() for name, values in opened.view_params(view, [row]).items()}
    raw = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert all(sample["png"] == (images / key).read_bytes() for sample, key in zip(raw, keys, strict=True))
    source = open_source(f"wds:{out}")
    assert source.sample(9).payload == (images / keys[9]).read_bytes()
    assert source.sample(9).label == int(keys[9][1])


def test_tars_are_the_same_after_an_error_and_a_kill(archive: Path, tmp_path: Path, images, keys):
    def run(out: Path) -> ExportResult:
        return export(archive, out, "webdataset", images=f"folder:{images}", per_tar=8)

    run(tmp_path / "whole")
    whole = digests(tmp_path / "whole")
    image = images / keys[20]
    content = image.read_bytes()
    try:
        image.write_bytes(content + b"changed")
        with pytest.raises(Refused):
            run(tmp_path / "w")
    finally:
        image.write_bytes(content)
    run(tmp_path / "w")
    assert digests(tmp_path / "w") == whole
    (tmp_path / "w" / "images-000002.tar").rename(tmp_path / "w" / "images-000002.tar.abc.partial")
    (tmp_path / "w" / "export.json.abc.partial").write_bytes(b"{")
    assert run(tmp_path / "w").kept == 2
    assert digests(tmp_path / "w") == whole
    assert json.loads((tmp_path / "w" / "export.json").read_text())["archive"] == open_archive(archive).id


def test_arrays_are_no_image_files(tmp_path: Path, logits):
    rng = np.random.default_rng(0)
    source = ImageSource([rng.integers(0, 256, (9, 9, 3), np.uint8) for _ in range(len(logits))])
    np.savez(tmp_path / "t.npz", keys=np.array([f"{i}.npy" for i in range(len(logits))]), logits=logits)
    options = ImportOptions(source=tmp_path / "t.npz", layout="table", data=source, out=tmp_path / "a")
    import_archive(replace(options, recipe="center?size=8", codec="float32"))
    with pytest.raises(Refused, match="are arrays and not files; export without --images"):
        export(tmp_path / "a", tmp_path / "w", "webdataset", images=source)
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["export.json"]
    export(tmp_path / "a", tmp_path / "x", "webdataset")


HOSTILE_KEYS = [
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../b.png",
    "a//b.png",
    ".hidden",
    "a\nb.png",
    "a\\..\\b.png",
    ".",
]


def test_a_key_that_leaves_the_folder_never_becomes_a_name(tmp_path: Path):
    for key in HOSTILE_KEYS:
        with pytest.raises(Refused, match="cannot be the name of a file in a tar"):
            sample_name(key)
    path = odd_archive(tmp_path / "a", ["fine.png", *HOSTILE_KEYS])
    with pytest.raises(Refused) as refusal:
        export(path, tmp_path / "w", "webdataset")
    assert "cannot be the name of a file in a tar" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("w/*.tar*"))
    export(path, tmp_path / "n", "npz")
    with np.load(tmp_path / "n" / "view-0000.npz") as arrays:
        assert arrays["keys"].tolist() == ["fine.png", *HOSTILE_KEYS]


@reads_webdataset
def test_names_of_layers_long_keys_and_missing_labels(tmp_path: Path):
    keys = [f"{'folder/' * 40}{i}é.png" for i in range(3)]
    path = odd_archive(tmp_path / "a", keys)
    export(path, tmp_path / "n", "npz", signals=("labels", "logits"))
    with np.load(tmp_path / "n" / "view-0000.npz") as arrays:
        assert arrays["labels"].tolist() == [-1] * 3
        np.testing.assert_array_equal(
            arrays["features.labels"], open_archive(path).features(0, layer="labels", teacher="t")
        )
    export(path, tmp_path / "w", "webdataset", signals=("labels",))
    [first, *_] = webdataset.WebDataset(str(tmp_path / "w" / "images-000000.tar"), shardshuffle=False).decode()
    assert first["__key__"] == keys[0].removesuffix(".png")
    assert "label" not in first["json"]
    assert first["v0.features.labels.npy"].tolist() == [0, 30_000, 60_000]
    with pytest.raises(Refused, match="beyond float16; use --dtype float32"):
        export(path, tmp_path / "h", "npz", dtype="float16")
    twice = odd_archive(tmp_path / "twice", ["a.b.png", "a.c.png"])
    with pytest.raises(Refused, match="1 images have the name of another one up to the first dot, such as 'a'"):
        export(twice, tmp_path / "x", "webdataset")


def test_what_is_refused_before_anything_is_written(archive: Path, tmp_path: Path):
    refused: list[tuple[type[RedistillError], str, dict]] = [
        (OutOfRange, "views 0 to 3 of these signals, --views has 4", {"views": (4,)}),
        (OutOfRange, "no signal 'layer3'", {"signals": ("layer3",)}),
        (OutOfRange, "no teacher 'b'", {"teacher": "b"}),
        (UsageError, "--images has no effect with --to npz", {"images": "folder:x"}),
        (UsageError, "--views must be at least 0", {"views": (-1,)}),
    ]
    for kind, reason, changed in refused:
        with pytest.raises(kind, match=reason):
            export(archive, tmp_path / "n", "npz", **changed)
    shown = export(archive, tmp_path / "n", "npz", dry_run=True)
    assert (shown.files, shown.total_bytes) == (4, 30 * 4 * 5 * 4)
    assert not (tmp_path / "n").exists()
    export(archive, tmp_path / "n", "npz", views=(0,))
    with pytest.raises(Refused, match=r"holds another export \(its export.json differs\)"):
        export(archive, tmp_path / "n", "npz", views=(1,))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    with pytest.raises(Refused, match="holds other files; choose a new folder"):
        export(archive, tmp_path / "own", "webdataset")
