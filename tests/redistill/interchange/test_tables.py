"""Tables of logits become archives of central crops: every file type, names, and what is refused."""

from __future__ import annotations

import csv
import io
import pickle
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from redistill_cache import open_archive
from redistill_cache.errors import RedistillError, Refused, SpecMismatch, UsageError
from redistill_cache.verify import verify

from redistill.interchange.importing import import_archive
from redistill.interchange.options import ImportOptions
from redistill.progress import NoProgress
from redistill.views import ViewDataset, draw_params, parse_recipe

RECIPE = "center?size=24&crop_pct=0.9&interpolation=bicubic"


def options(source: Path, images: Path, out: Path, **changed) -> ImportOptions:
    settings = {"recipe": RECIPE, "codec": "float32", **changed}
    return ImportOptions(source=source, layout="table", data=f"folder:{images}", out=out, **settings)


def write_npz(path: Path, names: list[str], rows: np.ndarray) -> Path:
    np.savez_compressed(path, keys=np.array(names), logits=rows)
    return path


def write_csv(path: Path, names: list[str], rows: np.ndarray) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([name, *map(repr, row.tolist())] for name, row in zip(names, rows, strict=True))
    return path


def write_parquet(path: Path, names: list[str], rows: np.ndarray) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"name": names, "logits": list(rows)}), path)
    return path


def write_npy(path: Path, names: list[str], rows: np.ndarray) -> Path:
    np.save(path, rows)
    path.with_suffix(".txt").write_text("\n".join(names) + "\n")
    return path


WRITERS = {"npz": write_npz, "npy": write_npy, "csv": write_csv, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_table_becomes_the_same_archive(tmp_path: Path, images, keys, logits, kind: str):
    """Rows in another order than the images; the archive has those of the images, as central crops, and verifies."""
    order = np.random.default_rng(0).permutation(len(keys))
    source = WRITERS[kind](tmp_path / f"t.{kind}", [keys[i] for i in order], logits[order])
    names = tmp_path / "t.txt" if kind == "npy" else None
    result = import_archive(options(source, images, tmp_path / "a", names=names, licence="CC0-1.0"))
    archive = open_archive(tmp_path / "a", id=result.id)
    assert list(archive.keys) == keys
    exact, stored = (rows - rows.max(1, keepdims=True) for rows in (logits, archive.logits(0)))
    np.testing.assert_allclose(stored, exact, atol=0.02)
    expected = draw_params(parse_recipe(RECIPE), 0, 0, np.arange(len(keys)), archive.sizes, len(keys))
    np.testing.assert_array_equal(archive.view_params(0)["crop"], expected["crop"])
    assert (archive.labels == [int(key[1]) for key in keys]).all()
    ViewDataset(f"folder:{images}", archive)  # its canaries are those of the images
    assert verify(tmp_path / "a", full=True).ok
    model = archive.teacher("imported").model
    assert (model["imported"]["layout"], model["imported"]["file"]) == ("table", kind)
    assert any("top-1 of the logits on 30 labelled views" in sentence for sentence in model["audit"])
    assert archive.spec.licence == "CC0-1.0"
    again = import_archive(options(source, images, tmp_path / "a", names=names, licence="CC0-1.0"))
    assert again.id == result.id
    assert not [path for path in tmp_path.iterdir() if path.name not in ("a", source.name, "t.txt")]


def test_names_are_joined_and_differences_must_be_accepted(tmp_path: Path, images, keys, logits):
    names = [*keys[:-2], "c9/unknown.png", keys[0]]
    table = write_npz(tmp_path / "t.npz", names, logits)
    for accept, shown in (
        ((), "2 images of the data without logits ('c4/i44.png', 'c4/i45.png'); 1 names without an image"),
        (("missing", "extra"), "1 names that occur again, of which the first counts ('c0/i00.png')"),
        (("missing", "duplicate"), "1 names without an image ('c9/unknown.png')"),
    ):
        with pytest.raises(Refused) as refusal:
            import_archive(options(table, images, tmp_path / "a", accept=accept))
        assert shown in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "a").exists()
    import_archive(options(table, images, tmp_path / "a", accept=("missing", "extra", "duplicate")))
    archive = open_archive(tmp_path / "a")
    assert list(archive.keys) == keys[:-2]
    assert [item["key"] for item in archive.spec.excluded] == keys[-2:]
    assert archive.logits(0).argmax(1).tolist() == logits[:-2].argmax(1).tolist()
    assert any("2 images of the data without logits" in text for text in archive.teacher("imported").model["audit"])
    stems = write_npz(tmp_path / "stems.npz", [Path(key).stem for key in keys], logits)
    with pytest.raises(Refused, match=r"the data has 'c0/i00.png', the source 'i00'; .*--match"):
        import_archive(options(stems, images, tmp_path / "b"))
    import_archive(options(stems, images, tmp_path / "b", match="stem"))
    assert list(open_archive(tmp_path / "b").keys) == keys


def test_names_that_do_not_tell_images_apart_are_refused(tmp_path: Path, logits):
    for name in ("a.b.png", "a.c.png", "d.png"):
        (tmp_path / "images" / "c0").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "images" / "c0" / name)
    table = write_npz(tmp_path / "t.npz", ["a", "d"], logits[:2, :2])
    with pytest.raises(Refused, match="1 images of the data have the name of another one in the source, such as 'a'"):
        import_archive(options(table, f"{tmp_path / 'images'}?labels=none", tmp_path / "a", match="stem"))


def test_a_path_where_no_archive_can_be_is_refused_before_the_table_is_read(tmp_path: Path, images, keys):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    nan = write_npz(tmp_path / "t.npz", keys, np.full((30, 5), np.nan, np.float32))
    with pytest.raises(Refused, match="holds files and is not an archive"):
        import_archive(options(nan, images, tmp_path / "own"))
    with pytest.raises(UsageError, match="is a URL"):
        options(nan, images, Path("s3://bucket/a"))


def test_probabilities_are_stored_as_their_logarithm(tmp_path: Path, images, keys, logits):
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    probabilities[0] = [1, 0, 0, 0, 0]
    table = write_npz(tmp_path / "t.npz", keys, probabilities.astype(np.float16))
    with pytest.raises(Refused, match="add --values probabilities"):
        import_archive(options(table, images, tmp_path / "a"))
    result = import_archive(options(table, images, tmp_path / "a", values="probabilities", temperature=2.0))
    stored = open_archive(tmp_path / "a").logits(0)
    stored -= stored.max(1, keepdims=True)
    exact = 2 * np.log(np.maximum(probabilities.astype(np.float16).astype(np.float64), 2.0**-25))
    np.testing.assert_allclose(stored, exact - exact.max(1, keepdims=True), atol=0.05, rtol=1e-3)
    audit = " | ".join(result.audit)
    assert "4 probabilities that float16 rounded to 0" in audit
    assert "temperature of the probabilities: stated by the user" in audit
    assert "precision: the source has float16" in audit
    wrong = probabilities.copy()
    wrong[3] /= 2
    table = write_npz(tmp_path / "w.npz", keys, wrong)
    with pytest.raises(Refused, match="probabilities that sum to 1"):
        import_archive(options(table, images, tmp_path / "b", values="probabilities"))


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path, images, keys, logits):
    class Told(NoProgress):
        def __init__(self):
            self.warnings: list[str] = []

        def warning(self, text: str) -> None:
            self.warnings.append(text)

    table, told = write_npz(tmp_path / "t.npz", keys, logits), Told()
    result = import_archive(options(table, images, tmp_path / "a"), told, dry_run=True)
    assert (result.id, result.codec, told.warnings) == (None, "float32", [])
    assert not (tmp_path / "a").exists()


def test_an_unfinished_or_other_archive(tmp_path: Path, images, keys, logits):
    """Blocks of a stopped import are completed; another source is refused."""
    table = write_npz(tmp_path / "t.npz", keys, logits)
    whole = import_archive(options(table, images, tmp_path / "whole", block_rows=16)).id
    import_archive(options(table, images, tmp_path / "a", block_rows=16))
    removed = [*(tmp_path / "a" / "_redistill" / "blocks").glob("teachers.imported.0.*.json")][:-1]
    for record in (*removed, tmp_path / "a" / "_redistill" / "manifest.json"):
        record.unlink()
    assert import_archive(options(table, images, tmp_path / "a", block_rows=16)).id == whole
    other = write_npz(tmp_path / "other.npz", keys, logits[::-1].copy())
    with pytest.raises(SpecMismatch, match="a source with other content"):
        import_archive(options(other, images, tmp_path / "a", block_rows=16))
    with pytest.raises(Refused, match="holds the teacher imported"):
        import_archive(options(table, images, tmp_path / "a", block_rows=16, teacher_name="second"))


def raw_npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def claimed(shape: tuple[int, ...], dtype: str = "<f4", data: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def hostile(path: Path, keys: list[str], logits: np.ndarray) -> dict[str, tuple[Path, str]]:
    """Tables, and what their refusal says."""
    names, rows = npy(np.array(keys)), npy(logits)
    nan = logits.copy()
    nan[2, 1] = np.nan
    truncated = write_npz(path / "whole.npz", keys, logits).read_bytes()
    (path / "cut.npz").write_bytes(truncated[: len(truncated) // 2])
    (path / "text.csv").write_text("".join(f"{key},1,2,x,4,5\n" for key in keys))
    (path / "wide.csv").write_text(f"{keys[0]}" + ",1" * 1_000_000 + "\n")
    (path / "ragged.csv").write_text(f"{keys[0]},1,2,3,4,5\n{keys[1]},1,2,3\n")
    (path / "long.csv").write_bytes(b"a" * (33 << 20))
    (path / "quote.csv").write_bytes(b'"' + b"a\n" * (1 << 20))
    (path / "nul.csv").write_bytes(b"\0\xff\xfe\n")
    (path / "fake.parquet").write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    (path / "object.npy").write_bytes(npy(np.array([Evil()], object)))
    (path / "lines.txt").write_text("x\n")
    (path / "pickle.npz").write_bytes(pickle.dumps(Evil()))
    return {
        "objects": (raw_npz(path / "o.npz", keys=names, logits=npy(np.array([[Evil()]], object))), "Python objects"),
        "object names": (raw_npz(path / "on.npz", keys=npy(np.array(keys, object)), logits=rows), "Python objects"),
        "huge": (raw_npz(path / "h.npz", keys=names, logits=claimed((1 << 31, 5))), "states"),
        "overflow": (raw_npz(path / "v.npz", keys=names, logits=claimed((1 << 62, 1 << 62))), "states"),
        "bomb of zeros": (
            raw_npz(path / "z.npz", keys=names, logits=claimed((30, 5000), data=bytes(600_000))),
            "5000 values, expected 5",
        ),
        "columns": (raw_npz(path / "f.npz", keys=names, logits=npy(np.asfortranarray(logits))), "by columns"),
        "missing": (raw_npz(path / "m.npz", keys=names), "arrays keys and logits"),
        "fewer names": (raw_npz(path / "fn.npz", keys=npy(np.array(keys[:3])), logits=rows), "30 names"),
        "nan": (write_npz(path / "n.npz", keys, nan), "NaN, infinity"),
        "integers": (write_npz(path / "i.npz", keys, logits.astype(int)), "as floats"),
        "classes": (write_npz(path / "c.npz", keys, logits[:, :4]), "4 values, expected 5"),
        "cut": (path / "cut.npz", "truncated or damaged"),
        "text": (path / "text.csv", "line 1 has 'x'"),
        "wide": (path / "wide.csv", "1000000 values, expected 5"),
        "ragged": (path / "ragged.csv", "row 2 has 3 values"),
        "long": (path / "long.csv", "a line of more than"),
        "quote": (path / "quote.csv", "field larger than field limit"),
        "nul": (path / "nul.csv", "damaged"),
        "no zip": (path / "pickle.npz", "not a zip"),
        "no parquet": (path / "fake.parquet", "parquet"),
        "suffix": (path / "lines.txt", "expected a table .npz, .npy, .csv, .parquet"),
        "no names": (path / "object.npy", "add --names"),
        "absent": (path / "absent.npz", "No such file"),
    }


def test_hostile_tables_are_refused_in_one_line_without_their_size(tmp_path: Path, images, keys, logits):
    tables = hostile(tmp_path, keys, logits)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (table, reason) in tables.items():
        with pytest.raises(RedistillError) as refusal:
            import_archive(options(table, images, tmp_path / "a"))
        assert reason in str(refusal.value), f"{name}: {refusal.value}"
        assert "\n" not in str(refusal.value), name
    assert not (tmp_path / "a").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10
    with pytest.raises(Refused, match="Python objects"):
        import_archive(options(tmp_path / "object.npy", images, tmp_path / "a", names=tmp_path / "lines.txt"))
    with pytest.raises(UsageError, match="one view without random choices"):
        import_archive(options(tables["nan"][0], images, tmp_path / "a", recipe="rrc?size=24"))


def test_parquet_without_pyarrow_is_refused_in_one_line(tmp_path: Path, images, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(Refused, match=r"needs pyarrow; pip install 'redistill\[parquet\]'"):
        import_archive(options(tmp_path / "t.parquet", images, tmp_path / "a"))
