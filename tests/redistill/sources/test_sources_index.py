"""The index: its contents, which files are read again, and how bad images are named or excluded."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from redistill_cache.errors import Refused, UsageError

import redistill
from redistill.sources.base import Sample
from redistill.sources.folder import FolderSource
from redistill.sources.images import BadImage
from redistill.sources.index import SourceIndex, index_source, pair_up, repeats
from redistill.views import DrawnViews, parse_recipe

RNG = np.random.default_rng(0)
LONG_AGO = 1_000_000_000_000_000_000


def png(height: int = 8, width: int = 9) -> bytes:
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def put(file: Path, payload: bytes, at: int = LONG_AGO) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(payload)
    os.utime(file, ns=(at, at))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(12):
        put(tmp_path / "data" / f"class{i % 3}" / f"{i:02d}.png", png(8 + i, 9))
    return tmp_path / "data"


class Counting(FolderSource):
    """Counts how often each file is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def sample(self, i: int) -> Sample:
        sample = super().sample(i)
        self.reads[sample.key] += 1
        return sample


def same(left: SourceIndex, right: SourceIndex) -> bool:
    names = [field.name for field in fields(SourceIndex) if field.name != "reused"]
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def test_the_index_holds_what_identifies_each_sample(root: Path):
    source = Counting(root)
    reported: list[tuple[int, int]] = []
    index = index_source(source, workers=0, progress=lambda *both: reported.append(both))
    assert list(index.keys) == list(source.keys)
    assert index.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert index.class_names == ("class0", "class1", "class2")
    assert index.rows.tolist() == list(range(12))
    for i, key in enumerate(index.keys):
        payload = (root / key).read_bytes()
        assert index.digests[i].tobytes() == hashlib.sha256(payload).digest()
        assert index.sizes[i].tolist() == list(Image.open(io.BytesIO(payload)).size[::-1])
    assert set(source.reads.values()) == {1}, "every file is read once"
    assert reported[-1] == (12, 12)


def test_only_what_changed_is_read_again(root: Path, cache: Path):
    first = index_source(FolderSource(root), workers=0)
    again = Counting(root)
    assert same(index_source(again, workers=0), first)
    assert not again.reads

    put(root / "class0" / "00.png", png(8, 9), at=LONG_AGO + 1)  # edited
    put(root / "class1" / "new.png", png())  # added
    (root / "class2" / "02.png").unlink()  # removed
    (root / "class2" / "05.png").rename(root / "class2" / "fifth.png")  # renamed
    (root / "class1" / "01.png").touch()  # only touched
    after = Counting(root)
    index = index_source(after, workers=0)
    assert set(after.reads) == {"class0/00.png", "class1/new.png", "class2/fifth.png", "class1/01.png"}
    assert index.reused == 8
    shutil.rmtree(cache)
    assert same(index, index_source(FolderSource(root), workers=0))


def test_a_file_modified_just_before_indexing_is_read_again(root: Path):
    """Its time is ahead of the clock, so that it stays just before, however long the index takes to start."""
    put(root / "class0" / "00.png", png(), at=time.time_ns() + 3600 * 10**9)
    index_source(FolderSource(root), workers=0)
    again = Counting(root)
    index_source(again, workers=0)
    assert set(again.reads) == {"class0/00.png"}


def test_moved_data_and_a_damaged_or_unwritable_cache_only_cost_time(
    root: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = index_source(FolderSource(root), workers=0)
    (saved,) = (cache / "index").iterdir()
    whole = saved.read_bytes()
    for broken in (b"", whole[:100], whole[:-30], b"PK" + whole[2:200], bytes(len(whole))):
        saved.write_bytes(broken)
        assert same(index_source(FolderSource(root), workers=0), first)
    for place in np.random.default_rng(0).integers(0, len(whole), 150).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        saved.write_bytes(flipped)
        assert same(index_source(FolderSource(root), workers=0), first)
    shutil.move(root, tmp_path / "elsewhere")
    assert same(index_source(FolderSource(tmp_path / "elsewhere"), workers=0), first)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    assert same(index_source(FolderSource(tmp_path / "elsewhere"), workers=0), first)


def test_the_index_does_not_depend_on_the_number_of_processes():
    source = redistill.open_source("synthetic?n=600&size=16")
    alone = index_source(source, workers=0)
    assert same(index_source(source, workers=2), alone)


def test_bad_images_are_refused_by_name_or_excluded(root: Path):
    put(root / "class0" / "bad.png", b"no image")
    with pytest.raises(BadImage, match=r"'class0/bad\.png' cannot be used: not an image"):
        index_source(FolderSource(root), workers=0)
    put(root / "class1" / "short.png", png()[:-100])
    put(root / "class2" / "empty.png", b"")
    (root / "class2" / "gone.png").symlink_to("nowhere")
    with pytest.raises(
        Refused, match=r"4 of 16 images cannot be used \('class0/bad\.png': not an image.*exclude"
    ) as error:
        index_source(FolderSource(root), workers=0)
    assert "\n" not in str(error.value)
    index = index_source(FolderSource(root), workers=0, on_bad_image="exclude")
    assert [key for key, _ in index.excluded] == [
        "class0/bad.png",
        "class1/short.png",
        "class2/empty.png",
        "class2/gone.png",
    ]
    assert index.excluded[2:] == (
        ("class2/empty.png", "the file is empty"),
        ("class2/gone.png", "No such file or directory"),
    )
    assert len(index) == 12
    source = FolderSource(root)
    assert [source.keys[i] for i in index.rows] == list(index.keys)
    assert index.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    put(root / "class0" / "bad.png", png())  # repaired
    assert len(index_source(FolderSource(root), workers=0, on_bad_image="exclude")) == 13


def test_damage_inside_the_pixels_is_found_when_bad_images_are_excluded(root: Path):
    payload = bytearray(png(64, 64))
    payload[len(payload) // 2] ^= 0xFF  # the checksum of the pixels is wrong; header and end are whole
    put(root / "class1" / "inside.png", bytes(payload))
    assert len(index_source(FolderSource(root), workers=0)) == 13
    index = index_source(FolderSource(root), workers=0, on_bad_image="exclude")
    assert [key for key, _ in index.excluded] == ["class1/inside.png"]


@dataclass
class Samples:
    """A source of a user: any object with these methods."""

    items: list[object] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, i: int) -> object:
        return self.items[i]


def test_any_object_with_samples_is_a_source(cache: Path):
    pixels = RNG.integers(0, 256, (4, 5, 3), np.uint8)
    source = redistill.open_source(
        Samples([(png(6, 7), 3, "one"), (pixels, np.int64(1), "two"), Sample(png(), 0, "three")])
    )
    assert redistill.open_source(source) is source
    index = index_source(source)
    assert (list(index.keys), index.labels.tolist()) == (["one", "two", "three"], [3, 1, 0])
    assert index.sizes.tolist() == [[6, 7], [4, 5], [8, 9]]
    assert index.digests[1].tobytes() == hashlib.sha256(b"uint8[4,5,3]" + pixels.tobytes()).digest()
    assert not cache.exists()


@pytest.mark.parametrize("item", [None, (b"", 0), (b"", "x", "key"), ("text", 0, "key"), (b"", 0, 7)])
def test_an_invalid_sample_is_refused(item: object):
    with pytest.raises(UsageError, match=r"sample\(0\)"):
        index_source(redistill.open_source(Samples([item])))


@given(st.lists(st.integers(0, 6), max_size=20), st.lists(st.integers(0, 6), max_size=20))
@settings(max_examples=150, deadline=None)
def test_pairing_matches_a_slow_pairing(left: list[int], right: list[int]):
    waiting = {value: [i for i, other in enumerate(right) if other == value] for value in range(7)}
    slow = [(i, waiting[value].pop(0)) for i, value in enumerate(left) if waiting[value]]
    fast = pair_up(np.array(left, np.int64), np.array(right, np.int64))
    assert list(zip(*map(np.ndarray.tolist, fast), strict=True)) == slow
    assert repeats(np.array(left, np.int64)).tolist() == [i for i, value in enumerate(left) if value in left[:i]]


class Deadly:
    """A source whose tenth sample kills the process that reads it, as the system does when memory runs out."""

    def __len__(self) -> int:
        return 12

    def sample(self, i: int) -> Sample:
        if i == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return Sample(png(), 0, str(i))


def test_a_killed_process_is_refused_in_one_line():
    with pytest.raises(Refused, match="a process that reads images died; if memory ran out, use fewer --workers"):
        index_source(redistill.open_source(Deadly()), workers=1)


def test_a_folder_whose_path_is_not_utf8_is_refused_when_the_index_starts(root: Path, tmp_path: Path):
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    root.rename(odd / "images")
    with pytest.raises(Refused, match=r"the path of 'folder:.*odd\\udcff/images' is not UTF-8; rename its folders"):
        index_source(FolderSource(odd / "images"), workers=0)


def test_large_images_are_allowed_by_an_option_of_the_images(root: Path):
    out = io.BytesIO()
    Image.new("1", (5_000, 4_000), 1).save(out, "PNG")
    put(root / "class0" / "page.png", out.getvalue())
    with pytest.raises(BadImage, match=r"class0/page\.png.*add '\?max_pixels=20000000' to the images"):
        index_source(redistill.open_source(f"folder:{root}"), workers=0)
    source = redistill.open_source(f"folder:{root}?max_pixels=20000000")
    index = index_source(source, workers=2, on_bad_image="exclude")
    assert index.sizes.max() == 5_000
    assert not index.excluded
    views = DrawnViews(index, parse_recipe("rrc?size=8"), seed=0, num_views=1)
    dataset = pickle.loads(pickle.dumps(redistill.ViewDataset(source, views)))  # as for a worker
    assert [item.pixels.shape[1] for item in dataset.__getitems__(range(13))] == [8] * 13
    # An index that was made with the option is not used without it.
    with pytest.raises(BadImage, match="max_pixels=20000000"):
        index_source(redistill.open_source(f"folder:{root}"), workers=0)
    with pytest.raises(UsageError, match="expected max_pixels to be at least 1, found 0"):
        redistill.open_source(f"folder:{root}?max_pixels=0")


# -- an index that machines share -------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(root: Path, tmp_path: Path, cache: Path) -> Path:
    """A copy of the images with other inodes, and an index.npz of the originals; nothing is cached here."""
    index_source(FolderSource(root), workers=0, save_to=tmp_path / "shared" / "index.npz")
    shutil.copytree(root, tmp_path / "copy")  # keeps modification times
    shutil.rmtree(cache)
    return tmp_path / "copy"


def test_another_machine_reads_no_image_that_the_shared_index_has(root: Path, elsewhere: Path, tmp_path: Path):
    spec = f"folder:{elsewhere}?index={tmp_path}/shared/index.npz"
    index = index_source(redistill.open_source(spec), workers=0)
    assert index.reused == 12
    put(elsewhere / "class0" / "00.png", png(8, 9), at=LONG_AGO + 1)
    put(elsewhere / "class1" / "new.png", png())
    after = index_source(redistill.open_source(spec), workers=0, reuse=True)
    assert (len(after), after.reused) == (13, 11)
    assert same(after, index_source(FolderSource(elsewhere), workers=0, reuse=False))
    assert same(index, index_source(FolderSource(root), workers=0, reuse=False))


def test_an_image_that_changed_unnoticed_is_refused_when_it_is_rendered(elsewhere: Path, tmp_path: Path):
    image = elsewhere / "class0" / "00.png"
    put(image, image.read_bytes()[:-1] + b"\0")  # same size and modification time
    source = redistill.open_source(f"folder:{elsewhere}?index={tmp_path}/shared/index.npz")
    index = index_source(source, workers=0)
    assert index.reused == 12
    drawn = DrawnViews(index, parse_recipe("center?size=8"), seed=0, num_views=1)
    dataset = redistill.ViewDataset(source, drawn)
    dataset[1]
    with pytest.raises(Refused, match=r"'class0/00.png' has changed since it was indexed"):
        dataset[0]


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 not an index", "truncated", "pickled"])
def test_a_shared_index_that_cannot_be_used_is_refused(elsewhere: Path, tmp_path: Path, content: bytes | str | None):
    file = tmp_path / "shared" / "index.npz"
    whole = file.read_bytes()
    file.unlink()
    if content == "pickled":
        np.savez(file, version=np.array([{}], object))
    elif content is not None:
        file.write_bytes(whole[:-300] if content == "truncated" else content)
    with pytest.raises(
        Refused, match=r"expected an index of images at .*index.npz, found .*redistill index DATA --out"
    ):
        index_source(redistill.open_source(f"folder:{elsewhere}?index={file}"), workers=0)


def test_only_sources_of_files_have_an_index_to_share(tmp_path: Path):
    with pytest.raises(Refused, match="no files whose index could be shared"):
        index_source(redistill.open_source("synthetic?n=4"), save_to=tmp_path / "index.npz")


def test_an_index_that_cannot_be_written_is_refused(root: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="cannot write"):
        index_source(FolderSource(root), save_to=tmp_path / "file" / "index.npz")
