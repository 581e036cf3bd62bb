"""Builders of hostile archives. Each takes a finished, honest archive and spoils it the way somebody might.

The attacker is a good one: where a hash stands in the way, `reseal` makes records and manifest fit the lie.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.zstd
from redistill_cache.journal import FileEntry, Manifest, parse_manifest, sha256

from tests.faults.scenario import SAMPLES

MANIFEST = "_redistill/manifest.json"


def reseal(path: Path, **changes: object) -> None:
    """A manifest that fits the files as they are now."""
    manifest = parse_manifest((path / MANIFEST).read_bytes(), "attack")
    files = {}
    for name in manifest.files:
        if (path / name).is_file():
            data = (path / name).read_bytes()
            files[name] = FileEntry(len(data), sha256(data))
    values: dict[str, Any] = {
        "identity": manifest.identity,
        "views": manifest.views,
        "teachers": manifest.teachers,
        "files": files,
    }
    (path / MANIFEST).write_bytes(Manifest(**values | changes).to_bytes())


def edit_root(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((path / "zarr.json").read_bytes())
    change(document["attributes"]["redistill"])
    (path / "zarr.json").write_text(json.dumps(document))
    reseal(path)


def replace_in(path: Path, name: str, old: bytes, new: bytes) -> None:
    data = (path / name).read_bytes()
    assert old in data
    (path / name).write_bytes(data.replace(old, new, 1))
    reseal(path)


def zstd_bomb(path: Path) -> None:
    """A chunk that decompresses to a gigabyte of zeros, with an index, hashes and manifest that fit."""
    shard = path / "teachers/net/logits/level/c.1.0"
    bomb = bytes(numcodecs.zstd.compress(bytes(1 << 30), 1))
    index = len(bomb).to_bytes(8, "little")
    entries = (0).to_bytes(8, "little") + index
    shard.write_bytes(bomb + entries + google_crc32c.value(entries).to_bytes(4, "little"))
    reseal(path)


def many_chunks(path: Path) -> None:
    """300,000 chunks in one array's own metadata, which an honest reader never needs."""
    metadata = path / "teachers/net/logits/level/zarr.json"
    document = json.loads(metadata.read_bytes())
    document["shape"] = [2, 300_000 * 16]
    metadata.write_text(json.dumps(document))
    reseal(path)


def unknown_codec(path: Path) -> None:
    metadata = path / "teachers/net/logits/q/zarr.json"
    document = json.loads(metadata.read_bytes())
    document["codecs"] = [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]
    metadata.write_text(json.dumps(document))
    reseal(path)


def link_file(path: Path) -> None:
    shard = path / "views/flip/c.0.0"
    shard.rename(path.parent / "elsewhere")
    shard.symlink_to(path.parent / "elsewhere")


def link_folder(path: Path) -> None:
    (path / "views").rename(path.parent / "views-elsewhere")
    (path / "views").symlink_to(path.parent / "views-elsewhere")


def pipe(path: Path, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)


def set_field(name: str, value: object) -> Callable[[Path], None]:
    return lambda path: edit_root(path, lambda spec: spec.update({name: value}))


def path_outside(path: Path) -> None:
    data = (path / MANIFEST).read_bytes().replace(b'"views/flip/c.0.0"', b'"views/../../etc/pw"', 1)
    body = data[: -len(b'],"sha256":"') - 64 - len(b'"}\n')]
    (path / MANIFEST).write_bytes(body + b'],"sha256":"' + sha256(body).encode() + b'"}\n')


def second_teacher(path: Path) -> None:
    """A teacher whose name leads out of the archive."""
    manifest = parse_manifest((path / MANIFEST).read_bytes(), "attack")
    reseal(path, teachers=dict(manifest.teachers) | {"../../evil": {}})


ATTACKS: dict[str, Callable[[Path], None]] = {
    "zstd bomb": zstd_bomb,
    "terabyte of samples": set_field("num_samples", 2**40),
    "four billion samples": set_field("num_samples", 2**32 - 1),
    "most views": set_field("num_views", 65_535),
    "negative samples": set_field("num_samples", -SAMPLES),
    "overflowing number": set_field("num_samples", 2**64 + SAMPLES),
    "fractional samples": set_field("num_samples", SAMPLES + 0.5),
    "samples as true": set_field("num_samples", True),
    "huge block": set_field("block_rows", 2**60),
    "tiny blocks of many samples": lambda path: edit_root(
        path, lambda spec: spec.update({"num_samples": 10**9, "block_rows": 1, "num_views": 60_000})
    ),
    "huge row": lambda path: edit_root(path, lambda spec: spec["view_arrays"][0].update({"row_shape": [2**31, 2**31]})),
    "object dtype": lambda path: edit_root(path, lambda spec: spec["view_arrays"][0].update({"dtype": "object"})),
    "array named ..": lambda path: edit_root(path, lambda spec: spec["view_arrays"][0].update({"name": "../../x"})),
    "300,000 chunks": many_chunks,
    "pickle codec": unknown_codec,
    "newer format": set_field("version", "2.0"),
    "duplicate key": lambda path: replace_in(path, "zarr.json", b'"seed":0', b'"seed":0,"seed":1'),
    "not a number": lambda path: replace_in(path, "zarr.json", b'"seed":0', b'"seed":NaN'),
    "infinite number": lambda path: replace_in(path, "zarr.json", b'"seed":0', b'"seed":1e999'),
    "number of a million digits": lambda path: replace_in(
        path, "zarr.json", b'"seed":0', b'"seed":' + b"9" * 1_000_000
    ),
    "deep nesting": lambda path: (path / "zarr.json").write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "huge metadata": lambda path: (path / "zarr.json").write_bytes(b'{"a":"' + b"x" * (64 << 20) + b'"}'),
    "huge manifest": lambda path: (path / MANIFEST).write_bytes(b"[" * (70 << 20)),
    "bytes that are no text": lambda path: (path / "zarr.json").write_bytes(b'{"attributes":"\xff\xfe"}'),
    "link to a file": link_file,
    "link to a folder": link_folder,
    "pipe for metadata": lambda path: pipe(path, "zarr.json"),
    "pipe for the manifest": lambda path: pipe(path, MANIFEST),
    "pipe for a shard": lambda path: pipe(path, "views/flip/c.0.0"),
    "path out of the archive": path_outside,
    "teacher out of the archive": second_teacher,
}
