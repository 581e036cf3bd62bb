"""`wds:`: samples, keys and patterns, and tars that are truncated, hostile or malformed."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from braceexpand import braceexpand
from PIL import Image
from redistill_cache import download
from redistill_cache.errors import Refused, UsageError

import redistill
from redistill.sources.base import ListedSource
from redistill.sources.images import BadImage
from redistill.sources.index import index_source
from redistill.sources.wds import _count
from redistill.specs import Spec


def picture(seed: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 6, 3), np.uint8)).save(out, kind)
    return out.getvalue()


Member = tuple[str, bytes] | tarfile.TarInfo


def pack(path: Path, members: Iterable[Member], *, style: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=style) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def shard(path: Path, first: int, n: int) -> Path:
    samples = range(first, first + n)
    return pack(
        path, [m for i in samples for m in ((f"x/{i:04d}.png", picture(i)), (f"x/{i:04d}.cls", b"%d" % (i % 5)))]
    )


def refusal(text: str) -> str:
    with pytest.raises(Refused) as refused:
        redistill.open_source(text)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_labels_and_bytes(tmp_path: Path, style: int):
    members: list[Member] = [
        special("train", tarfile.DIRTYPE),
        ("train/a.b/0001.jpg", picture(1, "JPEG")),
        ("train/a.b/0001.cls", b" 3\n"),
        ("train/a.b/0001.json", b'{"label": 8}'),
        ("train/a.b/0001.seg.png", b"a mask, not the image"),
        ("./two.json", b'{"caption": "x", "class": 7}'),
        ("./two.WEBP", picture(2, "WEBP")),
        ("./two.pyd", b"\x80\x04never read"),
        ("README", b"no dot"),
        ("notes.txt", b"no image and no label"),
        (".hidden.png", b"hidden"),
        ("dé/" + "long" * 20 + "/3.jpeg", picture(3, "JPEG")),
        ("dé/" + "long" * 20 + "/3.cls", b"0"),
    ]
    source = redistill.open_source(f"wds:{pack(tmp_path / 'a.tar', members, style=style)}")
    assert isinstance(source, ListedSource)
    assert list(source.keys) == ["train/a.b/0001", "./two", "dé/" + "long" * 20 + "/3"]
    assert source.labels.tolist() == [3, 7, 0]
    assert source.class_names is None
    assert [source.sample(i).payload for i in (2, 0, 1)] == [
        picture(3, "JPEG"),
        picture(1, "JPEG"),
        picture(2, "WEBP"),
    ]
    assert source.sample(1).key == "./two"


def test_braces_folders_and_bare_paths(tmp_path: Path):
    for i in range(12):
        shard(tmp_path / f"s-{i:02d}.tar", 10 * i, 3)
    by_braces = redistill.open_source(f"wds:{tmp_path}/s-{{00..11}}.tar")
    assert len(by_braces) == 36
    assert by_braces.keys[35] == "x/0112"
    assert by_braces.sample(35).payload == picture(112)
    assert list(redistill.open_source(f"wds:{tmp_path}").keys) == list(by_braces.keys)
    assert list(redistill.open_source(tmp_path).keys) == list(by_braces.keys)
    assert list(redistill.open_source(f"{tmp_path}/s-{{03,01}}.tar").keys) == [
        f"x/{i:04d}" for i in (30, 31, 32, 10, 11, 12)
    ]
    assert "s-12.tar'" in refusal(f"wds:{tmp_path}/s-{{00..12}}.tar")


def test_the_same_samples_as_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    members = [(f"d.x/{i}.{e}", c) for i in range(4) for e, c in (("png", picture(i)), ("cls", b"1"), ("a.txt", b"t"))]
    with pack(tmp_path / "a.tar", members).open("rb") as file:
        expected = [
            (s["__key__"], s["png"]) for s in group_by_keys({**m, "__url__": ""} for m in tar_file_iterator(file))
        ]
    source = redistill.open_source(f"wds:{tmp_path / 'a.tar'}")
    assert [(s.key, s.payload) for s in (source.sample(i) for i in range(len(source)))] == expected


def test_pickled_and_indexed_with_processes_and_cached(tmp_path: Path):
    tars = [shard(tmp_path / f"{i}.tar", 100 * i, 20) for i in range(2)]
    for tar in tars:
        os.utime(tar, (1e9, 1e9))
    source = redistill.open_source(f"wds:{tmp_path}/{{0,1}}.tar")
    again = pickle.loads(pickle.dumps(source))
    assert again.sample(33).payload == source.sample(33).payload == picture(113)
    first = index_source(source, workers=2)
    assert (first.reused, first.sizes.tolist()) == (0, [[8, 6]] * 40)
    shard(tars[1], 100, 20)
    assert index_source(redistill.open_source(source.spec)).reused == 20
    with pytest.raises(Refused, match=r"1\.tar' changed since it was opened"):
        source.sample(30)
    assert source.sample(3).payload == picture(3)


def test_labels_none_needs_no_labels(tmp_path: Path):
    tar = pack(tmp_path / "a.tar", [("1.png", picture(1)), ("2.png", picture(2)), ("2.cls", b"not a number")])
    source = redistill.open_source(f"wds:{tar}?labels=none")
    assert source.labels.tolist() == [-1, -1]
    assert "'1'" in (message := refusal(f"wds:{tar}"))
    assert "has no label" in message


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (("cls", b"one"), "cannot be read"),
        (("cls", "\u0661".encode()), "cannot be read"),
        (("cls", b"-1"), "found -1"),
        (("cls", b"9" * 5000), "cannot be read"),
        (("cls", b"99999999999"), "an integer from 0"),
        (("json", b'{"cls": true}'), "found True"),
        (("json", b'{"cls": "3"}'), "an integer from 0"),
        (("json", b'{"cls": 3.5}'), "found 3.5"),
        (("json", b'{"other": 3}'), "has no label"),
        (("json", b"[3]"), "has no label"),
        (("json", b'{"cls": 3'), "cannot be read"),
        (("json", b"\xff\xfe\xff"), "cannot be read"),
        (("json", b"[" * 100_000), "cannot be read"),
    ],
)
def test_invalid_labels_are_refused(tmp_path: Path, label: tuple[str, bytes], expected: str):
    tar = pack(tmp_path / "a.tar", [("d/7.png", picture(1)), (f"d/7.{label[0]}", label[1])])
    message = refusal(f"wds:{tar}")
    assert "'d/7'" in message
    assert expected in message


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("1.png", b"x"), ("2.png", b"y"), ("1.cls", b"1"), ("2.cls", b"2")], r"members of '1' .* not adjacent"),
        ([("1.png", b"x"), ("1.cls", b"1"), ("1.png", b"y")], r"'1\.png' is in .* twice"),
        ([("1.png", b"x"), ("1.jpg", b"y"), ("1.cls", b"1")], r"'1' .* has 2 images \(jpg, png\)"),
        ([("1.cls", b"1")], r"'1' .* has no image"),
        ([("1.txt", b"1")], r"no images in"),
        ([], r"no images in"),
        ([("1.png", b"x"), ("1.cls", b"1"), special("2.png", tarfile.SYMTYPE, "/etc/passwd")], r"'2\.png' .* link"),
        ([("1.png", b"x"), ("1.cls", b"1"), special("2.png", tarfile.LNKTYPE, "1.png")], r"'2\.png' .* link"),
        ([special("2.png", tarfile.CHRTYPE)], r"'2\.png' .* special"),
        ([special("2.png", tarfile.FIFOTYPE)], r"'2\.png' .* special"),
        ([("a\udcff.png", b"x"), ("a\udcff.cls", b"1")], r"not UTF-8"),
    ],
)
def test_malformed_tars_are_refused_by_name(tmp_path: Path, members: list[Member], expected: str):
    tar = pack(tmp_path / "a.tar", members, style=tarfile.GNU_FORMAT)
    with pytest.raises(Refused, match=expected):
        redistill.open_source(f"wds:{tar}")


def test_a_key_in_two_tars_is_refused(tmp_path: Path):
    for name in "ab":
        shard(tmp_path / f"{name}.tar", 0, 2)
    message = refusal(f"wds:{tmp_path}/{{a,b}}.tar")
    assert "'x/0000'" in message
    assert "b.tar" in message


def test_a_tar_truncated_anywhere_is_refused(tmp_path: Path):
    whole = shard(tmp_path / "a.tar", 0, 3).read_bytes()
    end = whole.rstrip(b"\0")  # the end mark is two blocks of zeros, then padding
    used = -(-len(end) // 512) * 512
    cuts = {0, 1, 511, 512, 513, used - 512, used - 1, used, used + 1, used + 511, *range(100, used, 397)}
    for cut in sorted(cuts):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        assert "a.tar" in refusal(f"wds:{tmp_path}/a.tar"), cut


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path):
    tar = shard(tmp_path / "a.tar", 0, 3)
    data = bytearray(tar.read_bytes())
    at = data.index(b"x/0001.cls")
    data[at : at + 1] = b"y"  # the checksum is wrong: tarfile stops there silently
    tar.write_bytes(data)
    with tarfile.open(tar) as silent:
        assert len(silent.getnames()) == 3
    assert "damaged header" in refusal(f"wds:{tar}")


def test_two_tars_in_one_file_and_compressed_tars_are_refused(tmp_path: Path):
    one, two = (shard(tmp_path / f"{i}.tar", 10 * i, 2).read_bytes() for i in range(2))
    (tmp_path / "both.tar").write_bytes(one + two)
    assert "more data after the end mark" in refusal(f"wds:{tmp_path}/both.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(tmp_path / "0.tar", "1.png")
    assert "not a tar" in refusal(f"wds:{tmp_path}/z.tar")


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_never_ends_in_a_traceback(tmp_path: Path, seed: int):
    draw = np.random.default_rng(seed)
    tar = shard(tmp_path / "a.tar", 0, 3)
    data = np.frombuffer(tar.read_bytes(), np.uint8).copy()
    header = 512 * draw.integers(0, 14)
    data[header + draw.integers(0, 512, 4)] = draw.integers(0, 256, 4)
    tar.write_bytes(data.tobytes())
    message = ""
    try:
        samples = len(redistill.open_source(f"wds:{tar}"))
    except Refused as refused:
        message, samples = str(refused), 0
    # A tar that opens has all samples: the damage is in an image, where its digest shows it, or in padding.
    assert (samples, message) == (3, "") or (samples == 0 and "a.tar" in message and "\n" not in message)


def test_sizes_that_are_negative_or_past_the_end_are_refused(tmp_path: Path):
    for size in (-512, -1, 1 << 40):
        info = tarfile.TarInfo("1.png")
        info.size = size
        header = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(header + bytes(2048))
        assert "a.tar" in refusal(f"wds:{tmp_path}/a.tar")


def test_names_that_leave_the_folder_are_only_keys(tmp_path: Path):
    names = ["../../etc/passwd", "/abs/olute", "a/../b"]
    members = [m for name in names for m in ((f"{name}.png", picture(1)), (f"{name}.cls", b"1"))]
    (tmp_path / "inside").mkdir()
    tar = pack(tmp_path / "inside" / "a.tar", members)
    source = redistill.open_source(f"wds:{tar}")
    assert list(source.keys) == names
    assert source.sample(0).payload == picture(1)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["inside", "inside/a.tar"]


class Carrier:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pickles_in_a_tar_do_not_run(tmp_path: Path):
    trace = tmp_path / "code-ran"
    payload = pickle.dumps(Carrier(trace))
    extra = [(f"1.{e}", payload) for e in ("pyd", "pkl", "pickle", "pth", "npy", "npz", "ten", "mp", "cbor", "py")]
    tar = pack(
        tmp_path / "a.tar", [("1.png", picture(1)), ("1.cls", b"4"), *extra, ("2.png", payload), ("2.cls", b"1")]
    )
    source = redistill.open_source(f"wds:{tar}")
    assert source.labels.tolist() == [4, 1]
    index = index_source(source, on_bad_image="exclude")
    assert [key for key, _ in index.excluded] == ["2"]
    assert not trace.exists()


@pytest.mark.parametrize(
    "pattern",
    ["pipe:touch {0}", "{1,pipe:touch {0}}", "PIPE:touch {0}", " pipe:touch {0}", "pipe:touch {0}; cat x.tar"],
)
def test_pipes_are_refused_and_nothing_runs(tmp_path: Path, pattern: str):
    trace = tmp_path / "code-ran"
    text = "wds:" + pattern.replace("{0}", str(trace))
    with pytest.raises(UsageError, match="pipe: is not read"):
        redistill.open_source(text)
    assert not trace.exists()


def test_names_are_separated_by_two_colons_and_variables_have_webdatasets_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for i in range(3):
        shard(tmp_path / f"{i}.tar", 10 * i, 1)
    monkeypatch.setenv("WDS_DATA", str(tmp_path))
    assert len(redistill.open_source("wds:${DATA}/{0,2}.tar::${DATA}/1.tar")) == 3
    monkeypatch.setenv("WDS_DATA", "pipe:touch x")
    with pytest.raises(UsageError, match="pipe: is not read"):
        redistill.open_source("wds:${DATA}")


def test_a_pattern_longer_than_a_file_name_may_be():
    assert "'000.tar'" in refusal("wds:" + "::".join(f"{i:03d}.tar" for i in range(2000)))
    assert "cannot be read" in refusal(f"wds:{'a' * 300}.tar")


def test_names_are_counted_before_they_are_made():
    """The count decides what is refused, so it must be that of the expansion."""
    draw = np.random.default_rng(0)
    pieces = ["{", "}", ",", "{0..9}", "{a..e}", "{9..0..3}", "{08..10}", "a", "{,b}", "\\\\{", "{x}"]
    checked = 0
    for _ in range(3000):
        pattern = "".join(pieces[i] for i in draw.integers(0, len(pieces), draw.integers(1, 12)))
        try:
            counted = _count(pattern, Spec("wds", pattern))
        except ValueError:  # unbalanced, or too many
            continue
        checked += 1
        names = list(braceexpand(pattern))
        assert len(names) <= counted, pattern
        if "a..e" not in pattern:
            assert len(names) == counted, pattern
    assert checked > 500


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wds:", "expected a pattern"),
        ("wds:ftp://b/a.tar", "ftp://b/a.tar' is not read"),
        ("wds:file:///a.tar", "file:///a.tar' is not read"),
        ("wds:a.tar::ftp://b/a.tar", "ftp://b/a.tar' is not read"),
        ("wds:http://[half/a.tar", "is not a valid address"),
        ("wds:a{.tar", "unbalanced braces"),
        ("wds:a}.tar", "unbalanced braces"),
        ("wds:a\n{.tar", "unbalanced braces"),
        ("wds:${DATA", "unbalanced braces"),
        ("wds:" + "{" * 3000 + "}" * 3000, "braces inside each other"),
        ("wds:${NOT_SET}/a.tar", "environment variable that is not set"),
        ("wds:a.tar::", "empty name"),
        ("wds:::a.tar", "empty name"),
        ("wds:a.tar?lables=none", "did you mean labels"),
    ],
)
def test_other_patterns_are_refused(text: str, expected: str):
    with pytest.raises(UsageError) as error:
        redistill.open_source(text)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_tar_twice_is_refused(tmp_path: Path):
    shard(tmp_path / "a.tar", 0, 1)
    with pytest.raises(UsageError, match="twice"):
        redistill.open_source(f"wds:{tmp_path}/{{a,a}}.tar")


def test_remote_tars_are_downloaded_once(tmp_path: Path, cache: Path, serve: Any):
    (tmp_path / "www").mkdir()
    for i in range(2):
        shard(tmp_path / "www" / f"s{i}.tar", 10 * i, 2)
    address, requests = serve(tmp_path / "www")
    for _ in range(2):
        source = redistill.open_source(f"wds:{address}/s{{0..1}}.tar")
        assert [source.sample(i).payload for i in range(4)] == [picture(i) for i in (0, 1, 10, 11)]
    assert requests == ["/s0.tar", "/s1.tar"]
    assert len(list((cache / "tars").iterdir())) == 2


def test_downloads_that_fail_leave_nothing(tmp_path: Path, cache: Path, serve: Any, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "www").mkdir()
    for patience in ("FIRST_PATIENCE_S", "PATIENCE_S"):
        monkeypatch.setattr(download, patience, 0.0)
    shard(tmp_path / "www" / "a.tar", 0, 2)
    address, _ = serve(tmp_path / "www")
    assert "cannot fetch" in refusal(f"wds:{address}/a.tar.short")
    assert "404" in refusal(f"wds:{address}/none.tar")
    assert "cannot fetch" in refusal("wds:http://127.0.0.1:9/a.tar")
    assert list((cache / "tars").iterdir()) == []


def test_what_a_killed_download_left_is_swept_by_the_next_one(tmp_path: Path, cache: Path, serve: Any):
    shard(tmp_path / "a.tar", 0, 3)
    shard(tmp_path / "b.tar", 10, 3)
    slow, _ = serve(tmp_path, stuck=["/a.tar"])
    address, _ = serve(tmp_path)
    code = "import sys, redistill; redistill.open_source(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", code, f"wds:{slow}/a.tar"]) as process:
        try:
            while not (left := list((cache / "tars").glob("*.partial"))):
                assert process.poll() is None
                time.sleep(0.05)
            redistill.open_source(f"wds:{address}/b.tar")
            assert left[0].exists(), "of a running process"
        finally:
            process.kill()
    assert len(redistill.open_source(f"wds:{address}/a.tar")) == 3
    assert not left[0].exists()


def test_an_image_over_the_limit_is_bad_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tar = pack(tmp_path / "a.tar", [("1.png", bytes(5000)), ("1.cls", b"0")])
    monkeypatch.setattr("redistill.sources.wds.MAX_ENCODED_BYTES", 4999)
    with pytest.raises(BadImage, match=r"'1' cannot be used: 5000 bytes"):
        redistill.open_source(f"wds:{tar}").sample(0)


def test_json_labels_by_field(tmp_path: Path):
    fields = [{"cls": 1, "label": 2}, {"label": 2, "class": 3}, {"class": 3}]
    members = [m for i, f in enumerate(fields) for m in ((f"{i}.png", b"x"), (f"{i}.json", json.dumps(f).encode()))]
    assert redistill.open_source(f"wds:{pack(tmp_path / 'a.tar', members)}").labels.tolist() == [1, 2, 3]


def test_headers_are_read_once_while_a_tar_stays_the_same(tmp_path: Path, cache: Path):
    tar = shard(tmp_path / "a.tar", 0, 5)
    hour_ago = tar.stat().st_mtime_ns - 3600 * 10**9
    os.utime(tar, ns=(hour_ago, hour_ago))
    first = redistill.open_source(f"wds:{tar}")
    (saved,) = (cache / "tar-headers").iterdir()
    with np.load(saved) as arrays:
        changed = dict(arrays)
    changed["places"] = changed["places"] + [0, 0, 7]
    np.savez(saved, **changed)
    again = redistill.open_source(f"wds:{tar}")
    assert list(again.keys) == list(first.keys)
    assert again.labels.tolist() == (first.labels + 7).tolist()  # from the cache, not from the tar
    assert [again.sample(i).payload for i in range(5)] == [first.sample(i).payload for i in range(5)]
    whole = tar.read_bytes()
    tar.write_bytes(b"\xff" * 512 + whole[512:])  # no header any more, with the old size and modification time
    os.utime(tar, ns=(hour_ago, hour_ago))
    assert "not a tar" in refusal(f"wds:{tar}")
    for damaged in (b"", saved.read_bytes()[:-40], b"not a zip"):
        saved.write_bytes(damaged)
        assert "not a tar" in refusal(f"wds:{tar}")
    # Modified just now: a later edit may leave the same time, so nothing is saved. Ahead of the clock, it stays so.
    tar.write_bytes(whole)
    now = time.time_ns() + 3600 * 10**9
    os.utime(tar, ns=(now, now))
    assert len(redistill.open_source(f"wds:{tar}")) == 5
    assert saved.read_bytes() == b"not a zip"


def test_larger_images_are_allowed_and_smaller_ones_refused_by_an_option(tmp_path: Path):
    shard(tmp_path / "0.tar", 0, 3)
    for limit in (48, 1 << 30):
        assert len(index_source(redistill.open_source(f"wds:{tmp_path}?max_pixels={limit}"))) == 3
    with pytest.raises(Refused, match=r"6 x 8 = 48 pixels, more than 47; to allow it, add '\?max_pixels=48'"):
        index_source(redistill.open_source(f"wds:{tmp_path}?max_pixels=47"))
