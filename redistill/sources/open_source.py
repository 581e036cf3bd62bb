"""`open_source`: from a spec string, a path or an object to a source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from redistill_cache.errors import UsageError

from redistill.sources import DEFAULT_STREAM_CACHE
from redistill.sources.base import ObjectSource, Source, local_path
from redistill.sources.cifar import open_cifar
from redistill.sources.folder import open_folder
from redistill.sources.stream import open_wds
from redistill.sources.synthetic import open_synthetic
from redistill.specs import Spec, did_you_mean, parse_spec

__all__ = ["open_source"]

SCHEMES: dict[str, Callable[[Spec], Source]] = {
    "folder": open_folder,
    "cifar10": open_cifar,
    "cifar100": open_cifar,
    "synthetic": open_synthetic,
}
EXPECTED = "expected folder:PATH, cifar10:PATH, cifar100:PATH, wds:PATTERN, synthetic, or a path"


def open_source(
    text_or_object: str | Path | Any,  # noqa: ANN401  any object of the right shape
    *,
    stream_cache: float = DEFAULT_STREAM_CACHE,
) -> Source:
    """Open an image set: a spec string, a bare path, or an object with `__len__` and `sample(i)`.

    folder:PATH  cifar10:PATH  cifar100:PATH  wds:PATTERN  synthetic[:name][?key=value&...]

    Tars that are streamed take up to `stream_cache` GiB of the cache folder.
    """
    if isinstance(text_or_object, str | Path):
        return _open_text(str(text_or_object), stream_cache)
    if isinstance(text_or_object, Source):
        return text_or_object
    return ObjectSource(text_or_object)


def _open_text(text: str, stream_cache: float) -> Source:
    if not text.strip():
        raise UsageError(f"expected data, found an empty string; {EXPECTED}")
    head, question, options = text.partition("?")
    scheme = head.partition(":")[0]
    if scheme == "wds":
        return open_wds(parse_spec(text), stream_cache)
    if scheme in SCHEMES:
        return SCHEMES[scheme](parse_spec(text))
    return _open_text(_detect(head) + question + options, stream_cache)


def _detect(path: str) -> str:
    """The spec string for a bare path."""
    scheme, colon, _ = path.partition(":")
    local = local_path(path)
    if path.endswith(".tar") or path.startswith(("http://", "https://")):
        return f"wds:{path}"
    for name, folder in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        if local.name == folder or (local / folder).is_dir():
            return f"{name}:{path}"
    if local.is_dir():
        tars = local.glob("*.tar")
        return f"wds:{path}" if any(tars) and not any(child.is_dir() for child in local.iterdir()) else f"folder:{path}"
    if colon and "/" not in scheme:
        raise UsageError(f"unknown kind of data {scheme!r}; {did_you_mean(scheme, [*SCHEMES, 'wds'])}")
    raise UsageError(f"{path!r} is neither a folder nor a tar pattern; {EXPECTED}")
