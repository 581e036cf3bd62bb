"""The dataset: the same bytes from any loader, one decode per image, and refusals of what cannot be rendered."""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from redistill_cache.errors import Damaged, OutOfRange, Refused
from torch.utils.data import DataLoader

from bench.pictures import jpeg, picture
from redistill.sources.index import index_source
from redistill.sources.open_source import open_source
from redistill.views import (
    ArchiveViews,
    DrawnViews,
    ViewDataset,
    archive_recipe,
    join_archive,
    parse_recipe,
    render_view,
)
from redistill.views.dataset import render
from redistill.views.recipe import WEIGHT_UNIT
from redistill.views.render import row_params
from tests.image_source import ImageSource
from tests.memory_archive import MemoryArchive

N, V, SEED = 12, 3, 9
PICTURES = [picture(i, 40 + i, 60 - i) for i in range(N)]
PAYLOADS = [pixels if i % 2 else jpeg(pixels) for i, pixels in enumerate(PICTURES)]


def pictures(order: list[int] | None = None) -> ImageSource:
    """JPEG files and arrays of different shapes."""
    return ImageSource(PAYLOADS, order)


def archive_of(text: str) -> MemoryArchive:
    return MemoryArchive(text, index_source(open_source(pictures()), workers=0), seed=SEED, num_views=V)


def unchecked(source: ImageSource, archive: MemoryArchive, **options) -> ViewDataset:
    """A dataset of an archive without canaries."""
    return ViewDataset(source, archive, check=False, **options)


PLAIN = "rrc?size=24"
MIXED = "rrc?size=24&aa=ta_wide&reprob=0.5&mixup=0.5&cutmix=1&mixup_prob=0.8"


def every_item(loader) -> list[np.ndarray]:
    """The fields of all batches, concatenated."""
    batches = list(loader)
    assert all(type(batch) is type(batches[0]) for batch in batches)
    return [torch.cat(column).numpy() for column in zip(*batches, strict=True)]


SLOW = pytest.mark.slow  # every spawned worker imports torch anew, which takes seconds
WORKERS = [(1, "fork"), (2, "fork"), (4, "fork"), (1, "spawn"), (1, "forkserver")]
MORE_WORKERS = [(3, "fork"), (2, "spawn"), (4, "spawn"), (2, "forkserver"), (4, "forkserver")]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(("workers", "method"), [*WORKERS, *(pytest.param(*case, marks=SLOW) for case in MORE_WORKERS)])
def test_the_same_bytes_from_any_number_and_kind_of_workers(workers, method):
    dataset = unchecked(pictures(), archive_of(MIXED))
    order = np.random.default_rng(0).permutation(np.concatenate([dataset.indices(view) for view in range(V)]))
    alone = every_item(DataLoader(dataset, batch_size=5, sampler=order))
    loaded = every_item(
        DataLoader(dataset, batch_size=7, sampler=order, num_workers=workers, multiprocessing_context=method)
    )
    assert len(alone[0]) == N * V
    for one, other in zip(alone, loaded, strict=True):
        assert one.dtype == other.dtype
        assert (one == other).all()


def test_persistent_workers_render_the_view_of_the_epoch():
    """The index encodes the view: workers started for view 0 render view 1 when the sampler requests it."""
    dataset = unchecked(pictures(), archive_of(PLAIN))
    order = list(dataset.indices(0))
    loader = DataLoader(dataset, batch_size=4, sampler=order, num_workers=1, persistent_workers=True)
    for view in (0, 1, 2):
        order[:] = dataset.indices(view)
        pixels, _, rows, views = every_item(loader)
        assert (views == view).all()
        assert (rows == np.arange(N)).all()
        assert (pixels == np.stack([dataset[int(index)].pixels for index in order])).all()


def test_items_have_their_label_row_and_view():
    dataset = unchecked(pictures(), archive_of(PLAIN))
    assert len(dataset) == N * V
    item = dataset[dataset.index(2, 7)]
    assert (item.label, item.row, item.view) == (7 % 5, 7, 2)
    assert (item.pixels.dtype, item.pixels.shape) == (torch.uint8, (3, 24, 24))


def test_items_are_the_rendered_parameters():
    archive = archive_of(MIXED)
    dataset = unchecked(pictures(), archive, size=32)
    recipe, samples = parse_recipe(MIXED), open_source(pictures())
    images = [torch.from_numpy(np.array(_decoded(samples.sample(i).payload))).permute(2, 0, 1) for i in range(N)]
    mixed = 0
    for item in dataset.__getitems__(dataset.indices(1)):
        params = row_params(archive.params[1], item.row)
        other = int(params["mix_partner"])
        partner = images[other], row_params(archive.params[1], other)
        assert torch.equal(item.pixels, render_view(images[item.row], params, recipe, 32, partner))
        assert (item.partner, item.partner_label) == (other, other % 5)
        assert item.weight == pytest.approx(int(params["mix_weight"]) / WEIGHT_UNIT)
        mixed += other != item.row
    assert mixed > N / 2


def _decoded(payload):
    return Image.open(io.BytesIO(payload)).convert("RGB") if isinstance(payload, bytes) else payload


def test_an_image_that_serves_several_items_is_decoded_once():
    source = pictures()
    dataset = unchecked(source, archive_of(PLAIN))
    source.reads.clear()
    batch = dataset.__getitems__([dataset.index(view, row) for row in (4, 9) for view in range(V)])
    assert sorted(source.reads) == [4, 9]
    assert [(item.row, item.view) for item in batch] == [(4, 0), (4, 1), (4, 2), (9, 0), (9, 1), (9, 2)]


def test_the_order_of_the_source_does_not_matter():
    archive = archive_of(MIXED)
    shuffled = np.random.default_rng(2).permutation(N).tolist()
    one, other = unchecked(pictures(), archive), unchecked(pictures(shuffled), archive)
    for view in range(V):
        for left, right in zip(*(d.__getitems__(d.indices(view)) for d in (one, other)), strict=True):
            assert left.row == right.row
            assert torch.equal(left.pixels, right.pixels)


@pytest.mark.parametrize("text", [PLAIN, MIXED, "center?size=24"])
def test_drawn_views_are_those_of_the_archive(text):
    """Stage 1 draws, stage 2 reads: the same dataset, the same pixels."""
    source = open_source(pictures())
    drawn = DrawnViews(index_source(source, workers=0), parse_recipe(text), seed=SEED, num_views=V)
    stage1, stage2 = ViewDataset(source, drawn), unchecked(source, archive_of(text))
    for index in range(len(stage1)):
        assert all(np.array_equal(a, b) for a, b in zip(stage1[index], stage2[index], strict=True))


@pytest.mark.parametrize("text", [PLAIN, MIXED])
def test_render_shows_what_the_dataset_shows(text):
    archive = archive_of(text)
    dataset = unchecked(pictures(), archive)
    shuffled = np.random.default_rng(2).permutation(N).tolist()
    for row in range(N):
        assert torch.equal(render(pictures(), archive, row, 1), dataset[dataset.index(1, row)].pixels)
        assert torch.equal(render(pictures(shuffled), archive, row, 1), dataset[dataset.index(1, row)].pixels)
    assert render(pictures(), archive, row=0, view=0, size=17).shape == (3, 17, 17)


def test_rows_without_their_sample_are_skipped_by_indices_and_refused():
    archive = archive_of(MIXED)
    present = [number for number in range(N) if number not in (3, 8)]
    joined = join_archive(open_source(pictures(present)), archive, allow_missing=True)
    dataset = unchecked(pictures(present), archive, joined=joined)
    rows = dataset.indices(0) % N
    partners = archive.params[0]["mix_partner"][rows]
    assert not set(rows) & {3, 8}
    assert not set(partners) & {3, 8}
    assert len(dataset.__getitems__(dataset.indices(0))) == len(rows) > 0
    with pytest.raises(Refused, match="row 3 has no sample"):
        dataset[3]
    with pytest.raises(Refused, match="row 8"):
        render(pictures(present), archive, 8, 0)


def test_a_pickled_dataset_carries_no_parameters():
    dataset = unchecked(pictures(), archive_of(PLAIN))
    before = len(pickle.dumps(dataset.views))
    expected = dataset[5].pixels
    assert len(pickle.dumps(dataset.views)) == before
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[5].pixels, expected)


def test_the_parameters_of_two_views_are_cached():
    views = ArchiveViews(archive_of(PLAIN), join_archive(open_source(pictures()), archive_of(PLAIN)))
    reads = []
    archive = views.archive
    views.archive = SimpleNamespace(view_params=lambda view: reads.append(view) or archive.view_params(view))
    for view in (0, 0, 1, 0, 1, 2, 1, 0):
        views.params(view, np.arange(3))
    assert reads == [0, 1, 2, 0]


@pytest.mark.parametrize("index", [-1, N * V])
def test_items_outside_are_refused(index):
    with pytest.raises(OutOfRange):
        unchecked(pictures(), archive_of(PLAIN))[index]


def test_views_and_rows_outside_are_refused():
    archive = archive_of(PLAIN)
    for row, view in ((N, 0), (-1, 0), (0, V), (0, -1)):
        with pytest.raises(OutOfRange):
            render(pictures(), archive, row, view)
    with pytest.raises(OutOfRange):
        unchecked(pictures(), archive).indices(V)


def test_an_archive_whose_parameters_do_not_match_its_recipe_is_refused():
    archive = archive_of(PLAIN)
    archive.spec.recipe = parse_recipe("rrc?size=24&reprob=0.5").to_json()
    with pytest.raises(Refused, match="erase"):
        archive_recipe(archive)


def test_partners_beyond_the_archive_are_damage():
    archive = archive_of(MIXED)
    archive.params[0]["mix_partner"][3] = 4_000_000_000
    dataset = unchecked(pictures(), archive)
    with pytest.raises(Damaged, match="beyond the 12 rows"):
        dataset.__getitems__(dataset.indices(0))


def test_iteration_ends_as_python_expects():
    dataset = unchecked(pictures(), archive_of(PLAIN))
    assert [(item.view, item.row) for item in dataset] == [(view, row) for view in range(V) for row in range(N)]


def test_a_transform_is_applied_to_the_pixels():
    dataset = unchecked(pictures(), archive_of(MIXED), transform=lambda pixels: pixels.float() / 255)
    plain = unchecked(pictures(), archive_of(MIXED))
    for item, untouched in zip(dataset.__getitems__([0, 5]), plain.__getitems__([0, 5]), strict=True):
        assert torch.equal(item.pixels, untouched.pixels / 255)
        assert item[1:] == untouched[1:]


@pytest.mark.parametrize("text", [PLAIN, MIXED])
def test_one_loop_reads_batches_of_every_recipe(text):
    dataset = unchecked(pictures(), archive_of(text))
    pixels, labels, rows, views, *mix = next(iter(DataLoader(dataset, 5, sampler=dataset.indices(1))))
    assert pixels.shape == (5, 3, 24, 24)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert (rows.tolist(), views.tolist()) == ([0, 1, 2, 3, 4], [1] * 5)
    assert len(mix) == (3 if text == MIXED else 0)


def test_an_archive_without_canaries_needs_an_explicit_check_false():
    with pytest.raises(Refused, match=r"has no canaries.*; pass check=False"):
        ViewDataset(pictures(), archive_of(PLAIN))
