"""Hostile archives: each attack changes a finished, honest archive."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numcodecs import zstd
from redistill_cache import layout

from tests.attacks.builders import (
    LEVEL,
    Attack,
    array_field,
    billion_samples,
    canary_row,
    chunk,
    copied_record,
    extra_file,
    field,
    file_for_folder,
    first_view_array,
    flags,
    index,
    instead,
    key_bomb,
    lines,
    link,
    listening,
    many_arrays,
    many_lines,
    many_records,
    metadata_field,
    nested,
    other_samples,
    record,
    seed,
    side_bomb,
    signal_field,
    statistics,
    teachers_named,
    text_of,
    unsealed,
    whole_text,
    zstd_bomb,
)
from tests.attacks.forge import MANIFEST, edit, edit_teacher, reseal
from tests.faults.scenario import CLASSES, SAMPLES

__all__ = ["ATTACKS", "PARTIAL_ATTACKS", "REASONS"]

DOCUMENTS: dict[str, Attack] = {
    "terabyte of samples": field("num_samples", 2**40),
    "four billion samples": field("num_samples", 2**32 - 1),
    "a billion samples, otherwise valid": billion_samples,
    "one sample more than there are digests": field("num_samples", SAMPLES + 1),
    "most views": field("num_views", 65_535),
    "negative samples": field("num_samples", -SAMPLES),
    "overflowing number": field("num_samples", 2**64 + SAMPLES),
    "fractional samples": field("num_samples", SAMPLES + 0.5),
    "samples as true": field("num_samples", True),
    "huge block": field("block_rows", 2**60),
    "sixteen million chunks": lambda path: edit(
        path, lambda root: (root.update({"block_rows": 2**24}), root["view_arrays"][0].update({"chunk_rows": 1}))
    ),
    "tiny blocks of many samples": lambda path: edit(
        path, lambda root: root.update({"num_samples": 10**9, "block_rows": 1, "num_views": 60_000})
    ),
    "huge row": first_view_array(row_shape=[2**31, 2**31]),
    "parameters of a mebibyte": first_view_array(row_shape=[2**20], dtype="uint8"),
    "object dtype": first_view_array(dtype="object"),
    "dtype of names": first_view_array(dtype="U8"),
    "array named ..": first_view_array(name="../../x"),
    "array named in capitals": first_view_array(name="Crop"),
    "array named like a sibling": first_view_array(name="flip"),
    "chunk size of none": first_view_array(chunk_rows=None),
    "chunk size of zero": first_view_array(chunk_rows=0),
    "newer format": field("version", "2.0"),
    "version of a million digits": field("version", "1." + "9" * 1_000_000),
    "half a surrogate pair": text_of("zarr.json", b'"class-0"', b'"\\ud800"'),
    "duplicate key": seed(b'0,"seed":1'),
    "not a number": seed(b"NaN"),
    "minus infinity": seed(b"-Infinity"),
    "infinite number": seed(b"1e999"),
    "number of a million digits": seed(b"9" * 1_000_000),
    "number with a million leading zeros": seed(b"0." + b"0" * 1_000_000 + b"1"),
    "deep nesting": whole_text("zarr.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep recipe": field("recipe", nested(500)),
    "slightly too deep recipe": field("recipe", nested(20)),
    "a million empty objects": whole_text("zarr.json", b'{"attributes":[' + b"{}," * 1_300_000 + b"{}]}"),
    "a million empty objects in the recipe": field("recipe", {"ops": [{}] * 1_000_000}),
    "a million numbers": whole_text("zarr.json", b"[" + b"0," * 2_000_000 + b"0]"),
    "a string without an end": whole_text("zarr.json", b'{"a":"' + b'\\"' * 2_000_000),
    "half a megabyte of recipe": field("recipe", {"note": "x" * 500_000}),
    "half a megabyte of provenance": field("environment", {"note": "x" * 500_000}),
    "a million class names": lambda path: edit(
        path, lambda root: root.update({"num_classes": 10**6, "class_names": ["a"] * 10**6})
    ),
    "sixty thousand excluded": field("excluded", [{"key": "k", "reason": "r"}] * 60_000),
    "class names of other classes": field("class_names", ["a"]),
    "almost too many values": field("recipe", {"ops": [{}] * 120_000}),
    "huge metadata": whole_text("zarr.json", b'{"a":"' + b"x" * (64 << 20) + b'"}'),
    "bytes that are not UTF-8": whole_text("zarr.json", b'{"attributes":"\xff\xfe"}'),
    "a byte order mark": text_of("zarr.json", b"{", b"\xef\xbb\xbf{"),
    "something after the end": lambda path: (
        (path / "zarr.json").write_bytes((path / "zarr.json").read_bytes() + b" {}"),
        reseal(path),
    ),
    "300,000 chunks": metadata_field(LEVEL, shape=[2, 300_000 * 16]),
    "pickle codec": metadata_field(
        "teachers/net/logits/q", codecs=[{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]
    ),
    "remote chunks": metadata_field(
        LEVEL, storage_transformers=[{"name": "http", "configuration": {"url": "http://x"}}]
    ),
    "unknown codec": signal_field(lambda signal: signal.update(codec="python:os.system")),
    "codec with another width": signal_field(lambda signal: signal["config"].update(bytes=10**9)),
    "codec with a number as text": signal_field(lambda signal: signal["config"].update(rank="7")),
    "codec with wider rows": array_field("q", row_shape=[4096]),
    "codec with other numbers": array_field("level", dtype="float64"),
    "codec with an array too many": signal_field(
        lambda signal: signal["arrays"].append(signal["arrays"][0] | {"name": "z"})
    ),
    "logits of other classes": signal_field(lambda signal: signal.update(width=CLASSES - 1)),
    "signal out of the archive": signal_field(lambda signal: signal.update(name="../../x")),
    "signal between dots": signal_field(lambda signal: signal.update(name="a..b")),
    "teacher without signals": lambda path: edit_teacher(path, lambda value: value.update(signals=[])),
    "teacher of another name": text_of("teachers/net/zarr.json", b'"name":"net","sig', b'"name":"ten","sig'),
    "thousands of arrays": many_arrays,
}

FILES: dict[str, Attack] = {
    "huge manifest": whole_text(MANIFEST, b"[" * (70 << 20)),
    "manifest of 300,000 files": many_lines(300_000 - 100),
    "manifest of 400,000 files": many_lines(400_000),
    "manifest names a file twice": lines(lambda old: sorted([*old, old[3]])),
    "manifest out of order": lines(lambda old: old[::-1]),
    "manifest lacks a file": lines(lambda old: old[:-1]),
    "manifest without files": lines(lambda old: []),
    "path out of the archive": lines(
        lambda old: [line.replace(b"views/flip/c.0.0", b"views/../../etc") for line in old]
    ),
    "path from the root": lines(lambda old: [line.replace(b"views/flip/c.0.0", b"/etc/passwd") for line in old]),
    "path in capitals": lines(lambda old: [line.replace(b"views/flip/c.0.0", b"views/flip/C.0.0") for line in old]),
    "size of a petabyte": lines(lambda old: [old[0].replace(b",", b",9", 1), *old[1:]]),
    "teacher out of the archive": teachers_named("../../evil"),
    "teacher of another archive": teachers_named("second"),
    "teacher in capitals": teachers_named("NET"),
    "statistics of another kind": statistics({"rows": "many"}),
    "statistics with a negative maximum": statistics(
        {"rows": 1, "exact_rows": 0, "top1_kept": 0, "errors": {"kl_t1": {"sum": 1e308, "max": -1, "histogram": []}}}
    ),
    "views that do not exist": lambda path: reseal(path, views=3),
    "zstd bomb": zstd_bomb,
    "small zstd bomb": chunk(lambda frame: bytes(zstd.Zstd(level=3, checksum=True).encode(bytes(1 << 24)))),
    "frame without a size": chunk(lambda frame: frame[:4] + bytes([frame[4] & 0b00011111]) + frame[5:]),
    "frame without a checksum": chunk(lambda frame: bytes(zstd.compress(bytes(8), 3))),
    "frame that states too little": chunk(lambda frame: bytes(zstd.Zstd(level=3, checksum=True).encode(bytes(7)))),
    "frame that holds less than it states": chunk(
        lambda frame: frame[:5] + bytes([8]) + bytes(zstd.Zstd(level=3, checksum=True).encode(bytes(7)))[6:]
    ),
    "frame with a dictionary": chunk(lambda frame: frame[:4] + bytes([frame[4] | 1]) + b"\x01" + frame[5:]),
    "frame that is text": chunk(lambda frame: b"zstd frame"),
    "two frames in a chunk": chunk(lambda frame: frame * 2),
    "empty chunk": chunk(lambda frame: b""),
    "chunk larger than what it holds": chunk(
        lambda frame: frame + b"\x50\x2a\x4d\x18" + (1 << 20).to_bytes(4, "little") + bytes(1 << 20)
    ),
    "overlapping chunks": index(lambda entries: entries.__setitem__((1, 0), 0)),
    "chunk beyond the file": index(lambda entries: entries.__setitem__((1, 1), 2**40)),
    "chunk at the largest offset": index(lambda entries: entries.__setitem__((1, 0), 2**64 - 16)),
    "absent chunk": index(lambda entries: entries.__setitem__(1, 2**64 - 1)),
    "chunks in another order": index(lambda entries: entries.__setitem__(slice(None), entries[::-1].copy())),
    "key bomb": key_bomb(400 << 20),
    "key bomb for many samples": key_bomb(400 << 20, samples=120_000),
    "side data bomb": side_bomb,
    "labels of a missing class": other_samples("label", np.full(SAMPLES, CLASSES)),
    "labels below none": other_samples("label", np.full(SAMPLES, -2)),
    "key offsets that fall": other_samples("key_offsets", np.arange(SAMPLES + 1, dtype=np.uint64)[::-1].copy()),
    "key offsets beyond all data": other_samples("key_offsets", np.full(SAMPLES + 1, 2**64 - 1, np.uint64)),
    "canary of a missing sample": canary_row,
    "exact rows without data": flags,
    "link to a file": link("views/flip/c.0.0"),
    "link to a folder": link("views"),
    "link to the journal": link("_redistill"),
    "link to the teachers": link("teachers"),
    "pipe for metadata": instead("zarr.json", os.mkfifo),
    "pipe for the manifest": instead(MANIFEST, os.mkfifo),
    "pipe for a shard": instead("views/flip/c.0.0", os.mkfifo),
    "pipe for a teacher": instead("teachers/net/zarr.json", os.mkfifo),
    "socket for a shard": instead("views/flip/c.0.0", listening),
    "folder for a shard": instead("views/flip/c.0.0", Path.mkdir),
    "folder for the manifest": instead(MANIFEST, Path.mkdir),
    "file for a folder": file_for_folder,
    "name that controls a terminal": extra_file("views/\x1b]0;owned\x07"),
    "name of two lines": extra_file("views/a\nb"),
    "name that is not UTF-8": extra_file(os.fsdecode(b"views/\xff\xfe")),
    "a deep folder": extra_file("/".join(["views", *["d"] * 500, "x"])),
}
ATTACKS = DOCUMENTS | FILES

PARTIAL_ATTACKS: dict[str, Attack] = {
    "record without files": record("views.0.0", lambda value: value.update(files=[])),
    "record of other files": record("views.0.0", lambda value: value["files"].append(["zarr.json", 1, "0" * 64])),
    "record with a file out of the archive": record(
        "views.0.0", lambda value: value["files"][0].__setitem__(0, "views/../../x")
    ),
    "record of another block": copied_record("views.0.0", "views.0.1"),
    "record of another teacher": copied_record("views.0.0", "teachers.net.0.0"),
    "record of more rows": record("views.0.1", lambda value: value.update(rows=[16, 32])),
    "record with a negative size": record("views.0.0", lambda value: value["files"][0].__setitem__(1, -1)),
    "record with deep statistics": record("views.0.0", lambda value: value.update(stats=nested(200))),
    "many records": many_records,
    "a teacher with an invalid name": extra_file("teachers/Evil Name/zarr.json"),
    "pipe for a record": instead(f"{layout.BLOCKS}/views.0.0.json", os.mkfifo),
    "link among the records": link(f"{layout.BLOCKS}/views.0.0.json"),
    "link to the views": link("views"),
    "more samples than digests": billion_samples,
    "side data bomb, unsealed": side_bomb,
    "codec with wider rows, unsealed": DOCUMENTS["codec with wider rows"],
}
PARTIAL_ATTACKS = {f"unsealed: {name}": unsealed(attack) for name, attack in PARTIAL_ATTACKS.items()}

# Text that the error must contain, so that no other check hides that the intended one is missing.
REASONS = {
    "a billion samples, otherwise valid": "digests of 1000000000 samples",
    "one sample more than there are digests": "digests of 22 samples",
    "sixteen million chunks": "at most 65536 chunks",
    "parameters of a mebibyte": "at most 4096 bytes per view",
    "deep recipe": "nested",
    "slightly too deep recipe": "nested",
    "a million empty objects": "values, more than the limit",
    "a million class names": "values, the limit",
    "a string without an end": "values, the limit",
    "sixty thousand excluded": "at most 20000 items",
    "half a megabyte of recipe": "at most 65536 bytes",
    "almost too many values": "at most 65536 bytes",
    "codec with wider rows": "the arrays of its codec",
    "codec with other numbers": "the arrays of its codec",
    "logits of other classes": "the number of classes",
    "thousands of arrays": "arrays, more than the limit",
    "manifest of 300,000 files": "its specification allows at most",
    "manifest names a file twice": "not sorted",
    "path out of the archive": "out of the archive",
    "teacher out of the archive": "invalid name",
    "zstd bomb": "it decodes to",
    "small zstd bomb": "states 16777216 bytes",
    "frame without a size": "does not state its size",
    "frame without a checksum": "has no checksum",
    "frame that states too little": "states 7 bytes",
    "frame that holds less than it states": "does not decompress",
    "frame with a dictionary": "dictionary",
    "frame that is text": "not a zstd frame",
    "two frames in a chunk": "does not decompress",
    "empty chunk": "not a zstd frame",
    "chunk larger than what it holds": "it decodes to",
    "overlapping chunks": "back to back",
    "chunk beyond the file": "back to back",
    "chunk at the largest offset": "back to back",
    "absent chunk": "back to back",
    "chunks in another order": "back to back",
    "key bomb": "keys of 21 samples",
    "key bomb for many samples": "keys of 120000 samples",
    "side data bomb": "side data of signal",
    "canary of a missing sample": "canary",
    "labels of a missing class": "labels",
    "name of two lines": "is not a valid file name",
    "a deep folder": "is not a valid file name",
    "unsealed: record without files": "does not list the files",
    "unsealed: record of other files": "does not list the files",
    "unsealed: more samples than digests": "digests of 1000000000 samples",
    "unsealed: side data bomb, unsealed": "side data of signal",
}
