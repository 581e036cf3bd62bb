"""Signatures of archives: of the manifest, which has the hash of every other file, with a key of the author.

They are bundles of the `model_signing` library (OpenSSF Model Signing), in a file beside the manifest. Readers never
look at them; `redistill verify --signature` does.
"""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from redistill_cache import layout, limits, open_archive, packed
from redistill_cache.addresses import is_address, parse_address, split_pin
from redistill_cache.copies import refuse_partial_copy
from redistill_cache.download import is_missing, read_address
from redistill_cache.errors import RedistillError, Refused, UsageError
from redistill_cache.journal import parse_header, sha256
from redistill_cache.storage import LOCAL, disk_trouble, read_small
from redistill_cache.strict_json import Fields, parse
from redistill_cache.wording import one_line

__all__ = ["BadSignature", "check_signature", "read_signature", "sign"]

MOST_KEY_BYTES = 1 << 16
CURVES = "of the curve P-256, P-384 or P-521"
PRIVATE_KEY = (
    f"a PEM file with a private key {CURVES} and without a password; this makes one: "
    "openssl ecparam -name prime256v1 -genkey -noout -out private.pem"
)
PUBLIC_KEY = (
    f"a PEM file with a public key {CURVES}; this makes the one of a private key: "
    "openssl ec -in private.pem -pubout -out public.pem"
)
# What the library raises for a key or a bundle that it does not understand.
NOT_UNDERSTOOD = (ValueError, LookupError, TypeError, AttributeError)


class BadSignature(RedistillError):
    """An archive has no signature, or one that does not fit."""

    exit_code = 1


def sign(archive: Path, key: Path) -> Path:
    """Sign a finished archive, packed or not, with a private key; returns the file with the signature."""
    library = module("model_signing.signing")
    is_packed = packed.is_packed(archive)
    with disk_trouble("read", archive):
        if not is_packed:
            refuse_partial_copy(archive, "signing it")
            open_archive(archive)
        manifest = read_manifest(archive)
    check_key(key)
    with tempfile.TemporaryDirectory() as folder:
        try:
            signer = library.Config().use_elliptic_key_signer(private_key=key)
        except NOT_UNDERSTOOD:
            raise UsageError(f"--key {key} must be {PRIVATE_KEY}") from None
        signer.sign(put(folder, packed.MANIFEST, manifest), Path(folder) / "signature")
        data = (Path(folder) / "signature").read_bytes()
    path = archive / (packed.SIGNATURE if is_packed else layout.SIGNATURE)
    with disk_trouble("write", path):
        LOCAL.publish(path.absolute(), data)
    return path


def read_manifest(archive: Path) -> bytes:
    path = archive / (packed.MANIFEST if packed.is_packed(archive) else layout.MANIFEST)
    manifest = read_small(path, limits.MAX_MANIFEST_BYTES)
    parse_header(manifest, str(path))
    return manifest


def read_signature(location: str) -> bytes:
    """The file beside the manifest of the archive at a path or an address."""
    if is_address(location):
        address = parse_address(location)
        for name in (layout.SIGNATURE, packed.SIGNATURE):
            try:
                return read_address(address.child(name), limits.MAX_RECORD_BYTES)
            except Refused as error:
                if not is_missing(error.__cause__):
                    raise
        raise BadSignature(f"{address} is not signed: it has no {layout.SIGNATURE} and no {packed.SIGNATURE}")
    folder = Path(split_pin(location)[0])
    path = folder / (packed.SIGNATURE if packed.is_packed(folder) else layout.SIGNATURE)
    with disk_trouble("read", path):
        try:
            return read_small(path, limits.MAX_RECORD_BYTES)
        except FileNotFoundError:
            raise BadSignature(f"{folder} is not signed: it has no {path.relative_to(folder)}") from None


def check_signature(archive: Path, signature: bytes, key: Path) -> str:
    """`BadSignature` unless it is of this archive, made with the private key of the public `key`; returns the id."""
    library, invalid = module("model_signing.verifying"), module("cryptography.exceptions").InvalidSignature
    check_key(key)
    try:
        verifier = library.Config().use_elliptic_key_verifier(public_key=key)
    except NOT_UNDERSTOOD:
        raise UsageError(f"--key {key} must be {PUBLIC_KEY}") from None
    with disk_trouble("read", archive):
        manifest = read_manifest(archive)
    try:
        # The library reads JSON of any depth, and says on stdout where a bundle does not name its key.
        bundle = Fields(parse(signature, cap=limits.MAX_RECORD_BYTES, where="it"), "it")
        named = Fields(Fields(bundle.mapping("verificationMaterial"), "it").mapping("publicKey"), "it")
        if not named.text("hint", 64):
            named.refuse("hint", "the SHA-256 of a public key")
        with tempfile.TemporaryDirectory() as folder:
            verifier.verify(put(folder, packed.MANIFEST, manifest), put(folder, "signature", signature))
    except (*NOT_UNDERSTOOD, Refused, invalid) as error:
        text = one_line(error)
        reason = f"it is no bundle of model_signing ({text})"
        if isinstance(error, invalid) or text.startswith("Key mismatch"):
            reason = f"it was not made with the private key of {key}, or was changed"
        if text.startswith("Signature mismatch"):
            reason = "it is of another manifest: this is another archive, or it was changed after it was signed"
        raise BadSignature(f"the signature of {archive} does not fit: {reason}") from None
    return sha256(manifest)


def put(folder: str, name: str, data: bytes) -> Path:
    """A file for the library, which takes paths only."""
    path = Path(folder) / name
    path.write_bytes(data)
    return path


def check_key(key: Path) -> None:
    with disk_trouble("read", key):
        try:
            read_small(key, MOST_KEY_BYTES)
        except FileNotFoundError:
            raise UsageError(f"--key {key} does not exist; expected a PEM file") from None


def module(name: str) -> Any:  # noqa: ANN401  untyped here: the packages are of an extra
    """A module of the packages that make and check signatures."""
    try:
        return import_module(name)
    except ImportError as error:
        raise Refused(
            f"signatures need packages that are not installed ({one_line(error)}); pip install 'redistill[sign]'"
        ) from None
