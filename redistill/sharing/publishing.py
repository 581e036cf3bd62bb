"""Publishing an archive: its terms are stated, every byte of it is checked, and then it is sent in packed form.

It goes to a dataset repository of the hub (hub.py), to a bucket or to a folder, with its card beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redistill_cache import layout, packed
from redistill_cache.addresses import Address, split_pin, with_pin
from redistill_cache.download import Notify, say
from redistill_cache.errors import Damaged, Refused
from redistill_cache.journal import sha256
from redistill_cache.locks import locked
from redistill_cache.packing import pack, sealed_archive
from redistill_cache.sending import Contents, SendProgress, destination_of, send
from redistill_cache.storage import disk_trouble
from redistill_cache.verify import verify

from redistill.sharing.cards import refuse_folder, write_cards
from redistill.sharing.hub import Repository
from redistill.sharing.terms import missing_for_publishing, publishing_advice

__all__ = ["Plan", "plan", "publish"]


@dataclass(frozen=True)
class Plan:
    """What would be published, and what is missing for it."""

    contents: Contents
    advice: str
    """Empty where nothing is missing."""


def plan(archive: Path, destination: str) -> Plan:
    place(destination)
    _refuse_packed(archive)
    state, _ = sealed_archive(archive, "publishing it")
    missing = missing_for_publishing(archive)
    return Plan(Contents.of(state, pack=True), publishing_advice(archive, missing) if missing else "")


def place(destination: str) -> Address:
    """Where an archive can be published: a repository of the hub, a bucket, or a folder."""
    return Repository.parse(destination).address if destination.startswith("hf://") else destination_of(destination)


def publish(
    archive: Path,
    destination: str,
    *,
    private: bool = False,
    replace: bool = False,
    progress: SendProgress | None = None,
    checked: SendProgress | None = None,
    notify: Notify = say,
) -> str:
    """Publish a sealed archive; returns the address or path, pinned to its id, under which others find it.

    `checked` is told the progress of the check, `progress` that of the bytes. `private` and `replace` are for the hub:
    a new repository is private, and another archive at this place is replaced.
    """
    target = place(destination)
    archive = archive.absolute()
    _refuse_packed(archive)
    _, manifest = sealed_archive(archive, "publishing it")
    identity = sha256(manifest)
    missing = missing_for_publishing(archive)
    if missing:
        raise Refused(f"{archive} is not published: {publishing_advice(archive, missing)}")
    if target.scheme != "hf" and (private or replace):
        raise Refused(f"{target}: --private and --replace are for repositories of the hub; leave them out")
    repository = Repository.parse(destination) if target.scheme == "hf" else None
    if repository is not None:
        repository.refuse_other_archive(archive / layout.MANIFEST, replace=replace)  # before hours of work
    report = verify(archive, full=True, progress=checked)
    if not report.ok:
        flaw = report.damaged[0] if report.damaged else "it is not finished"
        raise Damaged(f"{archive} is not published, as it is damaged: {flaw}; see 'redistill verify --full'")
    if target.scheme == "file":
        refuse_folder(target.local)
        pack(archive, target.local, progress=progress, notify=notify)
        write_cards(archive, target.local)  # under which address others find the folder is not known here
        return with_pin(str(target.local), identity)
    with _packed(archive, identity, notify) as folder:
        names = pack(archive, folder, notify=notify)
        if repository is None:
            cards = write_cards(archive, folder, address=target.url)
            send(archive, target, pack=True, beside=cards, progress=progress)
            return with_pin(target.url, identity)
        address = repository.address_of(identity)
        files = [*(folder / name for name in names), *write_cards(archive, folder, address=split_pin(address)[0])]
        repository.publish(files, identity, private=private, progress=progress, notify=notify)
        return address


def _refuse_packed(archive: Path) -> None:
    if packed.is_packed(archive):
        raise Refused(
            f"{archive} is the packed form; publish the archive itself, which 'redistill archive fetch {archive} OUT' "
            "unpacks"
        )


@contextmanager
def _packed(archive: Path, identity: str, notify: Notify) -> Iterator[Path]:
    """A folder beside the archive for its packed form, which an interrupted call leaves to the next one."""
    staging = archive.with_name(f"{archive.name}.publishing")
    with disk_trouble("write", staging), locked(staging, f"publishes {archive}", notify):
        for other in staging.glob("*"):
            if other.name != identity:  # of an interrupted call, before the archive was changed
                shutil.rmtree(other)
        yield staging / identity
        shutil.rmtree(staging)
