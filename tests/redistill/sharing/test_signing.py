"""Signatures: they fit their archive and their key, and nothing else fits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from redistill_cache import ArchiveWriter, fetch_archive, limits, open_archive, stream_archive
from redistill_cache.errors import Damaged, Refused, UsageError
from redistill_cache.packing import pack
from redistill_cache.sending import copy_archive
from redistill_cache.verify import verify
from redistill_cli.__main__ import main

from redistill.sharing import signing
from redistill.sharing.signing import BadSignature, check_signature, read_signature, sign
from tests.tiny_archive import SPEC, contents, make


def write_key(folder: Path, key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> tuple[Path, Path]:
    """The files of a private and a public key."""
    folder.mkdir()
    private, public = folder / "private.pem", folder / "public.pem"
    encryption = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
    private.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, encryption))
    info = pem.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem.Encoding.PEM, info))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_key(tmp_path_factory.mktemp("keys") / "ours", ec.derive_private_key(1234567, ec.SECP256R1()))


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> Path:
    """A folder with a signed archive and its packed form; tests must not change it."""
    folder = tmp_path_factory.mktemp("signed")
    make(folder / "a.redistill.zarr", replace(SPEC, num_views=2, block_rows=64))
    sign(folder / "a.redistill.zarr", keys[0])
    written = pack(folder / "a.redistill.zarr", folder / "a.redistill")
    assert written == {name: len(data) for name, data in contents(folder / "a.redistill").items()}
    return folder


def test_a_signature_lies_beside_the_manifest_and_fits_in_either_form(signed: Path, keys: tuple[Path, Path]):
    tree, packed = signed / "a.redistill.zarr", signed / "a.redistill"
    archive = open_archive(tree, verify="full")
    assert verify(tree, full=True).ok
    for form in (tree, packed):
        assert check_signature(form, read_signature(str(form)), keys[1]) == archive.id
    assert (packed / "manifest.json.sig").read_bytes() == (tree / "_redistill/manifest.json.sig").read_bytes()
    assert "manifest.json.sig" not in json.dumps(list(archive.state.files))


def test_the_packed_form_is_signed_as_well(signed: Path, keys: tuple[Path, Path], tmp_path: Path):
    shutil.copytree(signed / "a.redistill", tmp_path / "p")
    (tmp_path / "p/manifest.json.sig").unlink()
    with pytest.raises(BadSignature, match=r"is not signed: it has no manifest\.json\.sig"):
        read_signature(str(tmp_path / "p"))
    assert sign(tmp_path / "p", keys[0]) == tmp_path / "p/manifest.json.sig"
    check_signature(signed / "a.redistill.zarr", read_signature(str(tmp_path / "p")), keys[1])


def test_the_signature_at_an_address_is_checked(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, serve, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address, _ = serve(signed)
    for form in ("a.redistill", "a.redistill.zarr"):
        copy = fetch_archive(f"{address}/{form}", tmp_path / form, views=1)
        assert read_signature(str(copy)) == read_signature(f"{address}/{form}")
        check_signature(copy, read_signature(str(copy)), keys[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadSignature, match="is not signed"):
        read_signature(f"{serve(tmp_path / 'empty')[0]}/a")


def test_every_copy_brings_the_signature(signed: Path, keys: tuple[Path, Path], tmp_path: Path, serve, monkeypatch):
    """Also one that was fetched before the archive was signed; never one that a server does not give."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    signature = read_signature(str(signed / "a.redistill"))
    address, _ = serve(signed)
    for source in (str(signed / "a.redistill.zarr"), f"{address}/a.redistill"):
        for name in ("b.redistill", "b.redistill.zarr"):
            copy_archive(source, str(tmp_path / name))
            assert read_signature(str(tmp_path / name)) == signature
            shutil.rmtree(tmp_path / name)
    shutil.copytree(signed / "a.redistill", tmp_path / "later")
    (tmp_path / "later/manifest.json.sig").unlink()
    out = tmp_path / "out"
    for views in (1, None):
        fetch_archive(str(tmp_path / "later"), out, views=views)
        assert verify(out, full=True).has_signature is False
    streamed = stream_archive(tmp_path / "later").path
    (tmp_path / "later/manifest.json.sig").write_bytes(signature)
    fetch_archive(str(tmp_path / "later"), out)
    fetch_archive(str(tmp_path / "later"))
    for copy in (out, streamed):
        assert verify(copy, full=True).has_signature
        assert check_signature(copy, read_signature(str(copy)), keys[1]) == open_archive(signed / "a.redistill.zarr").id
    for odd in (bytes(limits.MAX_RECORD_BYTES + 1), b"<html>"):
        (tmp_path / "later/manifest.json.sig").write_bytes(odd)
        notes: list[str] = []
        fetch_archive(str(tmp_path / "later"), out, notify=notes.append)
        assert len(notes) == 1
        assert "has no signature from" in notes[0]
        assert read_signature(str(out)) == signature


def test_another_key_archive_or_signature_does_not_fit(signed: Path, keys: tuple[Path, Path], tmp_path: Path):
    tree = signed / "a.redistill.zarr"
    _, other_key = write_key(tmp_path / "theirs", ec.derive_private_key(7654321, ec.SECP384R1()))
    signature = read_signature(str(tree))
    with pytest.raises(BadSignature, match="not made with the private key of"):
        check_signature(tree, signature, other_key)
    shutil.copytree(tree, tmp_path / "edited")
    ArchiveWriter.resume(tmp_path / "edited").edit_terms(licence="CC0-1.0")
    with pytest.raises(BadSignature, match=r"of another manifest: .* changed after it was signed"):
        check_signature(tmp_path / "edited", read_signature(str(tmp_path / "edited")), keys[1])
    assert verify(tmp_path / "edited", full=True).ok
    sign(tmp_path / "edited", keys[0])
    check_signature(tmp_path / "edited", read_signature(str(tmp_path / "edited")), keys[1])


def test_bytes_of_strangers_are_no_signature(signed: Path, keys: tuple[Path, Path], capsys):
    tree = signed / "a.redistill.zarr"
    whole = read_signature(str(tree))
    bundle = json.loads(whole)
    material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
    changed = [
        bundle | {"dsseEnvelope": {}},
        bundle | {"dsseEnvelope": None},
        bundle | {"dsseEnvelope": envelope | {"signatures": []}},
        bundle | {"dsseEnvelope": envelope | {"signatures": [{"sig": "AAAA"}]}},
        bundle | {"dsseEnvelope": envelope | {"payload": 5}},
        bundle | {"dsseEnvelope": envelope | {"payload": "e30="}},
        bundle | {"verificationMaterial": {}},
        bundle | {"verificationMaterial": [1]},
        bundle | {"verificationMaterial": material | {"publicKey": {}}},
        bundle | {"verificationMaterial": material | {"publicKey": {"hint": ""}}},
        bundle | {"verificationMaterial": material | {"tlogEntries": 3}},
        bundle | {"mediaType": "text/plain"},
    ]
    texts = [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b"x" * (1 << 20), whole[:-40]]
    for data in [*texts, *(json.dumps(value).encode() for value in changed)]:
        with pytest.raises(BadSignature, match="does not fit") as error:
            check_signature(tree, data, keys[1])
        assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_every_flipped_bit_of_what_is_signed_is_noticed(signed: Path, keys: tuple[Path, Path]):
    tree = signed / "a.redistill.zarr"
    whole = read_signature(str(tree))
    payload = json.loads(whole)["dsseEnvelope"]["payload"]
    start = whole.index(payload.encode())
    for position in range(start, start + len(payload) - 4, 97):
        data = bytearray(whole)
        data[position] = ord("A") if data[position] != ord("A") else ord("B")
        with pytest.raises(BadSignature):
            check_signature(tree, bytes(data), keys[1])


def test_keys_that_cannot_be_used_are_refused_by_name(signed: Path, keys: tuple[Path, Path], tmp_path: Path):
    tree = signed / "a.redistill.zarr"
    before = contents(tree)
    curve = ec.derive_private_key(1234567, ec.SECP256R1())
    locked, _ = write_key(tmp_path / "locked", curve, password=b"secret")
    other, other_public = write_key(tmp_path / "ed", ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)))
    old, old_public = write_key(tmp_path / "old", ec.derive_private_key(99, ec.SECP256K1()))
    text = tmp_path / "text.pem"
    text.write_text("no key")
    signature = read_signature(str(tree))
    for key in (locked, other, old, text, keys[1]):
        with pytest.raises(UsageError, match=r"a private key of the curve P-256.* without a password"):
            sign(tree, key)
    for key in (other_public, old_public, text, keys[0]):
        with pytest.raises(UsageError, match=r"a public key of the curve P-256"):
            check_signature(tree, signature, key)
    with pytest.raises(UsageError, match="does not exist"):
        sign(tree, tmp_path / "none.pem")
    assert contents(tree) == before


def test_copies_of_some_views_and_unfinished_archives_are_not_signed(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
):
    copy = fetch_archive(str(signed / "a.redistill"), tmp_path / "copy", views=1)
    with pytest.raises(Refused, match="signing it is not possible"):
        sign(copy, keys[0])
    (tmp_path / "p").mkdir()
    (tmp_path / "p/manifest.json").write_text("{}")
    with pytest.raises(Damaged, match="does not match its own hash"):
        sign(tmp_path / "p", keys[0])


def test_the_extra_is_named_where_it_is_not_installed(signed: Path, keys: tuple[Path, Path]):
    with pytest.raises(Refused, match=r"pip install 'redistill\[sign\]'"):
        signing.module("model_signing.there_is_no_such_module")


def test_the_tool_of_the_library_accepts_the_signature(signed: Path, keys: tuple[Path, Path], tmp_path: Path):
    """Who has no redistill can check a signature as well."""
    folder = signed / "a.redistill"
    command = [
        *("model_signing", "verify", "key", str(folder / "manifest.json")),
        *("--signature", str(folder / "manifest.json.sig"), "--public_key", str(keys[1])),
    ]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_commands(signed: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys):
    shutil.copytree(signed / "a.redistill.zarr", tmp_path / "a")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["redistill", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), *capsys.readouterr()

    assert "; it has a signature, which --signature --key checks\n" in run("verify", tmp_path / "a")[1]
    (tmp_path / "a/_redistill/manifest.json.sig").unlink()
    code, out, err = run("verify", tmp_path / "a")
    assert (code, err) == (0, "")
    assert out.endswith("; not signed\n")
    check = ("verify", tmp_path / "a", "--signature", "--key", keys[1])
    code, out, err = run(*check)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "is not signed" in err
    assert run("archive", "sign", tmp_path / "a", "--key", keys[0])[0] == 0
    code, out, err = run(*check)
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'a'}: signed with the private key of {keys[1]}" in out
    assert json.loads(run(*check, "--json")[1])["signed_id"] == open_archive(tmp_path / "a").id
    assert run("verify", signed / "a.redistill", "--signature", "--key", keys[1])[0] == 0
    assert run("archive", "fetch", signed / "a.redistill", tmp_path / "part", "--views", "1")[0] == 0
    code, out, err = run("verify", tmp_path / "part", "--signature", "--key", keys[1])
    assert (code, err) == (0, "")
    assert f"signed with the private key of {keys[1]}; so are the hashes of the files that are not here" in out
    assert run("archive", "edit", tmp_path / "a", "--licence", "MIT")[0] == 0
    code, out, err = run(*check)
    assert (code, out) == (1, "")
    assert "of another manifest" in err
    for alone in (("--signature",), ("--key", keys[1])):
        code, out, err = run("verify", tmp_path / "a", *alone)
        assert code == 2
        assert "--signature and --key go together" in err
    shard = tmp_path / "a/views/flip/c.0.0"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert run(*check)[0] == 4
