"""Remote files are downloaded once, whole, into the user's cache folder, and read there from then on."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path, PurePosixPath

from redistill_cache.downloads import pull
from redistill_cache.files import LEFTOVER, LOCAL
from redistill_cache.stamps import cache_folder
from redistill_cache.storage import disk_trouble

__all__ = ["is_remote", "local_copy"]


def is_remote(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def local_copy(address: str) -> Path:
    """The file of an http(s) address; it is fetched if it is not there yet."""
    digest = hashlib.sha256(address.encode()).hexdigest()[:32]
    target = cache_folder() / "tars" / f"{digest}-{PurePosixPath(address).name[-100:]}"
    if not target.is_file():
        with disk_trouble("write", target):
            LOCAL.make_directories(target.parent)
            _download(address, target)
    return target


def _download(address: str, target: Path) -> None:
    """Stream `address` into a temporary file beside `target`; it gets the name once it is whole."""
    partial = target.with_name(f"{target.name[:100]}.{uuid.uuid4().hex}{LEFTOVER}")
    try:
        with partial.open("xb") as file:
            pull(address, file)
        LOCAL.sync_file(partial)
        LOCAL.rename(partial, target)
        LOCAL.sync_directory(target.parent)
    finally:
        partial.unlink(missing_ok=True)
