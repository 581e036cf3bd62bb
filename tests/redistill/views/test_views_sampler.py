"""ViewSampler: every usable row once per epoch, the same batches for any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from redistill_cache import open_archive
from redistill_cache.errors import UsageError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import redistill
from redistill.losses import power_divergence
from tests.small_archive import DATA, cache


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("sampler") / "a.redistill.zarr", views=2)  # 150 rows


@pytest.fixture(scope="module")
def dataset(archive: Path) -> redistill.ViewDataset:
    return redistill.ViewDataset(DATA, open_archive(archive))


def test_an_epoch_shows_every_row_of_its_view_once(dataset: redistill.ViewDataset):
    sampler = redistill.ViewSampler(dataset, seed=3)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(sampler) == 150
        assert sorted(orders[-1]) == dataset.indices(epoch % 2).tolist()
        assert list(sampler) == orders[-1]
    assert (np.array(orders[0]) != np.array(orders[2])).any()
    assert list(redistill.ViewSampler(dataset, seed=3, epoch=2)) == orders[2]
    assert list(redistill.ViewSampler(dataset, seed=4, epoch=2)) != orders[2]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_processes_sees_the_same_global_batches(dataset: redistill.ViewDataset, world: int):
    whole = list(redistill.ViewSampler(dataset, seed=1))
    parts = [list(redistill.ViewSampler(dataset, seed=1, rank=rank, world=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    for start in range(0, 150 // world, 5):  # batches of 5 per process
        of_ranks = {index for part in parts for index in part[start : start + 5]}
        expected = whole[start * world : (start + 5) * world]
        assert of_ranks >= set(expected)
        assert len(of_ranks) <= 5 * world
    assert {index for part in parts for index in part} == set(whole)
    assert sum(map(len, parts)) - 150 == -150 % world  # the first rows again, so that no process ends early


def test_rows_without_an_image_are_left_out(dataset: redistill.ViewDataset):
    fewer = dataset.without(np.arange(0, 150, 3))
    assert sorted(redistill.ViewSampler(fewer)) == fewer.indices(0).tolist()
    assert len(redistill.ViewSampler(fewer)) == 100


def test_num_views_limits_the_views_in_turn(dataset: redistill.ViewDataset):
    sampler = redistill.ViewSampler(dataset, num_views=1)
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        assert sampler.view == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 1}, "both rank and world or neither"),
        ({"rank": 2, "world": 2}, "from 0 to world - 1, found rank=2, world=2"),
        ({"rank": -1, "world": 2}, "from 0 to world - 1"),
        ({"num_views": 3}, "num_views from 1 to the 2"),
        ({"num_views": 0}, "num_views from 1 to the 2"),
        ({"epoch": -1}, "epoch of 0 or above"),
    ],
)
def test_arguments_that_cannot_be(dataset: redistill.ViewDataset, arguments: dict[str, int], message: str):
    with pytest.raises(UsageError, match=message):
        redistill.ViewSampler(dataset, **arguments)


def _train_on_rank(rank: int, world: int, folder: str) -> None:
    """A data-parallel loop over two epochs; every rank saves its weights and the rows it saw."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    archive = open_archive(f"{folder}/a.redistill.zarr")
    dataset, teacher = redistill.ViewDataset(DATA, archive), redistill.CachedTeacher(archive)
    torch.manual_seed(0)
    student: torch.nn.Module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(8)).double()
    student(torch.zeros(1, 3, dataset.size, dataset.size, dtype=torch.float64))
    if world > 1:
        student = DistributedDataParallel(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    sampler = redistill.ViewSampler(dataset, seed=2)  # rank and world of the process group
    loader = DataLoader(dataset, 30 // world, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for pixels, _, rows, views in loader:
            loss = power_divergence(student(pixels.double() / 255), teacher(rows, views), lam=2 / 3, temperature=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save([p.detach() for p in student.parameters()], f"{folder}/weights-{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_train_the_student_that_one_trains(tmp_path: Path):
    """A loop of one's own under DistributedDataParallel: same batches, so the same weights but for rounding."""
    cache(tmp_path / "a.redistill.zarr", views=2)
    mp.spawn(_train_on_rank, (1, str(tmp_path)), nprocs=1)
    mp.spawn(_train_on_rank, (2, str(tmp_path)), nprocs=2)
    alone, *of_ranks = (torch.load(tmp_path / f"weights-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for weights in of_ranks:
        for one, other in zip(alone, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
