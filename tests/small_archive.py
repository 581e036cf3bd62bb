"""A small archive written by stage 1, with the logits of an untrained network on synthetic images."""

from __future__ import annotations

from pathlib import Path

from redistill.caching import CacheOptions, cache_teacher

DATA, VAL = "synthetic?n=150&classes=8", "synthetic?n=64&classes=8&split=val"
TEACHER = "demo:small?num_classes=8&weights=random"


def cache(path: Path, data: str = DATA, **changed) -> Path:
    """Write the archive, with changes to `CacheOptions`."""
    options = {"data": data, "teacher": TEACHER, "views": 3, "out": path, "batch_size": 50, "workers": 0, "seed": 5}
    cache_teacher(CacheOptions(**(options | {"fidelity": 1e-5} | changed)))
    return path
