"""A small archive with one of everything, a function of its seed: several views, canaries, a teacher, a short block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from redistill_cache.codecs import open_codec
from redistill_cache.codecs.stats import BlockStats
from redistill_cache.layout import Block
from redistill_cache.spec import ArchiveSpec, ArraySpec, SignalSpec, TeacherSpec
from redistill_cache.storage import LOCAL, Files
from redistill_cache.writer import ArchiveWriter

CLASSES = 6
SPEC = ArchiveSpec(
    num_samples=50,
    num_views=3,
    num_classes=CLASSES,
    class_names=("ant", "bee", "cat", "dog", "eel", "fóx"),
    block_rows=16,
    recipe={"version": 1, "ops": [{"op": "crop", "size": 32}]},
    seed=7,
    view_arrays=(
        ArraySpec("crop", "int32", (4,), chunk_rows=8, transpose=True),
        ArraySpec("flip", "uint8", chunk_rows=16),
    ),
    canaries_per_view=2,
    source={"description": "synthetic"},
    excluded=({"key": "bad.png", "reason": "truncated"},),
    licence="CC-BY-4.0",
    citation="Nobody (2026)",
    environment={"zarr": "3"},
)
FEATURES = 4
# A codec with a sparse array (a few rows of logits need it), and one that keeps every bit.
CODECS = {
    "logits": open_codec("float16", CLASSES, {"metric": "kl", "fidelity": 3e-8, "keep_shift": True}, {}),
    "layer4.1": open_codec("float32", FEATURES, {"metric": "relative"}, {}),
}
TEACHER = TeacherSpec(
    "tiny",
    tuple(SignalSpec.of(name, codec) for name, codec in CODECS.items()),
    model={"name": "demo:tiny", "weights": "0" * 64},
)
PARTS = ("views", "canaries", "teachers/tiny")


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))


def samples(spec: ArchiveSpec = SPEC) -> dict[str, Any]:
    draw = generator("samples")
    n = spec.num_samples
    return {
        "keys": [f"class/{i:05d}.png" for i in range(n)],
        "labels": draw.integers(0, spec.num_classes, n),
        "digests": draw.integers(0, 256, (n, 32), dtype=np.uint8),
        "sizes": draw.integers(32, 500, (n, 2), dtype=np.uint32),
    }


def logits(view: int, spec: ArchiveSpec = SPEC, teacher: str = "tiny") -> np.ndarray:
    """The teacher's logits of all rows of a view."""
    return generator("logits", teacher, view).normal(0, 3, (spec.num_samples, CLASSES)).astype(np.float32)


def features(view: int, spec: ArchiveSpec = SPEC, teacher: str = "tiny") -> np.ndarray:
    return generator("features", teacher, view).normal(0, 1, (spec.num_samples, FEATURES)).astype(np.float32)


def signals(view: int, spec: ArchiveSpec = SPEC, teacher: str = "tiny") -> dict[str, np.ndarray]:
    return {"logits": logits(view, spec, teacher), "layer4.1": features(view, spec, teacher)}


def stored_logits(view: int, spec: ArchiveSpec = SPEC, teacher: str = "tiny") -> np.ndarray:
    """The logits as the archive returns them."""
    codec = CODECS["logits"]
    return np.asarray(codec.decode(codec.encode(logits(view, spec, teacher)).arrays))


def view_params(view: int, spec: ArchiveSpec = SPEC) -> dict[str, np.ndarray]:
    draw = generator("views", view)
    return {
        "crop": draw.integers(0, 400, (spec.num_samples, 4), dtype=np.int32),
        "flip": draw.integers(0, 2, spec.num_samples, dtype=np.uint8),
    }


def canaries(view: int, spec: ArchiveSpec = SPEC) -> dict[str, np.ndarray]:
    draw = generator("canaries", view)
    count = spec.canaries_per_view
    return {
        "row": np.sort(draw.choice(spec.num_samples, count, replace=False)).astype(np.uint32),
        "pixels": draw.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8),
    }


def block_data(block: Block, spec: ArchiveSpec = SPEC) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """The arrays of a block, and its statistics."""
    rows = slice(block.start, block.stop)
    if block.part == "views":
        return {name: array[rows] for name, array in view_params(block.view, spec).items()}, None
    if block.part == "canaries":
        return canaries(block.view, spec), None
    name = block.part.removeprefix("teachers/")
    rows_of = signals(block.view, spec, name)
    encoded = {signal: CODECS[signal].encode(values[rows]) for signal, values in rows_of.items()}
    arrays = {f"{s}/{name}": np.asarray(array) for s, item in encoded.items() for name, array in item.arrays.items()}
    return arrays, {signal: BlockStats.of(item).to_json() for signal, item in encoded.items()}


def start(
    path: Path, spec: ArchiveSpec = SPEC, teachers: Iterable[str] = ("tiny",), files: Files = LOCAL
) -> ArchiveWriter:
    """Create the archive and write everything except the blocks of views."""
    writer = ArchiveWriter.create(path, spec, files=files)
    writer.write_samples(**samples(spec))
    for name in teachers:
        writer.add_teacher(replace(TEACHER, name=name))
    return writer


def fill(writer: ArchiveWriter, parts: Iterable[str] | None = None) -> None:
    """Write every block that is missing."""
    for part in parts or writer.parts():
        for block in writer.missing(part):
            writer.write(block, *block_data(block, writer.spec))


def make(path: Path, spec: ArchiveSpec = SPEC, teachers: Iterable[str] = ("tiny",)) -> str:
    """Write and seal the archive, and return its id."""
    writer = start(path, spec, teachers)
    fill(writer)
    return writer.seal()


def contents(path: Path) -> dict[str, bytes]:
    """Every file of an archive but its notes."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files if "notes" not in file.parts}
