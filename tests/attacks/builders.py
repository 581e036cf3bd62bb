"""Builders of attacks: each takes the change to make and returns a function that attacks the archive at a path."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd
from redistill_cache import layout
from redistill_cache.codecs.linear_decode import EXACT
from redistill_cache.journal import sha256
from redistill_cache.spec import SideArray
from redistill_cache.strict_json import canonical

from tests.attacks.forge import (
    MANIFEST,
    Change,
    documents,
    edit,
    edit_teacher,
    forge,
    parsed,
    put_rows,
    read,
    read_manifest,
    repeated_shard,
    reseal,
    shard_of,
)
from tests.faults.scenario import CANARIES, CLASSES, SAMPLES, SPEC, codec, teacher
from tests.faults.scenario import KEYS as HONEST_KEYS

__all__ = [
    "KEYS",
    "LEVEL",
    "Attack",
    "array_field",
    "billion_samples",
    "canary_row",
    "chunk",
    "copied_record",
    "exact_value",
    "extra_file",
    "field",
    "file_for_folder",
    "first_view_array",
    "flags",
    "index",
    "instead",
    "key_bomb",
    "large_chunk",
    "lines",
    "link",
    "listening",
    "many_arrays",
    "many_lines",
    "many_records",
    "merged_errors",
    "merged_statistics",
    "metadata_field",
    "nested",
    "other_keys",
    "other_samples",
    "record",
    "seed",
    "side_bomb",
    "side_value",
    "signal_field",
    "stated_size",
    "statistics",
    "statistics_of",
    "teachers_named",
    "text_of",
    "unsealed",
    "whole_text",
    "zstd_bomb",
]

Attack = Callable[[Path], object]
LEVEL = "teachers/net/logits/level"
KEYS = "samples/key_bytes"


# -- documents --------------------------------------------------------------------------------------------------------


def field(name: str, value: object) -> Attack:
    return lambda path: edit(path, lambda root: root.update({name: value}))


def first_view_array(**changes: object) -> Attack:
    return lambda path: edit(path, lambda root: root["view_arrays"][0].update(changes))


def signal_field(change: Change) -> Attack:
    return lambda path: edit_teacher(path, lambda value: change(value["signals"][0]))


def array_field(name: str, **changes: object) -> Attack:
    def change(signal: dict[str, Any]) -> None:
        next(array for array in signal["arrays"] if array["name"] == name).update(changes)

    return signal_field(change)


def text_of(name: str, old: bytes, new: bytes) -> Attack:
    """Replace bytes in a document and update every hash."""

    def attack(path: Path) -> None:
        data = (path / name).read_bytes()
        assert old in data
        (path / name).write_bytes(data.replace(old, new, 1))
        reseal(path)

    return attack


def whole_text(name: str, data: bytes) -> Attack:
    return lambda path: (path / name).write_bytes(data)


def seed(text: bytes) -> Attack:
    return text_of("zarr.json", b'"seed":0', b'"seed":' + text)


def metadata_field(name: str, **changes: object) -> Attack:
    """A change of the zarr.json of an array, which a reader never parses."""

    def attack(path: Path) -> None:
        file = path / name / "zarr.json"
        file.write_bytes(canonical(read(file) | changes))
        reseal(path)

    return attack


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def billion_samples(path: Path) -> None:
    """As many samples as the limits of files, blocks and chunks allow, without any data."""
    root, teachers = documents(path)
    root |= {"num_samples": 10**9, "block_rows": 2**24}
    for array in [*root["view_arrays"], *teachers["net"]["signals"][0]["arrays"]]:
        array["chunk_rows"] = 2**14
    forge(path, root, teachers)


def many_arrays(path: Path) -> None:
    """Four teachers with 2,048 valid arrays each."""
    root, teachers = documents(path)
    signal = teachers["net"]["signals"][0]
    array = {"name": "q", "dtype": "uint8", "row_shape": [], "chunk_rows": 8, "transpose": False, "level": 3}
    arrays = [array | {"name": f"a{i}"} for i in range(64)]
    signals = [signal | {"name": f"s{i}", "arrays": arrays} for i in range(32)]
    forge(path, root, {f"net{i}": teachers["net"] | {"name": f"net{i}", "signals": signals} for i in range(4)})
    reseal(path, teachers={f"net{i}": {} for i in range(4)})


# -- the manifest -----------------------------------------------------------------------------------------------------


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Attack:
    """Change the lines of the manifest and update its hash."""

    def attack(path: Path) -> None:
        data = (path / MANIFEST).read_bytes()
        head, tail = data.index(b'"files":[\n') + len(b'"files":[\n'), data.rindex(b'],"sha256"')
        changed = change(data[head:tail].rstrip(b"\n").split(b",\n"))
        body = data[:head] + b",\n".join(changed) + b"\n"
        (path / MANIFEST).write_bytes(body + b'],"sha256":"' + sha256(body).encode() + b'"}\n')

    return attack


def many_lines(count: int) -> Attack:
    more = [b'["zz%07d",1,"%s"]' % (i, b"0" * 64) for i in range(count)]
    return lines(lambda old: old + more)


def teachers_named(*names: str) -> Attack:
    """The manifest also lists these teachers; each has a document at the path its name gives."""

    def attack(path: Path) -> None:
        stats = read_manifest(path).teachers
        for name in names:
            target = path / "teachers" / name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path / "teachers/net/zarr.json", target)
        reseal(path, teachers=dict(stats) | {name: {} for name in names})

    return attack


def statistics_of(signals: object) -> Attack:
    return lambda path: reseal(path, teachers={"net": signals})


def statistics(value: object) -> Attack:
    return statistics_of({"logits": value})


def merged_statistics(**changes: object) -> Attack:
    """The honest statistics of the manifest with these members replaced."""
    return lambda path: statistics(read_manifest(path).teachers["net"]["logits"] | changes)(path)


def merged_errors(**changes: object) -> Attack:
    def attack(path: Path) -> None:
        errors = read_manifest(path).teachers["net"]["logits"]["errors"]
        merged_statistics(errors={name: value | changes for name, value in errors.items()})(path)

    return attack


# -- shards -----------------------------------------------------------------------------------------------------------


def zstd_bomb(path: Path) -> None:
    """A chunk that decompresses to a gigabyte of zeros, with a correct index, hashes and manifest."""
    (path / f"{LEVEL}/c.1.0").write_bytes(shard_of([bytes(zstd.compress(bytes(1 << 30), 1))]))
    reseal(path)


def chunk(make: Callable[[bytes], bytes]) -> Attack:
    """Another frame in place of the first chunk of a shard."""

    def attack(path: Path) -> None:
        honest = zstd.Zstd(level=3, checksum=True).encode(bytes(8))
        (path / "views/flip/c.0.1").write_bytes(shard_of([make(bytes(honest))], chunks=2))
        reseal(path)

    return attack


def large_chunk(path: Path) -> None:
    """A chunk of 8 bytes followed by a skippable frame, in a file that is not too large for its two chunks."""
    honest = bytes(zstd.Zstd(level=3, checksum=True).encode(bytes(8)))
    skippable = b"\x50\x2a\x4d\x18" + (1100).to_bytes(4, "little") + bytes(1100)
    (path / "views/flip/c.0.0").write_bytes(shard_of([honest + skippable, honest]))
    reseal(path)


def index(change: Callable[[np.ndarray], object]) -> Attack:
    """A wrong index with a correct checksum: entries [chunk, (offset, size)] of two chunks of 8 rows."""

    def attack(path: Path) -> None:
        shard = path / "views/crop/c.0.0.0"
        data = shard.read_bytes()
        entries = np.frombuffer(data[-36:-4], "<u8").reshape(2, 2).copy()
        change(entries)
        body = entries.tobytes()
        shard.write_bytes(data[:-36] + body + google_crc32c.value(body).to_bytes(4, "little"))
        reseal(path)

    return attack


def key_bomb(total: int, samples: int = SAMPLES) -> Attack:
    """Keys of `total` zero bytes, which take hardly any stored bytes."""

    def attack(path: Path) -> None:
        root, teachers = documents(path)
        root |= {"num_samples": samples, "block_rows": 1 << 17}
        forge(path, root, teachers)
        specs = parsed(root, teachers)
        assert specs is not None
        arrays = layout.sample_arrays(specs[0], total)
        offsets = np.zeros(samples + 1, np.uint64)
        offsets[1:] = total - samples + 1 + np.arange(samples)
        put_rows(path, arrays["key_offsets"], offsets)
        put_rows(path, arrays["digest"], np.zeros((samples, 32), np.uint8))
        (path / f"{KEYS}/c.0").write_bytes(repeated_shard(arrays["key_bytes"]))
        (path / f"{KEYS}/zarr.json").write_bytes(arrays["key_bytes"].metadata_bytes())
        reseal(path, teachers={"net": {}})  # statistics are of another number of rows

    return attack


def side_bomb(path: Path) -> None:
    """256 MiB of side data stored in some kilobytes."""
    root, teachers = documents(path)
    side = SideArray("basis_low", "uint8", (256, 1 << 20))
    signal = teachers["net"]["signals"][0]
    signal["side"] = [side.to_json()]
    forge(path, root, teachers)
    specs = parsed(root, teachers)
    assert specs is not None
    array = layout.side_arrays(specs[1]["net"])["logits/basis_low"]
    (path / array.shard_path(0, 0)).write_bytes(repeated_shard(array))
    reseal(path)


def side_value(name: str, value: float) -> Attack:
    """The first value of an array of side data is another."""

    def attack(path: Path) -> None:
        values = codec().side()[name].copy()
        values[0] = value
        put_rows(path, layout.side_arrays(teacher())[f"logits/{name}"], values)
        reseal(path)

    return attack


def other_samples(name: str, rows: np.ndarray) -> Attack:
    def attack(path: Path) -> None:
        put_rows(path, layout.sample_arrays(SPEC, 1)[name], rows)
        reseal(path)

    return attack


def other_keys(change: Callable[[list[bytes]], object]) -> Attack:
    """The same samples under changed keys."""

    def attack(path: Path) -> None:
        keys = [key.encode() for key in HONEST_KEYS]
        change(keys)
        data = np.frombuffer(b"".join(keys), np.uint8)
        arrays = layout.sample_arrays(SPEC, len(data))
        put_rows(path, arrays["key_bytes"], data)
        put_rows(path, arrays["key_offsets"], np.cumsum([0, *map(len, keys)]).astype(np.uint64))
        (path / f"{KEYS}/zarr.json").write_bytes(arrays["key_bytes"].metadata_bytes())
        reseal(path)

    return attack


def canary_row(row: int) -> Attack:
    """All canaries are this row."""

    def attack(path: Path) -> None:
        put_rows(path, layout.canary_arrays(SPEC)["row"], np.full(CANARIES, row, np.uint32))
        reseal(path)

    return attack


def stated_size(name: str, size: int) -> Attack:
    """The manifest states another size of a file."""
    start = f'["{name}",'.encode()

    def change(old: list[bytes]) -> list[bytes]:
        assert any(line.startswith(start) for line in old)
        return [start + b"%d,%b" % (size, line.rpartition(b",")[2]) if line.startswith(start) else line for line in old]

    return lines(change)


def flags(path: Path) -> None:
    """Every row is flagged as stored exactly, but the shard of exact rows is empty."""
    array = layout.teacher_arrays(SPEC.resolved(), teacher().resolved(16))["logits/level"]
    put_rows(path, array, np.full(16, 0xFF, np.uint8))
    (path / "teachers/net/logits/exact/c.0.0.0").write_bytes(b"")
    reseal(path)


def exact_value(value: float) -> Attack:
    """A row that is stored exactly holds this value, with every hash renewed."""

    def attack(path: Path) -> None:
        arrays = layout.teacher_arrays(SPEC.resolved(), teacher().resolved(16))
        level = np.zeros(16, np.uint8)
        level[3] = EXACT
        exact = np.zeros((16, CLASSES), np.float32)
        exact[3, 2] = value
        put_rows(path, arrays["logits/level"], level)
        put_rows(path, arrays["logits/exact"], exact)
        reseal(path)

    return attack


# -- files and folders ------------------------------------------------------------------------------------------------


def link(name: str) -> Attack:
    def attack(path: Path) -> None:
        target = path.parent / "elsewhere"
        (path / name).rename(target)
        (path / name).symlink_to(target)

    return attack


def instead(name: str, make: Callable[[Path], object]) -> Attack:
    """Replace a file by something that is not one."""

    def attack(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return attack


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        short = Path("/tmp") / f"redistill-{os.getpid()}.socket"
        server.bind(str(short))
        shutil.move(short, path)


def extra_file(name: str) -> Attack:
    def attack(path: Path) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")

    return attack


def file_for_folder(path: Path) -> None:
    shutil.rmtree(path / "views")
    (path / "views").write_bytes(b"")


# -- without a manifest -----------------------------------------------------------------------------------------------


def unsealed(attack: Attack) -> Attack:
    def both(path: Path) -> None:
        attack(path)
        (path / MANIFEST).unlink()

    return both


def record(block: str, change: Change) -> Attack:
    """Change a commit record and update its hash."""

    def attack(path: Path) -> None:
        file = path / layout.BLOCKS / f"{block}.json"
        value = read(file)
        change(value)
        value.pop("sha256")
        file.write_bytes(canonical(value | {"sha256": sha256(canonical(value))}))

    return attack


def copied_record(old: str, new: str) -> Attack:
    return lambda path: shutil.copy(path / layout.BLOCKS / f"{old}.json", path / layout.BLOCKS / f"{new}.json")


def many_records(path: Path) -> None:
    """Records of blocks that do not exist: 20,000 of them, and one of a mebibyte."""
    for i in range(20_000):
        (path / layout.BLOCKS / f"views.{i}.9.json").write_bytes(b"{}")
    (path / layout.BLOCKS / "views.0.1.json").write_bytes(b'{"part":[' + b"{}," * 300_000 + b"{}]}")
