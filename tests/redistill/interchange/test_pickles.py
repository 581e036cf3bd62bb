"""Files of torch.save, honest and hostile."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from redistill_cache.errors import Refused

from redistill.interchange import pickles
from redistill.interchange.pickles import array_of, load_torch


def saved(path: Path, value: object, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def in_zip(path: Path, data: bytes, extra: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"a/data.pkl": data, "a/byteorder": b"little", **(extra or {})}.items():
            archive.writestr(name, content)
    return path


def in_legacy(path: Path, data: bytes) -> Path:
    file = io.BytesIO()
    torch.save([], file, _use_new_zipfile_serialization=False)
    content = file.getvalue()
    whole = pickle.dumps([], 2)
    at = content.index(whole)
    path.write_bytes(content[:at] + data + content[at + len(whole) :])
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_arrays_and_tensors_are_read_in_both_forms(tmp_path: Path, legacy: bool):
    """Types, orders, views of one storage and scalars, as torch.save writes them."""
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = [table, table.astype(np.float16), np.asfortranarray(table), table.astype(">f8"), table > 3, np.zeros(0)]
    base = torch.arange(24.0).reshape(4, 6)
    tensors = [base, base[1:, ::2], base.t(), base.half(), base.bfloat16(), base.long(), torch.zeros(0, 3), base > 2]
    plain = {"n": 3, "x": [1.5, None, "text"], "scalar": np.float32(2.5), "ordered": OrderedDict()}
    path = saved(tmp_path / "f.tar", [arrays, tensors, plain], legacy=legacy)
    read_arrays, read_tensors, read_plain = load_torch(path)
    for expected, found in zip(arrays, read_arrays, strict=True):
        array = array_of(found, "it")
        assert array.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(array, expected)
    for expected, found in zip(tensors, read_tensors, strict=True):
        np.testing.assert_array_equal(array_of(found, "it"), expected.float().numpy())
    assert read_plain == plain
    assert not array_of([], "it").size
    with pytest.raises(Refused, match="expected labels as an array, found str"):
        array_of("no", "labels")


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    pass


MARK = "redistill_attack"
HOSTILE = {
    "posix.system": Calls(os.system, f"touch {MARK}"),
    "builtins.eval": Calls(builtins.eval, f"open({MARK!r}, 'w')"),
    "builtins.exec": [1, {"deep": (2, [Calls(builtins.exec, f"open({MARK!r}, 'w')")])}],
    "builtins.getattr": Calls(getattr, "text", "format"),
    "builtins.bytearray": Calls(bytearray, 1 << 40),
    "numpy.load": Calls(np.load, MARK),
    "numpy.zeros": Calls(np.zeros, 1 << 40),
    "torch.serialization.load": Calls(torch.load, MARK),
    "torch.load": None,
    "NEWOBJ": Plain(),
}


def hostile_pickle(name: str, value: object) -> bytes:
    if value is None:
        module, _, attribute = name.rpartition(".")
        return b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\n."
    return pickle.dumps(value, 2)


@pytest.mark.parametrize("place", [in_zip, in_legacy])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_runs_code_is_refused_with_its_name(tmp_path: Path, monkeypatch, name: str, place):
    monkeypatch.chdir(tmp_path)
    path = place(tmp_path / "f.tar", hostile_pickle(name, HOSTILE[name]))
    load_torch(place(tmp_path / "honest.tar", pickle.dumps([], 2)))  # imports what reading needs
    before = set(sys.modules)
    with pytest.raises(Refused) as refusal:
        load_torch(path)
    shown = name.replace("builtins", "__builtin__") if name.startswith("builtins") else name
    assert shown in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / MARK).exists()
    assert set(sys.modules) == before


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


CRAFTED = {
    # (state, slots) of BUILD would set attributes of a function for the whole process
    "changes": b"\x80\x02" + global_("_codecs", "encode") + b"N}X\x05\x00\x00\x00_callK\x01s\x86b.",
    "another way": b"\x80\x02" + global_("numpy", "ndarray") + b"K\x05\x85R.",
    "repeats its content": (
        b"\x80\x02]q\x00(" + global_("_codecs", "encode") + b"q\x01X\x00\x10\x00\x00" + b"a" * 4096 + b"q\x02"
        b"X\x06\x00\x00\x00latin1q\x03" + b"h\x01h\x02h\x03\x86R" * 1000 + b"e."
    ),
    "with gaps": b"\x80\x02]r\xff\xff\xff\x7f.",
    "BYTEARRAY8": b"\x80\x05\x96" + (4).to_bytes(8, "little") + b"abcd.",
    "truncated": b"\x80\x04\x8e" + (1 << 50).to_bytes(8, "little") + b"abc.",
    "unknown way": b"\x80\x02X\x03\x00\x00\x00abcQ.",
    "objects": pickle.dumps(np.array([None]), 2),
    "<U": pickle.dumps(np.array(["text"]), 2),
}


@pytest.mark.parametrize("reason", CRAFTED)
def test_what_takes_memory_or_lies_about_arrays_is_refused(tmp_path: Path, reason: str):
    path = in_zip(tmp_path / "f.tar", CRAFTED[reason])
    with pytest.raises(Refused) as refusal:
        array_of(load_torch(path), "labels")
    expected = {"<U": "found one of 'U4'", "truncated": "truncated or damaged"}.get(reason, reason)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def tensor_pickle(offset: int, size: tuple, stride: tuple, count: int) -> bytes:
    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (STORAGE, offset, size, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if value is STORAGE else None

    file = io.BytesIO()
    Pickler(file, 2).dump(Tensor())
    return file.getvalue()


STORAGE = object()


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ((0, (2, 2), (2, 1), 4), None),
        ((1, (2, 2), (2, 1), 4), "beyond its numbers"),
        ((0, (1 << 40,), (0,), 4), "beyond its numbers"),
        ((0, (2, 2), (-2, 1), 4), "beyond its numbers"),
        ((0, (2, 2), (2, 1), 1 << 40), "has 16 bytes"),
        ((0, (2, 2), (2,), 4), "beyond its numbers"),
    ],
)
def test_a_tensor_stays_within_its_numbers(tmp_path: Path, tensor: tuple, reason: str | None):
    numbers = np.arange(4, dtype=np.float32)
    path = in_zip(tmp_path / "f.tar", tensor_pickle(*tensor), {"a/data/0": numbers.tobytes()})
    if reason is None:
        np.testing.assert_array_equal(load_torch(path), numbers.reshape(2, 2))
        return
    with pytest.raises(Refused, match=reason):
        load_torch(path)


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path):
    """Cut at every length, in both forms; an entry that expands; and names that leave the folder are not followed."""
    for legacy in (False, True):
        whole = saved(tmp_path / "f.tar", [np.ones(3), torch.ones(3)], legacy=legacy).read_bytes()
        for length in range(0, len(whole) - 1, 7):
            (tmp_path / "cut.tar").write_bytes(whole[:length])
            with pytest.raises(Refused) as refusal:
                load_torch(tmp_path / "cut.tar")
            assert "\n" not in str(refusal.value)
    with zipfile.ZipFile(tmp_path / "bomb.tar", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * (8 << 20))
    with pytest.raises(Refused, match="would take more than its"):
        load_torch(tmp_path / "bomb.tar")
    outside = in_zip(tmp_path / "up.tar", pickle.dumps([1], 2), {"../../escaped": b"x"})
    assert load_torch(outside) == [1]
    assert not (tmp_path.parent.parent / "escaped").exists()
    (tmp_path / "link.tar").symlink_to(outside)
    with pytest.raises(Refused, match="symbolic link"):
        load_torch(tmp_path / "link.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(Refused, match="not a regular file"):
        load_torch(tmp_path / "pipe.tar")


def test_a_file_above_the_limit_is_not_read(tmp_path: Path, monkeypatch):
    path = saved(tmp_path / "f.tar", [1])
    monkeypatch.setattr(pickles, "MAX_FILE_BYTES", 100)
    with pytest.raises(Refused, match="more than the limit of 100"):
        load_torch(path)
