"""`folder:`: images, classes and keys, and the folders that are refused."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
from pathlib import Path

import pytest
from redistill_cache.errors import Refused, UsageError

import redistill
from redistill.sources.base import Source
from redistill.sources.folder import FolderSource
from redistill.sources.images import BadImage
from redistill.sources.index import index_source


def write_files(root: Path, *names: str) -> Path:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(name))
    return root


def test_classes_keys_and_order_do_not_depend_on_the_disk(tmp_path: Path):
    names = ["dog/b.png", "cat/deep/er/z.JPEG", "cat/a.jpg", "Zebra/1.webp", "dog/a.bmp"]
    for root in (write_files(tmp_path / "one", *names), write_files(tmp_path / "two", *reversed(names))):
        source = redistill.open_source(f"folder:{root}")
        assert isinstance(source, Source)
        assert source.class_names == ("Zebra", "cat", "dog")
        assert list(source.keys) == ["Zebra/1.webp", "cat/a.jpg", "cat/deep/er/z.JPEG", "dog/a.bmp", "dog/b.png"]
        assert source.labels.tolist() == [0, 1, 1, 2, 2]
        sample = source.sample(2)
        assert (sample.payload, sample.label, sample.key) == (b"cat/deep/er/z.JPEG", 1, "cat/deep/er/z.JPEG")


def test_hidden_files_are_ignored_and_other_files_counted(tmp_path: Path):
    root = write_files(
        tmp_path,
        "a/1.jpg",
        "a/.2.jpg",
        "a/._1.jpg",
        ".git/x.jpg",
        "__MACOSX/a/1.jpg",
        "a/notes.txt",
        "a/b/x.TIF",
        "README",
    )
    source = redistill.open_source(root)
    assert list(source.keys) == ["a/1.jpg"]
    assert source.skipped == {".txt": 1, ".tif": 1, "": 1}


def test_links_are_followed_but_not_in_cycles(tmp_path: Path):
    write_files(tmp_path / "store", "x/1.jpg", "2.jpg")
    root = write_files(tmp_path / "data", "a/0.jpg")
    (root / "b").symlink_to(tmp_path / "store" / "x")
    (root / "a" / "2.jpg").symlink_to(tmp_path / "store" / "2.jpg")
    source = redistill.open_source(root)
    assert list(source.keys) == ["a/0.jpg", "a/2.jpg", "b/1.jpg"]
    assert source.sample(1).payload == b"2.jpg"
    (root / "a" / "again").symlink_to(root)
    with pytest.raises(Refused, match="are the same folder"):
        redistill.open_source(root)


def test_a_file_that_cannot_be_read_is_a_bad_image_with_its_name(tmp_path: Path):
    root = write_files(tmp_path, "a/0.jpg")
    (root / "a" / "1.jpg").symlink_to("nowhere")
    os.mkfifo(root / "a" / "2.jpg")
    source = redistill.open_source(root)
    with pytest.raises(BadImage, match=r"a/1\.jpg.*No such file"):
        source.sample(1)
    with pytest.raises(BadImage, match=r"a/2\.jpg.*not a regular file"):
        source.sample(2)
    assert source.stamps()[1].tolist() == [-1, -1, -1, -1]


def test_devices_sockets_and_files_without_end_are_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write_files(tmp_path, "a/0.jpg")
    (root / "a" / "1.jpg").symlink_to("/dev/zero")
    (root / "a" / "2.jpg").symlink_to("/dev/tty")
    (root / "a" / "3.jpg").symlink_to("/proc/self/pagemap")  # a regular file of 0 bytes that does not end
    monkeypatch.chdir(root / "a")  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("4.jpg")
        index = index_source(FolderSource(root), workers=0, on_bad_image="exclude")
    reasons = dict(index.excluded)
    assert [reasons[f"a/{i}.jpg"] for i in (1, 2, 4)] == ["not a regular file"] * 3
    assert "a/3.jpg" in reasons


def test_images_beside_class_folders_need_the_option(tmp_path: Path):
    root = write_files(tmp_path, "1.jpg", "deep/2.jpg")
    with pytest.raises(Refused, match=r"found 1 images such as '1\.jpg'.*labels=none"):
        redistill.open_source(root)
    source = redistill.open_source(f"{root}?labels=none")
    assert list(source.keys) == ["1.jpg", "deep/2.jpg"]
    assert source.labels.tolist() == [-1, -1]
    assert source.class_names is None


def test_other_folders_are_refused_with_advice(tmp_path: Path):
    with pytest.raises(Refused, match="is not a folder"):
        redistill.open_source("folder:/nonexistent")
    with pytest.raises(Refused, match=r"no images.*found 2 \.txt"):
        redistill.open_source(write_files(tmp_path / "text", "a/1.txt", "b/2.txt"))
    with pytest.raises(Refused, match=r"1 class folders .* have no images, such as 'b'"):
        redistill.open_source(write_files(tmp_path / "empty", "a/1.jpg", "b/2.txt"))
    assert redistill.open_source(f"{tmp_path}/empty?allow_empty=1").class_names == ("a", "b")
    splits = write_files(tmp_path / "splits", "train/a/1.jpg", "val/a/2.jpg")
    with pytest.raises(Refused, match=r"splits train, val, not classes; did you mean 'folder:.*train'"):
        redistill.open_source(splits)
    assert list(redistill.open_source(f"folder:{splits}?split=val").keys) == ["a/2.jpg"]


def test_invalid_data_arguments_are_refused_with_advice(tmp_path: Path):
    with pytest.raises(UsageError, match="unknown kind of data 'foldr'; did you mean folder"):
        redistill.open_source("foldr:x")
    with pytest.raises(UsageError, match="neither a folder nor a tar pattern"):
        redistill.open_source(tmp_path / "gone")
    with pytest.raises(UsageError, match="unknown option 'label'; did you mean labels"):
        redistill.open_source(f"folder:{tmp_path}?label=none")
    with pytest.raises(UsageError, match="found an empty string"):
        redistill.open_source("")
    with pytest.raises(UsageError, match="home directory is not known"):
        redistill.open_source("folder:~no-such-user/data")
    with pytest.raises(UsageError, match="found int"):
        redistill.open_source(3)


def test_a_folder_can_be_pickled(tmp_path: Path):
    source = redistill.open_source(write_files(tmp_path, "a/1.jpg", "b/2.jpg"))
    again = pickle.loads(pickle.dumps(source))
    assert again.sample(1) == source.sample(1)
    assert again.class_names == source.class_names


@pytest.mark.parametrize("place", ["loop", "a/loop", "a/loop.jpg"])
def test_a_link_to_itself_is_refused_by_its_path(place: str, tmp_path: Path):
    root = write_files(tmp_path, "a/1.jpg")
    (root / place).symlink_to(root / place)
    with pytest.raises(Refused, match=rf"cannot list '.*/{place}': Too many levels of symbolic links"):
        redistill.open_source(root)


def test_a_folder_that_two_paths_lead_to_is_refused(tmp_path: Path):
    """27 folders, each with two links to the next: 134 million paths to one image."""
    write_files(tmp_path, "data/a/1.jpg", "store/27/1.jpg")
    for depth in range(27):
        (tmp_path / f"store/{depth}").mkdir()
        for name in "xy":
            (tmp_path / f"store/{depth}/{name}").symlink_to(tmp_path / f"store/{depth + 1}")
    (tmp_path / "data/a/0").symlink_to(tmp_path / "store/0")
    with pytest.raises(Refused, match=r"are the same folder; remove the link"):
        redistill.open_source(tmp_path / "data")


def test_folders_may_be_nested_deeper_than_python_recurses_but_not_beyond_the_longest_path(tmp_path: Path):
    root = write_files(tmp_path, "a/1.jpg")
    here = os.open(root / "a", os.O_RDONLY)
    try:
        for depth in range(2100):
            os.mkdir("d", dir_fd=here)
            deeper = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = deeper
            if depth == 1499:
                os.close(os.open("2.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
                assert list(redistill.open_source(root).keys) == ["a/1.jpg", "a/" + 1500 * "d/" + "2.jpg"]
        with pytest.raises(Refused, match=r"cannot list .*: File name too long") as error:
            redistill.open_source(root)
        assert len(str(error.value)) < 400
    finally:
        os.close(here)
        subprocess.run(["rm", "-rf", root / "a"], check=True)


@pytest.mark.parametrize("name", [b"a/\xff.jpg", b"a/\xff/1.jpg", b"\xff/1.jpg"])
def test_a_path_that_is_not_utf8_is_refused(name: bytes, tmp_path: Path):
    write_files(tmp_path, "a/1.jpg", os.fsdecode(name))
    with pytest.raises(Refused, match="not UTF-8; rename it"):
        redistill.open_source(tmp_path)
