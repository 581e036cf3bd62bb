"""An archive in a dataset repository of the hub, written through huggingface_hub.

Files are uploaded one by one, and become visible by one commit: a reader sees the whole archive, or what was there
before. What the repository or its storage has already, with the same hash, is not sent again. The commit is then
compared with the local files, and tagged with the id of the archive, so that it can be read even after another one
takes its place.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from redistill_cache import limits, packed
from redistill_cache.addresses import Address, parse_address, redact, with_pin
from redistill_cache.download import Notify, is_offline, read_address
from redistill_cache.errors import Damaged, RedistillError, Refused, UsageError
from redistill_cache.journal import sha256
from redistill_cache.sending import SendProgress
from redistill_cache.wording import one_line

__all__ = ["Repository"]

TIMEOUT_S = 120.0  # without a byte
TAG_LENGTH = 16  # of the 64 digits of an id


@dataclass(frozen=True)
class LocalFile:
    """A file that is published, read once for each of its hashes."""

    path: Path

    @cached_property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def blob(self) -> str:
        """The id that git gives it."""
        return hashlib.sha1(b"blob %d\0" % self.size + self.path.read_bytes()).hexdigest()

    def is_at(self, remote: Any) -> bool:  # noqa: ANN401  RepoFile of the package, which is optional
        """Whether the hub has the same bytes. Large files are known there by their SHA-256, small ones by git's id."""
        if remote.size != self.size:
            return False
        return bool(remote.lfs.sha256 == self.sha256 if remote.lfs else remote.blob_id == self.blob)


@dataclass(frozen=True)
class Repository:
    """A folder of a dataset repository."""

    address: Address
    name: str
    """ORG/NAME"""
    folder: str
    """Empty, or with '/' at its end."""

    @classmethod
    def parse(cls, text: str) -> Repository:
        address = parse_address(text, ("hf",))
        kind, *parts = [address.parts.netloc, *address.parts.path.strip("/").split("/")]
        if kind != "datasets" or len(parts) < 2 or "@" in text or "%" in text or address.pin is not None:
            raise UsageError(f"{address}: expected hf://datasets/ORG/NAME[/PATH], without a revision or an id")
        return cls(address, "/".join(parts[:2]), "".join(f"{part}/" for part in parts[2:]))

    # -- what is there ------------------------------------------------------------------------------------------------

    @cached_property
    def api(self) -> Any:  # noqa: ANN401  the package is optional
        """The client; it waits for no answer longer than `TIMEOUT_S`, and the package's own has no such limit."""
        if is_offline():
            raise Refused(f"{self.address} cannot be written: --offline contacts no server")
        try:
            import huggingface_hub
        except ImportError as error:
            raise Refused(
                f"{self.address}: hf:// needs a package that is not installed ({one_line(error)}); "
                "pip install 'redistill[hub]'"
            ) from error
        hub: Any = huggingface_hub  # which has no types for all of this
        made = hub.get_session()
        hub.set_client_factory(
            lambda: type(made)(event_hooks=made.event_hooks, follow_redirects=True, timeout=TIMEOUT_S)
        )
        hub.utils.disable_progress_bars()
        hub.utils.logging.set_verbosity_error()
        return hub.HfApi(library_name="redistill")

    def refuse_other_archive(self, manifest: Path, *, replace: bool) -> None:
        """`Refused` without a token that is valid, or where another archive is and is not to be replaced."""
        with self._trouble():
            self.api.whoami()
            existing = self._files([packed.MANIFEST])
        if existing and not replace and not LocalFile(manifest).is_at(existing[packed.MANIFEST]):
            raise Refused(
                f"{self.address} holds another archive; replace it with --replace (it stays under its tag), or choose "
                "another PATH"
            )

    def _files(self, names: Iterable[str], revision: str | None = None) -> dict[str, Any]:
        """Those of the files that the repository has."""
        from huggingface_hub.errors import RepositoryNotFoundError

        paths = [self.folder + name for name in names]
        try:
            found = self.api.get_paths_info(self.name, paths, revision=revision, repo_type="dataset")
        except RepositoryNotFoundError:
            return {}
        return {item.path.removeprefix(self.folder): item for item in found if hasattr(item, "size")}

    # -- publishing ---------------------------------------------------------------------------------------------------

    def publish(
        self, paths: Iterable[Path], identity: str, *, private: bool, progress: SendProgress | None, notify: Notify
    ) -> None:
        """Make the folder of the repository hold these files, the manifest of the archive being one of them."""
        files = {path.name: LocalFile(path) for path in paths}
        with self._trouble(), warnings.catch_warnings(record=True) as warned:
            self.api.create_repo(self.name, repo_type="dataset", private=private or None, exist_ok=True)
            commit = self._commit(files, f"Archive {identity}", progress)
            for warning in warned:  # about the text of the card
                notify(f"{self.address}: {' '.join(str(warning.message).split())}")
            wrong = sorted(files.keys() - self._same(files, commit))
            if wrong:
                raise Damaged(f"{self.address}: {wrong[0]} is not there as it was sent; run the same command again")
            self._tag(identity[:TAG_LENGTH], commit, {packed.MANIFEST: files[packed.MANIFEST]})
        address = self.address_of(identity)
        manifest = read_address(parse_address(address).child(packed.MANIFEST), limits.MAX_MANIFEST_BYTES)
        if sha256(manifest) != identity:
            raise Damaged(f"{address} does not give the manifest that was sent; run the same command again")

    def address_of(self, identity: str) -> str:
        """The address that has this archive once it is published, whatever replaces it later."""
        return with_pin(f"hf://datasets/{self.name}@{identity[:TAG_LENGTH]}/{self.folder}".rstrip("/"), identity)

    def _commit(self, files: Mapping[str, LocalFile], message: str, progress: SendProgress | None) -> str:
        """Upload what is not there yet, and commit all of it at once."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        same = self._same(files)
        total, done = sum(file.size for file in files.values()), 0
        operations: list[Any] = []
        for name, file in files.items():
            if name not in same:
                operations.append(CommitOperationAdd(self.folder + name, file.path))
                self.api.preupload_lfs_files(self.name, operations[-1:], repo_type="dataset", free_memory=False)
            done += file.size
            if progress is not None:
                progress(done, total)
        operations += [CommitOperationDelete(path) for path in self._other_tars(files)]
        if not operations:
            return str(self.api.repo_info(self.name, repo_type="dataset").sha)
        return str(self.api.create_commit(self.name, operations, commit_message=message, repo_type="dataset").oid)

    def _other_tars(self, files: Mapping[str, LocalFile]) -> list[str]:
        """Of an archive that is replaced."""
        if not self._files([packed.MANIFEST]):
            return []
        tree = self.api.list_repo_tree(self.name, self.folder.rstrip("/") or None, repo_type="dataset")
        ours = {self.folder + name for name in files}
        return [item.path for item in tree if item.path.endswith(".tar") and item.path not in ours]

    def _same(self, files: Mapping[str, LocalFile], revision: str | None = None) -> set[str]:
        """Those of the files that the repository has already."""
        return {name for name, remote in self._files(files, revision).items() if files[name].is_at(remote)}

    def _tag(self, tag: str, commit: str, manifest: Mapping[str, LocalFile]) -> None:
        """Make the tag lead to this archive in this folder."""
        self.api.create_tag(self.name, tag=tag, revision=commit, repo_type="dataset", exist_ok=True)
        if not self._same(manifest, tag):  # it was published to another folder before
            self.api.delete_tag(self.name, tag=tag, repo_type="dataset")
            self.api.create_tag(self.name, tag=tag, revision=commit, repo_type="dataset")

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        """The exceptions of the package: one line each."""
        try:
            yield
        except RedistillError:
            raise
        except Exception as error:
            raise Refused(
                f"cannot publish to {self.address}: {redact(one_line(error))}; check the address, the network and the "
                "token, which 'hf auth login' or HF_TOKEN gives and which must be allowed to write, then run the same "
                "command again: what has arrived is kept"
            ) from error
