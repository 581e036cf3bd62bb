"""Cards: they say what the archive says, other tools read them, and text of strangers means nothing in them."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlcroissant
import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from redistill_cache import ArchiveWriter, fetch_archive, open_archive
from redistill_cache.errors import Incomplete, Refused
from redistill_cache.packing import pack
from redistill_cache.verify import verify
from redistill_cli.__main__ import main

from redistill.sharing.cards import HUB_LICENCES, write_cards
from redistill.sharing.terms import missing_for_publishing
from tests import tiny_archive
from tests.tiny_archive import SPEC, contents, make, start

# Of the libraries of mlcroissant.
pytestmark = pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")
STATED = replace(SPEC, data_source="Glyphs 1", data_licence="LicenseRef-Glyphs", teacher_licence="MIT")
# Of few files, for what does not depend on their number.
SMALL = replace(SPEC, num_views=1, block_rows=64)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an archive, its packed form with a card in it, and a card of the archive as it is."""
    folder = tmp_path_factory.mktemp("shared")
    make(folder / "a.redistill.zarr", STATED)
    pack(folder / "a.redistill.zarr", folder / "a.redistill")
    write_cards(folder / "a.redistill", folder / "a.redistill", address="hf://datasets/org/a")
    write_cards(folder / "a.redistill.zarr", folder / "card")
    return folder


def front_matter(readme: str) -> dict[str, Any]:
    empty, matter, _ = readme.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(matter)


def rendered(readme: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(readme.split("---\n", 2)[2])


def text_of(html: str) -> str:
    text = re.sub("<[^>]*>", "", html)
    for entity, char in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, char)
    return text


def test_the_readme_states_the_archive(shared: Path):
    readme = (shared / "a.redistill/README.md").read_text()
    assert front_matter(readme) == {
        "pretty_name": "Outputs of tiny for 3 views of Glyphs 1",
        "license": "cc-by-4.0",
        "source_datasets": ["Glyphs 1"],
        "task_categories": ["image-classification"],
        "size_categories": ["n<1K"],
        "tags": ["knowledge-distillation", "teacher-logits", "redistill", "zarr"],
        "viewer": False,
    }
    text = text_of(rendered(readme))
    identity = open_archive(shared / "a.redistill.zarr").id
    for expected in (
        f"redistill archive fetch 'hf://datasets/org/a#sha256={identity}' teacher.redistill.zarr",
        "KL(teacher || stored) <= 3e-08, at temperature 1 and at temperature 4; measured KL at T = 1: mean",
        "Cite this archive as: Nobody (2026)",
        "50 of them, 1 excluded",
    ):
        assert expected in text
    for of, licence in {"this archive": "CC-BY-4.0", "images": "LicenseRef-Glyphs", "weights": "MIT"}.items():
        assert re.search(rf"{of}.*\n.*{licence}", text), of


@pytest.mark.parametrize("form", ["a.redistill", "card"])
def test_croissant_is_valid_and_lists_every_file_with_its_hash(shared: Path, form: str):
    path = shared / form / "croissant.json"
    dataset = mlcroissant.Dataset(str(path))
    assert not dataset.metadata.ctx.issues.errors
    # Neither follows from an archive.
    warned = {re.search(r"schema.org/(\w+)", warning)[1] for warning in dataset.metadata.ctx.issues.warnings}
    assert warned == {"datePublished", "version"}
    assert dataset.metadata.license == ["https://spdx.org/licenses/CC-BY-4.0.html"]
    document = json.loads(path.read_bytes())
    root = shared / "a.redistill" if form == "a.redistill" else shared / "a.redistill.zarr"
    listed = {item["contentUrl"]: (item["contentSize"], item["sha256"]) for item in document["distribution"]}
    found = contents(root) | {"preview.csv": (path.parent / "preview.csv").read_bytes()}
    cards = {"README.md", "croissant.json", "CITATION.cff"}
    assert listed == {
        name: (f"{len(data)} B", hashlib.sha256(data).hexdigest()) for name, data in found.items() if name not in cards
    }
    assert document["prov:wasDerivedFrom"] == [
        {"@type": "prov:Entity", "prov:label": "Glyphs 1", "license": "LicenseRef-Glyphs"},
        {
            "@type": "prov:Entity",
            "prov:label": "teacher tiny: not stated",
            "license": "https://spdx.org/licenses/MIT.html",
        },
    ]


def test_the_preview_has_the_classes_that_the_teacher_predicts(shared: Path):
    archive = open_archive(shared / "a.redistill.zarr")
    records = list(mlcroissant.Dataset(str(shared / "card/croissant.json")).records("rows"))
    assert len(records) == 20
    rows = {archive.keys[row]: row for row in range(50)}
    logits = archive.logits(0)
    for record in records:
        row = rows[record["rows/key"].decode()]
        assert record["rows/label"] == archive.labels[row]
        probabilities = np.exp(logits[row]) / np.exp(logits[row]).sum()
        order = np.argsort(-probabilities)[:5]
        assert [record[f"rows/class_{k}"].decode() for k in range(1, 6)] == [SPEC.class_names[c] for c in order]
        assert [record[f"rows/probability_{k}"] for k in range(1, 6)] == pytest.approx(probabilities[order], abs=6e-5)


def test_the_citation_file_has_what_its_format_requires(shared: Path):
    cited = yaml.safe_load((shared / "card/CITATION.cff").read_text())
    assert (cited["cff-version"], cited["type"], cited["license"]) == ("1.2.0", "dataset", "CC-BY-4.0")
    assert cited["message"] == "Cite this archive as: Nobody (2026)"
    assert cited["authors"][0].keys() == {"name"}
    assert cited["identifiers"][0]["value"] == f"sha256:{open_archive(shared / 'a.redistill.zarr').id}"


def test_a_card_is_written_again_with_the_same_bytes(shared: Path, tmp_path: Path):
    before = contents(shared / "card")
    write_cards(shared / "a.redistill.zarr", shared / "card")
    assert contents(shared / "card") == before
    shutil.copytree(shared / "a.redistill", tmp_path / "b")
    (tmp_path / "b/README.md").write_text((tmp_path / "b/README.md").read_text() + "changed")
    write_cards(tmp_path / "b", tmp_path / "b", address="hf://datasets/org/a")
    assert contents(tmp_path / "b") == contents(shared / "a.redistill")
    assert verify(shared / "a.redistill.zarr", full=True).ok


def test_an_interrupted_command_is_repeated_and_leaves_nothing_behind(shared: Path, tmp_path: Path):
    """Files appear one after another, each whole: these are all states that a killed command leaves."""
    files = write_cards(shared / "a.redistill.zarr", tmp_path / "card")
    whole = contents(tmp_path / "card")
    for last, file in enumerate(files):
        file.rename(file.with_name(f"{file.name}.{'0' * 32}.partial"))
        for later in files[last + 1 :]:
            later.unlink()
        assert write_cards(shared / "a.redistill.zarr", tmp_path / "card") == files
        assert contents(tmp_path / "card") == whole


def test_a_packed_archive_is_not_unpacked_for_its_card(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_cards(shared / "a.redistill", tmp_path / "card")
    assert missing_for_publishing(shared / "a.redistill") == []
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    assert {path.name for path in tmp_path.iterdir()} <= {"card", "cache"}
    description = (tmp_path / "card/README.md").read_text().replace("ADDRESS", "hf://datasets/org/a")
    assert description == (shared / "a.redistill/README.md").read_text()


HOSTILE = (
    "<script>x</script> ![i](http://e.org/i) [l](javascript:1) **b** `c` | # h {{ 7 * 7 }} &amp; http://e.org "
    "www.e.org \n---\nlicense: mit\n- x: \"y' \\ \x1b[31m \u202e é"
)


def hostile(start: str) -> str:
    return f"{start}{HOSTILE}"


def test_text_of_strangers_means_nothing(tmp_path: Path):
    spec = replace(
        SMALL,
        class_names=tuple(hostile(f"=cmd|{k}") for k in range(tiny_archive.CLASSES)),
        recipe={"ops": [{"op": hostile("op")}]},
        licence=hostile("licence"),
        citation=hostile("- citation"),
        data_source=hostile("#source"),
        data_licence=hostile("data"),
        teacher_licence=hostile("weights"),
    )
    writer = ArchiveWriter.create(tmp_path / "a", spec)
    samples = tiny_archive.samples(spec)
    samples["keys"] = [f"{'=+-@'[i % 4]}{i:02d}{HOSTILE}" for i in range(spec.num_samples)]
    writer.write_samples(**samples)
    writer.add_teacher(replace(tiny_archive.TEACHER, model={"spec": hostile("net"), "weights_digest": hostile("d")}))
    tiny_archive.fill(writer)
    writer.seal()
    write_cards(tmp_path / "a", tmp_path / "card")

    readme = (tmp_path / "card/README.md").read_text()
    matter = front_matter(readme)
    assert matter["license"] == "other"
    assert set(matter) - {"license_name"} == {
        *("pretty_name", "license", "source_datasets", "task_categories", "size_categories", "tags", "viewer")
    }
    html = rendered(readme)
    tags = set(re.findall(r"<(\w+)", html))
    assert tags == {*("h1", "h2", "p", "code", "pre", "ul", "li"), *("table", "thead", "tbody", "tr", "th", "td")}
    shown = re.sub(r"\s+", " ", HOSTILE).replace("\x1b", "\\x1b").replace("\u202e", "\\x202e")
    text = text_of(html)
    for start_ in ("op", "licence", "- citation", "#source", "data", "weights", "net", "d"):
        assert f"{start_}{shown}" in text, start_
    assert not re.search(r"(?<!\\)www\.|https?:/", readme.split("---\n", 2)[2].replace("https://pypi.org", ""))

    cited = yaml.safe_load((tmp_path / "card/CITATION.cff").read_text())
    assert cited["message"] == f"Cite this archive as: - citation{shown}"
    assert "license" not in cited
    document = json.loads((tmp_path / "card/croissant.json").read_bytes())
    assert "\x1b" not in json.dumps(document, ensure_ascii=False)
    assert not mlcroissant.Dataset(str(tmp_path / "card/croissant.json")).metadata.ctx.issues.errors
    with (tmp_path / "card/preview.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r"]
    assert sum(cell.startswith("'=cmd|") for cell in cells) == 100


def test_what_no_card_is_written_of_or_over(shared: Path, tmp_path: Path):
    archive = shared / "a.redistill.zarr"
    for folder in (archive, archive / "card"):
        with pytest.raises(Refused, match="is in an archive"):
            write_cards(archive, folder)
    assert verify(archive, full=True).ok
    for name in ("README.md", "CITATION.cff"):
        mine = tmp_path / name
        mine.write_text("my own")
        with pytest.raises(Refused, match=f"{name} exists and is not from a card"):
            write_cards(archive, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        mine.unlink()
    fetch_archive(str(shared / "a.redistill"), tmp_path / "copy", views=1)
    with pytest.raises(Refused, match="writing its card is not possible"):
        write_cards(tmp_path / "copy", tmp_path / "c")
    start(tmp_path / "unfinished", SMALL)
    with pytest.raises(Incomplete):
        write_cards(tmp_path / "unfinished", tmp_path / "c")
    make(tmp_path / "other", SMALL)
    pack(tmp_path / "other", tmp_path / "packed")
    with pytest.raises(Refused, match="packed form of another archive"):
        write_cards(archive, tmp_path / "packed")
    with (tmp_path / "packed/view-0000.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(Refused, match=r"view-0000.tar has \d+ bytes, expected"):
        write_cards(tmp_path / "other", tmp_path / "packed")


def test_the_command(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def card(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["redistill", "archive", "card", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), *capsys.readouterr()

    files = "README.md, croissant.json, CITATION.cff, preview.csv"
    archive = shared / "a.redistill.zarr"
    assert card(archive, tmp_path / "card") == (0, f"{tmp_path / 'card'}: {files}\n", "")
    assert contents(tmp_path / "card") == contents(shared / "card")
    assert card(archive) == (0, f"{shared / 'a.card'}: {files}\n", "")
    shutil.copytree(shared / "a.redistill", tmp_path / "p")
    assert card(tmp_path / "p") == (0, f"{tmp_path / 'p'}: {files}\n", "")
    code, out, err = card(archive, archive)
    assert (code, out, err.count("\n")) == (3, "", 1)
    make(tmp_path / "bare", replace(SMALL, licence="", citation=""))
    code, out, _ = card(tmp_path / "bare", tmp_path / "c")
    assert code == 0
    assert "missing licence, source of the images, citation; redistill archive edit" in out


def test_archives_without_logits_terms_or_class_names_have_cards_too(tmp_path: Path):
    spec = replace(SMALL, licence="", citation="", class_names=None)
    teacher = replace(tiny_archive.TEACHER, signals=tiny_archive.TEACHER.signals[1:])
    writer = ArchiveWriter.create(tmp_path / "a", spec)
    writer.write_samples(**tiny_archive.samples(spec))
    writer.add_teacher(teacher)
    tiny_archive.fill(writer, ("views", "canaries"))
    for block in writer.missing("teachers/tiny"):
        arrays, stats = tiny_archive.block_data(block, spec)
        features = {name: array for name, array in arrays.items() if name.startswith("layer4.1/")}
        writer.write(block, features, {"layer4.1": stats["layer4.1"]})
    writer.seal()
    write_cards(tmp_path / "a", tmp_path / "card")
    readme = (tmp_path / "card/README.md").read_text()
    assert front_matter(readme)["license_name"] == "not stated"
    assert "source_datasets" not in front_matter(readme)
    assert (tmp_path / "card/preview.csv").read_text().splitlines()[0] == "key,label"
    assert not mlcroissant.Dataset(str(tmp_path / "card/croissant.json")).metadata.ctx.issues.errors


def test_cards_and_signatures_load_no_torch():
    code = "import sys, redistill.sharing.cards, redistill.sharing.signing; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "redistill.sharing.cards" in loaded
    assert not {"torch", "model_signing"} & set(loaded)


def test_licences_of_the_hub():
    for licence in ("cc-by-4.0", "cc-by-nc-sa-3.0", "mit", "cc0-1.0"):
        assert HUB_LICENCES.fullmatch(licence), licence
    for licence in ("cc-by-nd-3.0", "LicenseRef-x", "", "mit or cc0-1.0"):
        assert not HUB_LICENCES.fullmatch(licence), licence
