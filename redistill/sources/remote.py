"""Remote files are downloaded once, whole, into the user's cache folder, and read there from then on."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
import uuid
from pathlib import Path, PurePosixPath

from redistill_cache.errors import Refused
from redistill_cache.files import LEFTOVER, LOCAL
from redistill_cache.stamps import cache_folder

__all__ = ["is_remote", "local_copy"]

COPY_BYTES = 1 << 20
TIMEOUT_S = 60


def is_remote(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def local_copy(address: str) -> Path:
    """The file of an http(s) address; it is fetched if it is not there yet."""
    digest = hashlib.sha256(address.encode()).hexdigest()[:32]
    target = cache_folder() / "tars" / f"{digest}-{PurePosixPath(address).name[-100:]}"
    if not target.is_file():
        try:
            LOCAL.make_directories(target.parent)
            _download(address, target)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Refused(f"{address!r} could not be downloaded: {reason}; check the address, or try again") from error
    return target


def _download(address: str, target: Path) -> None:
    """Stream `address` into a temporary file beside `target`; it gets the name once it is whole."""
    partial = target.with_name(f"{target.name[:100]}.{uuid.uuid4().hex}{LEFTOVER}")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response, partial.open("xb") as file:
            announced = response.headers.get("Content-Length")
            while block := response.read(COPY_BYTES):
                file.write(block)
            got = file.tell()
        if announced is not None and got != int(announced):
            raise OSError(f"got {got} of {announced} bytes")
        LOCAL.sync_file(partial)
        LOCAL.rename(partial, target)
        LOCAL.sync_directory(target.parent)
    except urllib.error.HTTPError as error:
        error.close()  # it is a response, too, and would keep its socket
        raise
    finally:
        partial.unlink(missing_ok=True)
