"""Copies of an archive at another place: a folder of this machine, or a bucket at s3:// or gs://.

A copy is the archive itself, in either form. In a bucket, a note with the archive's id is written first, the files
follow, then the manifest, and the note is removed. So nothing is taken for an archive before all of it is there, and
what an interrupted call finished is known to be of this archive and not sent again: an object has all of its bytes or
does not exist. Files are hashed while they are sent; in the end their sizes in the bucket are compared, and the
manifest is read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from redistill_cache import layout, limits, packed
from redistill_cache.addresses import SCHEMES, Address, address_of_path, is_address, parse_address, redact
from redistill_cache.copies import Held
from redistill_cache.download import Notify, is_offline, say
from redistill_cache.errors import Damaged, OutOfRange, RedistillError, Refused, UsageError
from redistill_cache.fetching import check_id, fetch_archive, fetched_description, locate
from redistill_cache.journal import sha256
from redistill_cache.open_state import ArchiveState
from redistill_cache.packing import file_bytes, sealed_archive, tar_bytes
from redistill_cache.packing import pack as write_packed
from redistill_cache.storage import read_if_there, read_small
from redistill_cache.strict_json import Fields, canonical, parse
from redistill_cache.wording import human_bytes, one_line

__all__ = ["Contents", "copy_archive", "destination_of", "planned", "send"]

NOTE = "redistill-copying.json"  # at the place of a copy that is not finished
BUCKETS = ("s3", "gs")
BLOCK = 8 << 20  # of an object that is sent in parts
MOST_PARTS = 9_000  # of an object; S3 takes 10,000
CONNECTIONS = 4
# Seconds; the package tries five times, and each time as often as this says.
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 20, "read_timeout": 30, "retries": {"max_attempts": 1}}}

SendProgress = Callable[[int, int], None]


# -- what is copied, and where to -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """The files of an archive in one of its forms, with their sizes; its manifest is not among them."""

    form: str
    files: Mapping[str, int]
    manifest: str
    members: Mapping[str, list[str]]
    """Of each tar of the packed form."""

    @classmethod
    def of(cls, state: ArchiveState, *, pack: bool) -> Contents:
        if not pack:
            files = {name: entry.size for name, entry in state.files.items()}
            return cls("tree", files, layout.MANIFEST, {})
        tars = packed.contents(state.files, state.num_views)
        return cls("packed", {name: packed.tar_size(state.files, tars[name]) for name in tars}, packed.MANIFEST, tars)

    @property
    def signature(self) -> str:
        return packed.SIGNATURE if self.form == "packed" else layout.SIGNATURE

    @property
    def summary(self) -> str:
        return f"{len(self.files) + 1} files, {human_bytes(sum(self.files.values()))} ({self.form})"

    def pieces(self, state: ArchiveState, name: str) -> Iterator[bytes]:
        """The bytes of a file."""
        return tar_bytes(state, self.members[name]) if name in self.members else file_bytes(state, name)


def destination_of(text: str) -> Address:
    """Where an archive can be copied to: a folder, or an address of a bucket."""
    if not is_address(text):
        return address_of_path(Path(text))
    address = parse_address(text, SCHEMES)
    if address.pin is not None:
        raise UsageError(f"{text}: a place to write to takes no #sha256=; remove it")
    if address.scheme == "hf":
        raise UsageError(f"{address}: archives get to the hub with 'redistill archive publish', not with copy")
    if address.scheme not in BUCKETS:
        raise UsageError(
            f"{address}: {address.scheme}:// cannot be written; give a folder, s3://BUCKET/PATH or gs://..."
        )
    return address


def is_packed_at(source: str, destination: Address, pack: bool | None) -> bool:
    """Whether a copy has the packed form: as asked for, as the destination is named, or as the source is."""
    if pack is not None:
        return pack
    for name in (destination.name, locate(source).name):
        if name.endswith((".redistill", ".redistill.zarr")):
            return name.endswith(".redistill")
    return packed.is_packed(source)


def planned(source: str, destination: str, *, views: int | None = None, pack: bool | None = None) -> Contents:
    """What `copy_archive` would copy, from the metadata of the archive alone."""
    target = destination_of(destination)
    form = is_packed_at(source, target, pack)
    _refuse_views(views, target, form)
    with fetched_description(source) as state:
        contents = Contents.of(state, pack=form)
        if views is None:
            return contents
        if views > state.num_views:
            raise OutOfRange(f"{source} has {state.num_views} views, {views} are asked for")
        sizes = {name: state.files[name].size for name in Held(views).files(state.files)}
        return Contents(contents.form, sizes, contents.manifest, {})


def copy_archive(
    source: str,
    destination: str,
    *,
    views: int | None = None,
    pack: bool | None = None,
    progress: SendProgress | None = None,
    notify: Notify = say,
) -> str:
    """Copy a sealed archive, or its first views, from a path or an address to a folder or a bucket; returns its id.

    `pack` decides the form; by default the names do. What comes from a server gets to a bucket, or is packed, by way
    of the cache folder.
    """
    target = destination_of(destination)
    form = is_packed_at(source, target, pack)
    _refuse_views(views, target, form)
    if target.scheme == "file" and not form:
        path = fetch_archive(source, target.local, views=views, progress=progress, notify=notify)
        return _id_of(path / layout.MANIFEST)
    origin = locate(source)
    if origin.scheme != "file" or packed.is_packed(source):
        path = fetch_archive(source, progress=progress, notify=notify)
    else:
        path = origin.local
        if origin.pin is not None:
            check_id(path, origin.pin)
    if target.scheme == "file":
        write_packed(path, target.local, progress=progress, notify=notify)
        return _id_of(target.local / packed.MANIFEST)
    return send(path, target, pack=form, progress=progress)


def _id_of(manifest: Path) -> str:
    return sha256(read_small(manifest, limits.MAX_MANIFEST_BYTES))


def _refuse_views(views: int | None, target: Address, form: bool) -> None:
    if views is not None and (target.scheme != "file" or form):
        raise UsageError(
            f"{target}: a copy with some of the views is a folder on a disk, not packed and not in a bucket; leave out "
            "--views, or copy what 'redistill archive subset' writes"
        )


# -- buckets ----------------------------------------------------------------------------------------------------------


def send(
    archive: Path,
    target: Address,
    *,
    pack: bool,
    beside: Iterable[Path] = (),
    progress: SendProgress | None = None,
) -> str:
    """Copy a local archive to a bucket; returns its id. Its signature and files of `beside` are sent, and replaced."""
    if is_offline():
        raise Refused(f"{target} cannot be written: --offline contacts no server")
    state, manifest = sealed_archive(archive, "copying it")
    contents = Contents.of(state, pack=pack)
    with bucket_trouble(target):
        bucket = Bucket(target)
        here = bucket.sizes()
        begun = _refuse_other_copies(bucket, here, contents, manifest)
        missing = [name for name, size in contents.files.items() if not (begun and here.get(name) == size)]
        if missing or contents.manifest not in here:
            bucket.write(NOTE, canonical({"form": contents.form, "id": sha256(manifest)}))
        total = sum(contents.files.values())
        done = total - sum(contents.files[name] for name in missing)
        for name in bucket.send({name: partial(contents.pieces, state, name) for name in missing}, contents.files):
            done += contents.files[name]
            if progress is not None:
                progress(done, total)
        signature = read_if_there(archive / layout.SIGNATURE, limits.MAX_RECORD_BYTES)
        if signature is not None:
            bucket.write(contents.signature, signature)
        for path in beside:
            bucket.write(path.name, path.read_bytes())
        arrived = bucket.sizes()
        for name, size in contents.files.items():
            if arrived.get(name) != size:
                raise Damaged(f"{target}/{name}: {arrived.get(name, 0)} bytes arrived, expected {size}; copy it again")
        if contents.manifest not in here:
            bucket.write(contents.manifest, manifest)
        if bucket.read(contents.manifest) != manifest:
            raise Damaged(f"{target}/{contents.manifest} is not what was written; copy it again")
        if NOTE in arrived:
            bucket.remove(NOTE)
    return sha256(manifest)


def _refuse_other_copies(bucket: Bucket, here: Mapping[str, int], contents: Contents, manifest: bytes) -> bool:
    """Whether a copy of this archive in this form has begun; `Refused` for anything else that is there."""
    expected = {"form": contents.form, "id": sha256(manifest)}
    for form, name in (("tree", layout.MANIFEST), ("packed", packed.MANIFEST)):
        if name in here:
            size = here[name]
            identity = sha256(bucket.read(name)) if size <= limits.MAX_MANIFEST_BYTES else "that cannot be read"
            found = {"form": form, "id": identity}
            break
    else:
        if not here:
            return False
        if NOTE not in here or here[NOTE] > limits.MAX_RECORD_BYTES:
            raise Refused(f"{bucket.address} holds other files, such as {min(here)}; choose another place")
        fields = Fields(parse(bucket.read(NOTE), cap=limits.MAX_RECORD_BYTES, where=NOTE), NOTE)
        found = {name: fields.text(name, 64) for name in expected}
    if found != expected:
        raise Refused(
            f"{bucket.address} holds the archive {found['id']} ({found['form']}), and {expected['id']} "
            f"({expected['form']}) is to be copied there; choose another place"
        )
    return True


@contextmanager
def bucket_trouble(address: Address) -> Iterator[None]:
    """Packages for buckets have their own exceptions: one line each."""
    try:
        yield
    except RedistillError:
        raise
    except Exception as error:
        raise Refused(
            f"cannot write to {address}: {redact(one_line(error))}; check the address, your credentials and the "
            "network, then run the same command again: what has arrived is kept"
        ) from error


class Bucket:
    """A folder of a bucket, through fsspec."""

    def __init__(self, address: Address) -> None:
        try:
            import fsspec  # type: ignore[import-untyped]

            options = S3_OPTIONS if address.scheme == "s3" else {}
            self.files: Any = fsspec.filesystem(
                address.scheme, skip_instance_cache=True, use_listings_cache=False, **options
            )
        except ImportError as error:
            extra = "; pip install 'redistill[s3]'" if address.scheme == "s3" else ""
            raise Refused(
                f"{address}: {address.scheme}:// needs a package that is not installed ({one_line(error)}){extra}"
            ) from error
        self.address = address
        self.root = str(self.files._strip_protocol(address.url)).rstrip("/")

    def sizes(self) -> dict[str, int]:
        """All files of the folder."""
        found = self.files.find(self.root, detail=True)
        return {path.removeprefix(f"{self.root}/"): int(info["size"] or 0) for path, info in found.items()}

    def read(self, name: str) -> bytes:
        return bytes(self.files.cat_file(f"{self.root}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        self.files.pipe_file(f"{self.root}/{name}", data)

    def remove(self, name: str) -> None:
        self.files.rm_file(f"{self.root}/{name}")

    def send(self, files: Mapping[str, Callable[[], Iterator[bytes]]], sizes: Mapping[str, int]) -> Iterator[str]:
        """Write files, and give the name of each once it is there."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            sent = {pool.submit(self._stream, name, sizes[name], files[name]): name for name in files}
            try:
                for future in as_completed(sent):
                    future.result()
                    yield sent[future]
            finally:
                pool.shutdown(cancel_futures=True)

    def _stream(self, name: str, size: int, pieces: Callable[[], Iterator[bytes]]) -> None:
        """Write a file that appears with its last byte, or not at all."""
        if size <= BLOCK:
            self.write(name, b"".join(pieces()))
            return
        block = max(BLOCK, -(-size // MOST_PARTS))
        file = self.files.open(f"{self.root}/{name}", "wb", block_size=block, autocommit=False)
        try:
            for piece in pieces():
                file.write(piece)
            file.close()
        except BaseException:
            file.discard()
            file.closed = True  # its destructor would write the rest
            raise
        file.commit()
