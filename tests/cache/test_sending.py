"""Copies of an archive in folders and in buckets of a real S3 server."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from redistill_cache import fetch_archive, open_archive, sending
from redistill_cache.errors import Damaged, Incomplete, OutOfRange, Refused, UsageError
from redistill_cache.packing import pack
from redistill_cache.sending import NOTE, copy_archive, planned
from redistill_cache.verify import verify

from tests import tiny_archive
from tests.s3_server import objects, s3_client, s3_server
from tests.tiny_archive import contents

Serve = Callable[..., tuple[str, list[str]]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    pytest.importorskip("moto")
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture
def s3(server: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    for name, text in server.items():
        monkeypatch.setenv(name, text)
    return server


def packed_form(archive: Path, tmp_path: Path) -> dict[str, bytes]:
    pack(archive, tmp_path / "expected.redistill")
    return contents(tmp_path / "expected.redistill")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_copies_in_folders_have_the_form_that_their_name_says(sealed: Path, tmp_path: Path, serve: Serve):
    tars = packed_form(sealed, tmp_path)
    assert copy_archive(str(sealed), str(tmp_path / "b.redistill")) == open_archive(sealed).id
    assert contents(tmp_path / "b.redistill") == tars
    address, _ = serve(tmp_path)
    for source in (str(tmp_path / "b.redistill"), f"{address}/b.redistill"):
        out = tmp_path / "c.redistill.zarr"
        copy_archive(source, str(out))
        assert contents(out) == contents(sealed)
        shutil.rmtree(out)
        copy_archive(source, str(tmp_path / "d"))  # no name says it: as the source
        assert contents(tmp_path / "d") == tars
        shutil.rmtree(tmp_path / "d")
    copy_archive(f"{address}/b.redistill", str(tmp_path / "d"), pack=False, views=2)
    assert open_archive(tmp_path / "d").num_views == 2


def test_what_would_be_copied_is_known_before(sealed: Path, tmp_path: Path):
    tars = packed_form(sealed, tmp_path)
    for source in (sealed, tmp_path / "expected.redistill"):
        tree = planned(str(source), str(tmp_path / "a.redistill.zarr"))
        assert dict(tree.files) | {"_redistill/manifest.json": 0} == {
            name: len(data) if name != tree.manifest else 0 for name, data in contents(sealed).items()
        }
        packed = planned(str(source), "s3://lab/a.redistill")
        assert dict(packed.files) == {name: len(data) for name, data in tars.items() if name != packed.manifest}
        some = planned(str(source), str(tmp_path / "a.redistill.zarr"), views=1)
        assert set(some.files) < set(tree.files)
    assert not (tmp_path / "a.redistill.zarr").exists()
    with pytest.raises(OutOfRange, match="has 3 views, 4 are asked for"):
        planned(str(sealed), str(tmp_path / "a.redistill.zarr"), views=4)


@pytest.mark.parametrize(
    ("destination", "match"),
    [
        ("hf://datasets/a/b", r"'redistill archive publish', not with copy"),
        ("http://host/a", "cannot be written"),
        (f"s3://lab/a#sha256={'0' * 64}", "takes no #sha256="),
        ("ftp://host/a", "is not read"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(sealed: Path, destination: str, match: str):
    with pytest.raises(UsageError, match=match):
        copy_archive(str(sealed), destination)


def test_some_views_are_copied_to_a_folder_only(sealed: Path, tmp_path: Path):
    for destination in ("s3://lab/a", str(tmp_path / "a.redistill")):
        with pytest.raises(UsageError, match="leave out --views"):
            copy_archive(str(sealed), destination, views=1)
    fetch_archive(str(sealed), tmp_path / "some", views=1)
    with pytest.raises(Refused, match="holds a part of its archive only, so copying it is not possible"):
        copy_archive(str(tmp_path / "some"), "s3://lab/a")


# -- buckets ----------------------------------------------------------------------------------------------------------


def test_a_bucket_gets_an_archive_and_gives_it_back(sealed: Path, tmp_path: Path, s3: Mapping[str, str]):
    identity = copy_archive(str(sealed), "s3://lab/one/a.redistill")
    assert identity == open_archive(sealed).id
    assert objects(s3, "one/a.redistill") == packed_form(sealed, tmp_path)
    fetched = fetch_archive("s3://lab/one/a.redistill", tmp_path / "out")
    assert contents(fetched) == contents(sealed)
    assert verify(fetched, full=True).ok


def test_a_signature_goes_to_a_bucket_with_its_archive(archive_copy: Path, s3: Mapping[str, str], tmp_path: Path):
    (archive_copy / "_redistill/manifest.json.sig").write_bytes(b"as its author wrote it")
    for place, name in (("a.redistill", "manifest.json.sig"), ("a.redistill.zarr", "_redistill/manifest.json.sig")):
        copy_archive(str(archive_copy), f"s3://lab/signed/{place}")
        assert objects(s3, f"signed/{place}")[name] == b"as its author wrote it"
        fetched = fetch_archive(f"s3://lab/signed/{place}", tmp_path / place, views=1)
        assert (fetched / "_redistill/manifest.json.sig").read_bytes() == b"as its author wrote it"


@pytest.mark.slow
def test_a_bucket_gets_what_is_on_a_server_or_in_a_bucket(
    sealed: Path, tmp_path: Path, s3: Mapping[str, str], serve: Serve
):
    identity, tars = open_archive(sealed).id, packed_form(sealed, tmp_path)
    address, _ = serve(tmp_path)
    copy_archive(f"{address}/expected.redistill#sha256={identity}", "s3://lab/one/a.redistill.zarr")
    assert objects(s3, "one/a.redistill.zarr") == contents(sealed)
    copy_archive("s3://lab/one/a.redistill.zarr", "s3://lab/one/b.redistill")
    assert objects(s3, "one/b.redistill") == tars


@pytest.mark.slow
def test_a_copy_in_a_bucket_continues_and_refuses_another_archive(
    sealed: Path, tmp_path: Path, s3: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
):
    place = "s3://lab/two/a.redistill"
    copy_archive(str(sealed), place)
    whole = objects(s3, "two/a.redistill")
    client = s3_client(s3)
    keys = [f"two/a.redistill/{name}" for name in ("manifest.json", "view-0001.tar")]
    for key in keys:
        client.delete_object(Bucket="lab", Key=key)
    with pytest.raises(Refused, match=r"holds other files, such as base\.tar; choose another place"):
        copy_archive(str(sealed), place)  # without a note, nobody knows of which archive they are
    note = f'{{"form":"packed","id":"{open_archive(sealed).id}"}}'.encode()
    client.put_object(Bucket="lab", Key=f"two/a.redistill/{NOTE}", Body=note)
    kept = client.head_object(Bucket="lab", Key="two/a.redistill/base.tar")["LastModified"]
    with pytest.raises(Incomplete, match="is not a finished archive"):
        fetch_archive(place)
    other = tmp_path / "other"
    tiny_archive.make(other, teachers=())
    for form in (True, False):
        with pytest.raises(Refused, match=r"holds the archive .* choose another place"):
            copy_archive(str(sealed if not form else other), place, pack=form)
    time.sleep(1.1)  # the times of objects are whole seconds
    copy_archive(str(sealed), place)
    assert objects(s3, "two/a.redistill") == whole
    assert client.head_object(Bucket="lab", Key="two/a.redistill/base.tar")["LastModified"] == kept
    with pytest.raises(Refused, match=r"holds the archive .* choose another place"):
        copy_archive(str(other), place)
    assert objects(s3, "two/a.redistill") == whole
    client.close()


def test_a_damaged_archive_is_not_copied(archive_copy: Path, s3: Mapping[str, str]):
    shard = next((archive_copy / "views/crop").glob("c.1.*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Damaged, match=r"views/crop/c\.1.* does not have the SHA-256"):
        copy_archive(str(archive_copy), "s3://lab/three/a.redistill")
    found = objects(s3, "three/a.redistill")
    assert "view-0001.tar" not in found
    assert "manifest.json" not in found


@pytest.mark.slow
def test_large_files_appear_with_their_last_byte(tmp_path: Path, s3: Mapping[str, str]):
    """They are sent in parts: the copy is killed while it sends, and ends as one that was not."""
    spec = replace(tiny_archive.SPEC, num_samples=250_000, num_views=2, block_rows=100_000)
    path = tmp_path / "large"
    tiny_archive.make(path, spec)
    place, folder = "s3://lab/large/a.redistill", "large/a.redistill"
    client, draw = s3_client(s3), random.Random(5)
    command = [sys.executable, "-m", "redistill_cli", "archive", "copy", str(path), place]
    expected = packed_form(path, tmp_path)
    note = f'{{"form":"packed","id":"{open_archive(path).id}"}}'.encode()
    for _ in range(3):
        with contextlib.suppress(client.exceptions.ClientError):
            client.delete_object(Bucket="lab", Key=f"{folder}/{NOTE}")
            client.delete_object(Bucket="lab", Key=f"{folder}/view-0001.tar")
        client.put_object(Bucket="lab", Key=f"{folder}/{NOTE}", Body=note)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not client.list_multipart_uploads(Bucket="lab").get("Uploads"):
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        for upload in client.list_multipart_uploads(Bucket="lab").get("Uploads", []):
            with contextlib.suppress(client.exceptions.NoSuchUpload):  # the server may still be completing it
                client.abort_multipart_upload(Bucket="lab", Key=upload["Key"], UploadId=upload["UploadId"])
        for name, data in objects(s3, folder).items():
            assert name == NOTE or data == expected[name]
    assert subprocess.run(command, timeout=240, check=False).returncode == 0
    assert objects(s3, folder) == expected
    assert max(map(len, expected.values())) > sending.BLOCK
    shard = max(path.glob("teachers/tiny/*/*/c.1.2*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Damaged, match=r"c\.1\.2.* does not have the SHA-256"):
        copy_archive(str(path), "s3://lab/large/damaged.redistill")
    assert set(objects(s3, "large/damaged.redistill")) == {NOTE, "base.tar", "view-0000.tar"}
    assert not client.list_multipart_uploads(Bucket="lab").get("Uploads")
    client.close()


READ = """
import sys
from pathlib import Path
from redistill_cache.addresses import parse_address
from redistill_cache.download import CONNECTIONS, FileSink, Transfer, download
size = int(sys.argv[1])
with open("/dev/null", "wb") as nowhere:
    addresses = [parse_address("s3://lab/read/large")] * CONNECTIONS
    download([Transfer(address, FileSink(nowhere, size)) for address in addresses])
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10)
"""


@pytest.mark.slow
def test_what_is_read_from_a_bucket_takes_little_memory(s3: Mapping[str, str]):
    size, client = 80 << 20, s3_client(s3)
    client.put_object(Bucket="lab", Key="read/large", Body=bytes(size))
    client.close()
    read = subprocess.run([sys.executable, "-c", READ, str(size)], capture_output=True, timeout=240, check=True)
    assert int(read.stdout) < 450e6  # of which the packages take 100


def test_trouble_with_a_bucket_is_one_line(sealed: Path, s3: Mapping[str, str], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Refused, match=r"cannot write to s3://none/a: .*exist") as refused:
        copy_archive(str(sealed), "s3://none/a")
    assert "\n" not in str(refused.value)
    monkeypatch.setenv("REDISTILL_OFFLINE", "1")
    with pytest.raises(Refused, match="--offline contacts no server"):
        copy_archive(str(sealed), "s3://lab/a")
