"""One value of a specification is replaced and everything else adapted: accepted or refused, never another error.

Documents that the parser accepts are forged completely (metadata, records, manifest), so that the layers below see
chunk sizes, shapes, widths and codecs that do not match the data.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.forge import MANIFEST, documents, forge
from tests.attacks.measure import run_entry_point
from tests.faults.scenario import write_archive

VALUES: list[object] = [
    None, True, -1, 0, 1, 2, 7, 8, 16, 255, 2**16, 2**31, 2**63, 0.5, -0.0, 1e308,
    "", "a", "..", "a/b", "q", "float16", "float32", "uint8", "int64", "linear", "topk", "logits", "x" * 5000, "\u202e",
    [], [1], [0], [7, 7], [2**40], [[]], {}, {"a": 1}, [{}],
]  # fmt: skip

JsonPath = tuple[str | int, ...]


def json_paths(value: object, at: JsonPath = ()) -> Iterator[JsonPath]:
    """The path of every value inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from json_paths(item, (*at, key))


def replaced(document: Any, place: JsonPath, value: object) -> Any:
    document = copy.deepcopy(document)
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return document


def removed(document: Any, place: JsonPath) -> Any:
    document = copy.deepcopy(document)
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    del holder[place[-1]]
    return document


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "a.redistill.zarr"
    write_archive(path)
    return path


def check(honest: Path, path: Path, root: Any, teachers: Any) -> set[str]:
    """The results of three entry points, sealed and unsealed; errors other than RedistillError are raised."""
    shutil.copytree(honest, path)
    forge(path, root, teachers)
    results = {run_entry_point(path, entry_point) for entry_point in ("open", "verify")}
    (path / MANIFEST).unlink()
    results.add(run_entry_point(path, "open partial"))
    shutil.rmtree(path)
    for result in results:
        assert result.isprintable(), result
        assert len(result) < 1000, result
    return results


def replace_values(honest: Path, folder: Path, share: float) -> None:
    seed = int(os.environ.get("REDISTILL_SEED", "20261121"))
    print(f"replay with REDISTILL_SEED={seed}")
    rng = random.Random(seed)
    root, teachers = documents(honest)
    both = {"root": root, "teacher": teachers["net"]}
    accepted = tried = 0
    for place in json_paths(both):
        if len(place) < 2:
            continue
        for value in [*VALUES, KeyError]:
            if rng.random() >= share:
                continue
            changed = removed(both, place) if value is KeyError else replaced(both, place, value)
            print(place, value if value is KeyError else ascii(value)[:40])
            tried += 1
            accepted += "accepted" in check(
                honest, folder / "a.redistill.zarr", changed["root"], {"net": changed["teacher"]}
            )
    assert tried > 50
    assert accepted < tried / 2


def test_one_value_replaced(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replace_values(honest, tmp_path, 0.015)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_values_replaced(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replace_values(honest, tmp_path, 0.4)
