"""Views through an archive on disk: written, sealed, opened, joined, checked, rendered."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from redistill_cache import open_archive
from redistill_cache.codecs import fit_codec
from redistill_cache.errors import Refused
from redistill_cache.spec import ArchiveSpec, SignalSpec, TeacherSpec
from redistill_cache.writer import ArchiveWriter
from torch.utils.data import DataLoader

import redistill
from bench.pictures import jpeg, picture
from redistill.sources.images import decode_array
from redistill.sources.index import index_source
from redistill.sources.open_source import open_source
from redistill.views import DrawnViews, ViewDataset, join_archive, parse_recipe
from redistill.views.canaries import canary_rows, check_canaries, fingerprints, view_environment
from tests.image_source import ImageSource

N, V, SEED = 20, 3, 5
RECIPE = "rrc?size=24&aa=rand-m9-n2&reprob=0.5&mixup=0.4&cutmix=1"


def images(order: list[int] | None = None, quality: int = 90) -> ImageSource:
    payloads = [jpeg(picture(i, 50 + i, 90 - i), quality) for i in range(N)]
    return ImageSource(payloads, order, classes=4)


def decoded(source: ImageSource) -> ImageSource:
    return ImageSource([decode_array(payload, name="x") for payload in source.payloads], classes=4)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "a.redistill.zarr"
    recipe, index = parse_recipe(RECIPE), index_source(open_source(images()), workers=0)
    views = DrawnViews(index, recipe, seed=SEED, num_views=V)
    logits = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    codec = fit_codec("float16", logits)
    spec = ArchiveSpec(
        num_samples=N,
        num_views=V,
        num_classes=4,
        block_rows=8,
        recipe=recipe.to_json(),
        seed=SEED,
        view_arrays=recipe.arrays(),
        canaries_per_view=6,
        environment=view_environment(),
    )
    writer = ArchiveWriter.create(path, spec)
    writer.write_samples(index.keys, index.labels, index.digests, index.sizes)
    writer.add_teacher(TeacherSpec("net", (SignalSpec.of("logits", codec),)), {"logits": codec.side()})
    for block in writer.missing("views"):
        writer.write(block, views.params(block.view, np.arange(block.start, block.stop)))
    for block in writer.missing("canaries"):
        rows = canary_rows(SEED, block.view, N, 6)
        pixels = fingerprints(ViewDataset(images(), views), block.view, rows)
        writer.write(block, {"row": rows, "pixels": pixels})
    for block in writer.missing("teachers/net"):
        encoded = codec.encode(logits[block.start : block.stop])
        writer.write(block, {f"logits/{name}": array for name, array in encoded.arrays.items()})
    writer.seal()
    return open_archive(path)


def test_views_of_the_archive_are_the_views_drawn(archive):
    views = DrawnViews(index_source(open_source(images()), workers=0), parse_recipe(RECIPE), seed=SEED, num_views=V)
    drawn, read = ViewDataset(images(), views), ViewDataset(images(), archive)
    for index in range(N * V):
        assert all(np.array_equal(one, other) for one, other in zip(drawn[index], read[index], strict=True))


def test_the_readers_own_images_are_exact(archive):
    source = open_source(images(order=list(reversed(range(N)))))
    alignment = check_canaries(ViewDataset(source, archive, check=False), archive)
    assert (alignment.verdict, alignment.checked, dict(alignment.versions)) == ("exact", 3 * 6, {})


def test_other_images_are_refused_by_the_join_and_by_the_canaries(archive):
    worse = open_source(images(quality=50))
    with pytest.raises(Refused, match="changed"):
        join_archive(worse, archive)
    joined = join_archive(open_source(images()), archive)
    with pytest.raises(Refused, match=r"'\d+\.jpg' has changed since it was indexed"):
        check_canaries(ViewDataset(worse, archive, joined=joined, check=False), archive)
    worse = open_source(decoded(images(quality=50)))
    assert check_canaries(ViewDataset(worse, archive, joined=joined, check=False), archive).verdict == "refused"


def test_a_dataset_of_other_images_is_refused_unless_the_check_is_off(archive):
    """Images that another decoder has decoded to other pixels."""
    joined = join_archive(open_source(images()), archive)
    worse = open_source(decoded(images(quality=50)))
    with pytest.raises(Refused, match="views do not match the archive") as refused:
        ViewDataset(worse, archive, joined=joined)
    unchecked = ViewDataset(worse, archive, joined=joined, check=False)
    assert str(refused.value) == check_canaries(unchecked, archive).message
    transformed = ViewDataset(images(), archive, size=8, transform=torch.zeros_like)  # neither matters to the check
    assert not transformed[0].pixels.any()


def test_a_dataset_of_an_archive_can_be_sent_to_workers(archive):
    dataset = ViewDataset(images(), archive)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(dataset[30].pixels, again[30].pixels)
    order = dataset.indices(1)
    loaded = next(iter(DataLoader(dataset, batch_size=N, sampler=order, num_workers=1, multiprocessing_context="fork")))
    assert torch.equal(loaded.pixels, torch.stack([item.pixels for item in dataset.__getitems__(order)]))


def test_render(archive):
    item = ViewDataset(images(), archive)[N + 7]
    assert torch.equal(redistill.render(images(), archive, row=7, view=1), item.pixels)
