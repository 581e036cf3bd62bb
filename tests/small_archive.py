"""A small archive written by stage 1, with the logits of an untrained network on synthetic images."""

from __future__ import annotations

import shutil
from pathlib import Path

from redistill.caching import CacheOptions, cache_teacher
from tests.attacks.forge import edit

DATA, VAL = "synthetic?n=150&classes=8", "synthetic?n=64&classes=8&split=val"
TEACHER = "demo:small?num_classes=8&weights=random"


def cache(path: Path, data: str = DATA, **changed) -> Path:
    """Write the archive, with changes to `CacheOptions`."""
    options = {"data": data, "teacher": TEACHER, "views": 3, "out": path, "batch_size": 50, "workers": 0, "seed": 5}
    cache_teacher(CacheOptions(**(options | {"fidelity": 1e-5} | changed)))
    return path


def without_canaries(archive: Path, out: Path) -> Path:
    """A copy of an archive, as of a writer that stored no canaries."""
    shutil.copytree(archive, out)
    shutil.rmtree(out / "canaries")
    for record in out.glob("_redistill/blocks/canaries.*.json"):
        record.unlink()
    edit(out, lambda root: root.update(canaries_per_view=0))
    return out
