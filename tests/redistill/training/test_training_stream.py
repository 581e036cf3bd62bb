"""Both stages over streamed tars: the archive is that of the same images on the disk, and runs resume exactly."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image
from redistill_cache import open_archive
from redistill_cache.errors import Refused, SpecMismatch

import redistill
from redistill.caching import cache_teacher
from redistill.interrupts import Interrupted
from redistill.sources.stream import GIB, StreamSource
from redistill.training import TrainOptions, train
from redistill.training.feed import Feed
from tests.flaky_server import Flaky, serving
from tests.redistill.sources.test_sources_stream import tar_of, wait_until
from tests.redistill.training.runs import InterruptAt, history, weights
from tests.redistill.training.test_training_ranks import record
from tests.small_archive import cache
from tests.stage1 import OTHER_TEACHER, cache_options, command_line, file_hashes, start_command

TARS, PER_TAR = 6, 10
BLOCKS = {"block_rows": 16, "batch_size": 8, "views": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folder` and `tars` with the same images in the same order."""
    root = tmp_path_factory.mktemp("images")
    source = redistill.open_source(f"synthetic?n={TARS * PER_TAR}&classes=8")
    every = [source.sample(i) for i in range(len(source))]
    samples = sorted(((f"class{s.label}/{i:03d}", s) for i, s in enumerate(every)), key=lambda pair: pair[0])
    (root / "tars").mkdir()
    for number in range(TARS):
        with tarfile.open(root / "tars" / f"t{number}.tar", "w") as tar:
            for key, sample in samples[PER_TAR * number : PER_TAR * (number + 1)]:
                out = io.BytesIO()
                Image.fromarray(sample.payload).save(out, "PNG")
                file = root / "folder" / f"{key}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(out.getvalue())
                for name, content in ((f"{key}.png", out.getvalue()), (f"{key}.cls", b"%d" % sample.label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


@pytest.fixture(scope="module")
def of_folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("archive") / "a.zarr", f"folder:{images / 'folder'}", **BLOCKS)


@pytest.fixture
def server(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(Flaky({path.name: path.read_bytes() for path in (images / "tars").iterdir()})) as flaky:
        yield flaky


def streamed(server: Flaky, *, tars: float = 4) -> dict[str, object]:
    """Options of a run that has room for some of the tars."""
    largest = max(map(len, server.files.values()))
    return {
        "data": f"wds:{server.address}/t{{0..{TARS - 1}}}.tar?stream=1&window=2",
        "stream_cache": tars * largest / GIB,
    }


def rendered_files(archive: Path) -> dict[str, str]:
    """Without the samples, whose keys and classes are those of the kind of source."""
    return {
        name: digest
        for name, digest in file_hashes(archive).items()
        if name.startswith(("teachers/", "views/", "canaries/"))
    }


def requests(server: Flaky) -> Counter[str]:
    return Counter(request.path for request in server.requests)


def test_an_archive_of_a_stream_is_that_of_the_images_on_the_disk(
    images: Path, of_folder: Path, server: Flaky, tmp_path: Path
):
    streaming = streamed(server)
    redistill.open_source(streaming["data"], stream_cache=streaming["stream_cache"])
    server.requests.clear()
    of_stream = cache(tmp_path / "stream.zarr", **streaming, **BLOCKS)
    of_tars = cache(tmp_path / "tars.zarr", f"wds:{images / 'tars'}", **BLOCKS)
    assert file_hashes(of_stream) == file_hashes(of_tars)
    files = rendered_files(of_stream)
    assert len(files) > 20
    assert files == rendered_files(of_folder)


def test_a_streamed_run_resumes_exactly_and_fetches_each_tar_once_an_epoch(
    server: Flaky, images: Path, of_folder: Path, options: Callable[..., TrainOptions], tmp_path: Path
):
    archive = cache(tmp_path / "a.zarr", f"wds:{images / 'tars'}", **BLOCKS)
    run = {"archive": archive, "batch_size": 8, "epochs": 2, **streamed(server)}
    redistill.open_source(run["data"], stream_cache=run["stream_cache"])
    server.requests.clear()
    train(options(**run))
    whole = [request for request in server.requests if "Range" not in request.headers]
    assert max(Counter(request.path for request in whole).values()) <= 2
    out = tmp_path / "stopped"
    for step in (5, 6):  # within the first epoch, and within the second
        with pytest.raises(Interrupted):
            train(options(**run, out=out), InterruptAt(step))
    train(options(**run, out=out))
    assert weights(out) == weights(tmp_path / "run")
    assert history(out) == history(tmp_path / "run")
    # Tars on this disk: the same order.
    local = {**run, "data": f"wds:{images / 'tars'}?stream=1&window=2", "out": tmp_path / "local"}
    train(options(**local))
    assert weights(tmp_path / "local") == weights(tmp_path / "run")
    with pytest.raises(
        SpecMismatch, match=r"holds a run with window = '2 tars, rows [0-9a-f]{12}', found window = '3 tars"
    ):
        train(options(**{**local, "data": local["data"].replace("window=2", "window=3")}))


def test_the_tars_of_batches_that_a_worker_has_been_given_are_fetched(
    server: Flaky, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A worker is given the next four batches, each of which is a group here."""
    archive = open_archive(cache(tmp_path / "a.zarr", f"wds:{images / 'tars'}", **BLOCKS))
    streaming = streamed(server, tars=TARS)
    source = redistill.open_source(streaming["data"].replace("=2", "=1"), stream_cache=streaming["stream_cache"])
    dataset = redistill.ViewDataset(source, archive, check=False)
    fetched, fetch = set(), StreamSource.fetch

    def recorded(self: StreamSource, tar: int, **options: object) -> None:
        fetched.add(tar)
        fetch(self, tar, **options)

    monkeypatch.setattr(StreamSource, "fetch", recorded)  # not in the worker
    feed = Feed(dataset, epochs=1, batch_size=PER_TAR, seed=0, workers=1)
    with closing(feed.start()) as batches:
        next(batches)
        wait_until(lambda: len(fetched) >= 5)
    assert fetched == {int(tar) for group in feed.order(0).tars[:5] for tar in group}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_sees_the_same_batches(
    server: Flaky, images: Path, options: Callable[..., TrainOptions], tmp_path: Path, ranks: int
):
    archive = cache(tmp_path / "a.zarr", f"wds:{images / 'tars'}", **BLOCKS)
    streaming = streamed(server)
    run = options(batch_size=8, archive=archive, out=tmp_path / "alone")
    arguments = {"data": streaming["data"], "extra": ("--stream-cache", streaming["stream_cache"])}
    alone = record(tmp_path, run, "alone", 1, **arguments)
    assert len({image for step in alone[:8] for image in step}) == TARS * PER_TAR
    run = options(batch_size=8, archive=archive, out=tmp_path / "run")
    first = record(tmp_path, run, "first", ranks, stop_at=3, **arguments)
    assert 3 <= len(first) < len(alone)
    assert first + record(tmp_path, run, "second", 1, **arguments) == alone


def progress_of(folder: Path) -> int:
    places = (folder / "cache/redistill/tar-index", folder / "a.zarr")
    return sum(1 for place in places for _ in place.rglob("*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stage_1_over_a_hundred_tars_killed_ten_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {f"t{number:02d}.tar": tar_of(range(3 * number, 3 * number + 3)) for number in range(100)}
    (tmp_path / "tars").mkdir()
    for name, content in files.items():
        (tmp_path / "tars" / name).write_bytes(content)
    plain = {"views": 2, "recipe": "rrc?size=32", "block_rows": 16, "teacher": OTHER_TEACHER}
    cache_teacher(cache_options(tmp_path / "whole.zarr", data=f"wds:{tmp_path / 'tars'}", **plain))
    expected, rng, killed = file_hashes(tmp_path / "whole.zarr"), random.Random(20261126), 0
    with serving(Flaky(files)) as server:
        limit = 10 * max(map(len, files.values())) / GIB
        data = f"wds:{server.address}/t{{00..99}}.tar?stream=1&window=4"
        arguments = {"data": data, "stream_cache": f"{limit:.12f}", **plain}
        for attempt in range(60):
            process = start_command(
                command_line(tmp_path / "a.zarr", **arguments),
                tmp_path / f"{attempt}.txt",
                XDG_CACHE_HOME=str(tmp_path / "cache"),
            )
            # At some number of indexed tars, or of files of the archive.
            due = progress_of(tmp_path) + rng.randrange(2, 60) if killed < 10 else 1 << 30
            while process.exitcode is None and progress_of(tmp_path) < due:
                process.join(0.002)
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
                killed += 1
                continue
            assert process.exitcode == 0, (tmp_path / f"{attempt}.txt").read_text()
            assert file_hashes(tmp_path / "a.zarr") == expected
            if killed == 10:
                break
            shutil.rmtree(tmp_path / "a.zarr")
            shutil.rmtree(tmp_path / "cache")
    assert killed == 10
    used = sum(path.stat().st_size for path in (tmp_path / "cache/redistill/streamed").iterdir())
    assert used <= limit * GIB


def test_a_recipe_that_mixes_is_refused(server: Flaky, tmp_path: Path):
    with pytest.raises(Refused, match="the recipe mixes each image with one of any tar"):
        cache(tmp_path / "a.zarr", **streamed(server), recipe="cifar?mixup=0.2", **BLOCKS)
