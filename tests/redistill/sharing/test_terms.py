"""What an archive must state to be published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from redistill_cache.errors import UsageError
from redistill_cache.packing import pack

from redistill.caching import CacheOptions
from redistill.sharing.terms import checked_terms, data_source, missing_for_publishing, publishing_advice, spdx
from tests.tiny_archive import SPEC, make

SMALL = replace(SPEC, num_views=1, block_rows=64)


def test_licences_are_spdx_expressions_in_their_canonical_form():
    given = {
        "licence": "cc-by-4.0",
        "data_licence": "LicenseRef-ImageNet",
        "teacher_licence": "mit or (apache-2.0 with llvm-exception)",
        "citation": "any text (2026)",
    }
    assert checked_terms(given) == {
        "licence": "CC-BY-4.0",
        "data_licence": "LicenseRef-ImageNet",
        "teacher_licence": "MIT OR (Apache-2.0 WITH LLVM-exception)",
        "citation": "any text (2026)",
    }
    options = CacheOptions(data="synthetic", teacher="demo:tiny", out=Path("a"), **given)
    assert (options.licence, options.teacher_licence) == ("CC-BY-4.0", "MIT OR (Apache-2.0 WITH LLVM-exception)")
    assert checked_terms({"licence": ""}) == {"licence": ""}, "no licence is stated"


@pytest.mark.parametrize("text", ["ImageNet terms", "MIT AND", "LicenseRef-", " ", "MIT\x1b", "(" * 3000, "CC-BY-9.0"])
@pytest.mark.parametrize("name", ["licence", "data_licence", "teacher_licence"])
def test_another_text_is_refused_by_name(name: str, text: str):
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UsageError, match=f"{flag} must be an SPDX expression") as error:
        CacheOptions(data="synthetic", teacher="demo:tiny", out=Path("a"), **{name: text})
    assert "\n" not in str(error.value)
    assert "LicenseRef-NAME" in str(error.value)
    assert len(str(error.value)) < 400
    assert spdx(text) is None


def test_what_is_missing_and_the_command_that_states_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = replace(SMALL, data_source="Glyphs 1")
    bare = replace(SMALL, licence="", citation="", source={})
    cases = {
        "full": (full, []),
        "named": (replace(SMALL, source={"kind": "cifar100"}), []),
        "free text": (replace(full, licence="ask me"), ["licence"]),
        "bare": (bare, ["licence", "source of the images", "citation"]),
        "odd": (replace(full, data_source="", source={"kind": ["cifar100"]}), ["source of the images"]),
    }
    for name, (spec, missing) in cases.items():
        make(tmp_path / name, spec)
        assert missing_for_publishing(tmp_path / name) == missing, name
    pack(tmp_path / "bare", tmp_path / "packed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert missing_for_publishing(tmp_path / "packed") == cases["bare"][1]
    assert publishing_advice(tmp_path / "packed", ["citation"]) == (
        "missing citation; redistill archive edit ARCHIVE --citation TEXT, the one that was packed, and pack it again"
    )
    assert not list((tmp_path / "cache").rglob("manifest.json")), "it is not unpacked"
    assert "CIFAR-100" in data_source(cases["named"][0])
    assert publishing_advice(tmp_path / "free text", ["licence", "citation"]) == (
        f"missing licence, citation; redistill archive edit '{tmp_path}/free text' --licence SPDX --citation TEXT"
    )
