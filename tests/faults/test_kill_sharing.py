"""kill -9 of publish, copy, sign, card and export at random moments; then the same command gives the same bytes.

Others have tests of their own: pack and fetch (test_kill_transfer.py), merge, skeleton and subset
(test_kill_combining.py), import and export to webdataset (test_kill_interchange.py), publishing to the hub
(test_publishing.py).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from redistill_cache.sending import NOTE

from redistill.sharing.signing import check_signature, read_signature, sign
from tests import tiny_archive
from tests.faults.test_kill_transfer import run as run_process
from tests.s3_server import objects, s3_client, s3_server
from tests.tiny_archive import SPEC, contents

SEED = int(os.environ.get("REDISTILL_SEED", "20261126"))
KILLS = 6
SPEC_OF_SOURCE = replace(
    SPEC, num_samples=30_000, block_rows=4096, source={"kind": "synthetic", "description": "noise"}
)
BUCKET = "s3://lab/place/"
# Says that it begins, so that importing what the command needs does not count as running.
CODE = """
import sys
from importlib import import_module
for name in sys.argv.pop(1).split():
    import_module(name)
from redistill_cli.__main__ import main
print("now", flush=True)
main()
"""
MODULES = {
    "publish": "redistill.sharing.publishing s3fs",
    "copy": "redistill_cache.sending s3fs",
    "card": "redistill.sharing.cards",
    "sign": "redistill.sharing.signing model_signing.signing",
    "export": "redistill.interchange.exporting",
}
# Manifests are written last: where one is, everything else is.
MANIFESTS = ("manifest.json", "_redistill/manifest.json")
UNFINISHED = ("_redistill/copy.json", NOTE)

COMMANDS: dict[str, list[str]] = {
    "publish to a folder": ["publish", "a.redistill.zarr", "place"],
    "publish to a bucket": ["publish", "a.redistill.zarr", f"{BUCKET}r"],
    "copy to a folder": ["copy", "a.redistill.zarr", "place", "--tree"],
    "copy packed": ["copy", "a.redistill.zarr", "place", "--packed"],
    "copy to a bucket": ["copy", "a.redistill.zarr", f"{BUCKET}r", "--packed"],
    "copy files to a bucket": ["copy", "a.redistill.zarr", f"{BUCKET}r", "--tree"],
    "card": ["card", "a.redistill.zarr", "place"],
    "export": ["export", "a.redistill.zarr", "place", "--to", "npz"],
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("keys")
    openssl = ["openssl", "ec", "-out"]
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "private.pem"],
        cwd=folder,
        check=True,
    )
    subprocess.run([*openssl, "public.pem", "-in", "private.pem", "-pubout"], cwd=folder, check=True)
    return folder / "private.pem", folder / "public.pem"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_archive.make(folder / "a.redistill.zarr", SPEC_OF_SOURCE)
    sign(folder / "a.redistill.zarr", keys[0])
    return folder


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    pytest.importorskip("moto")
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@dataclass(frozen=True)
class Place:
    """Where a command writes to: what is there, and how it is removed."""

    found: Callable[[], dict[str, bytes]]
    clear: Callable[[], None]


def place_of(arguments: list[str], folder: Path, s3: Mapping[str, str]) -> Place:
    if not any(argument.startswith(BUCKET) for argument in arguments):
        out = folder / "place"
        return Place(lambda: contents(out) if out.exists() else {}, lambda: shutil.rmtree(out, ignore_errors=True))

    def clear() -> None:
        client = s3_client(s3)
        for name in objects(s3, "place/r"):
            client.delete_object(Bucket="lab", Key=f"place/r/{name}")
        client.close()
        shutil.rmtree(folder / "a.redistill.zarr.publishing", ignore_errors=True)

    return Place(lambda: objects(s3, "place/r"), clear)


def run(folder: Path, arguments: list[str], env: Mapping[str, str], seconds: float | None = None) -> float | None:
    """Run a command of `redistill archive` in a folder, or kill it after so many seconds."""
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), **env}
    modules = MODULES[arguments[0]]
    return run_process(CODE, modules, "archive", *arguments, seconds=seconds, cwd=folder, env=env)


def check_what_is_there(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    """Files that have their names have their bytes; with a manifest, all that the archive is of are here."""
    unfinished = [name for name in found if name.endswith(".partial") or "documents-" in name or name in UNFINISHED]
    whole = {name: data for name, data in found.items() if name not in unfinished}
    assert whole.items() <= expected.items()
    if any(name in whole for name in MANIFESTS) and "_redistill/copy.json" not in found:
        optional = (".sig", ".md", ".json", ".cff", ".csv")  # the signature and the card
        assert not [n for n in expected.keys() - whole.keys() if "_redistill/blocks" in n or not n.endswith(optional)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_is_finished_to_the_same_bytes(
    source: Path, s3: Mapping[str, str], tmp_path: Path, command: str
):
    print(f"replay with REDISTILL_SEED={SEED}")
    draw = random.Random(f"{SEED} {command}")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    arguments = COMMANDS[command]
    place = place_of(arguments, tmp_path, s3)
    place.clear()
    duration = run(tmp_path, arguments, s3)
    assert duration is not None
    expected, began = place.found(), 0
    for number in range(KILLS):
        killed = False
        while not killed:
            place.clear()
            took = run(tmp_path, arguments, s3, duration * draw.random())
            killed, duration = took is None, min(duration, took or duration)
            check_what_is_there(place.found(), expected)
        began += bool(place.found())
        if number % 3 == 0:  # the second call is killed as well
            run(tmp_path, arguments, s3, duration * draw.random())
            check_what_is_there(place.found(), expected)
        run(tmp_path, arguments, s3)
        assert place.found() == expected
        assert not list(tmp_path.glob("*.publishing"))
    print(f"{began} of {KILLS} had begun to write")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_sign_leaves_a_whole_signature_or_none(source: Path, tmp_path: Path, keys: tuple[Path, Path]):
    """No two signatures of a key are the same, so not the bytes are compared."""
    draw = random.Random(SEED)
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    archive, arguments = tmp_path / "a.redistill.zarr", ["sign", "a.redistill.zarr", "--key", str(keys[0])]
    duration = run(tmp_path, arguments, {})
    assert duration is not None
    for _ in range(KILLS):
        signature = archive / "_redistill/manifest.json.sig"
        signature.unlink(missing_ok=True)
        run(tmp_path, arguments, {}, duration * draw.random())
        if signature.exists():
            check_signature(archive, read_signature(str(archive)), keys[1])
        run(tmp_path, arguments, {})
        check_signature(archive, read_signature(str(archive)), keys[1])
