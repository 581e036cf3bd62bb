"""redistill: knowledge distillation without paying for the teacher twice."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from redistill.sources.open_source import open_source

if TYPE_CHECKING:
    from redistill import losses
    from redistill.cached_teacher import CachedTeacher
    from redistill.models import open_model
    from redistill.signals import tap
    from redistill.views.dataset import ViewDataset, render
    from redistill.views.sampler import ViewSampler
    from redistill.views.stream_views import webdataset_views

__version__: str

__all__ = [
    "CachedTeacher",
    "ViewDataset",
    "ViewSampler",
    "__version__",
    "losses",
    "open_model",
    "open_source",
    "render",
    "tap",
    "webdataset_views",
]

# Loaded at first use: these need torch, and the processes that only read and hash images should not wait for it.
LAZY = {
    "CachedTeacher": "redistill.cached_teacher",
    "open_model": "redistill.models",
    "ViewDataset": "redistill.views.dataset",
    "ViewSampler": "redistill.views.sampler",
    "losses": "redistill.losses",
    "render": "redistill.views.dataset",
    "tap": "redistill.signals",
    "webdataset_views": "redistill.views.stream_views",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  whatever the name stands for
    if name == "__version__":
        return version("redistill")
    if name not in LAZY:
        raise AttributeError(f"module 'redistill' has no attribute {name!r}")
    module = import_module(LAZY[name])
    return module if LAZY[name] == f"redistill.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
