"""--compile: the shapes that networks are compiled for. The last test runs the real compiler, which takes long."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from redistill.models import open_model
from redistill.teachers import Teacher, check_teacher
from redistill.training import train
from tests.redistill.training.runs import history
from tests.small_archive import VAL


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | torch.SymInt, ...]]:
    """The shapes of pixels of the graphs that torch.compile takes out of networks, which then run uncompiled."""
    found = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        found.extend(
            tuple(each.shape) for each in inputs if each.ndim == 4 and not isinstance(each, torch.nn.Parameter)
        )
        assert all(isinstance(side, int) for each in inputs for side in each.shape), "a dynamic shape"
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=record))
    return found


def test_a_teacher_is_compiled_for_one_batch_size(graphs):
    """Its checks use batches of 8, 2 and 6, and the last batch is of three."""
    teacher = Teacher(
        open_model("demo:tiny?num_classes=5&weights=random"), device=torch.device("cpu"), compile=True, batch_size=8
    )
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    check_teacher(teacher, pixels)
    assert not graphs
    whole, last = teacher(pixels)["logits"], teacher(pixels[:3])["logits"]
    assert graphs == [(8, 3, 32, 32)]
    torch.testing.assert_close(last, whole[:3])


def test_students_are_compiled_for_the_two_sizes_of_batches(options, graphs, monkeypatch: pytest.MonkeyPatch):
    """150 images in 4 batches of 37 and 38, and two networks of the same code, of which torch here keeps two graphs."""
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 2)
    students = ("cifar:wrn_10_1", "cifar:wrn_10_2")
    train(options(compile=True, students=students, epochs=1, batch_size=40, size=8, warmup_epochs=0))
    assert sorted(graphs) == [(37, 3, 8, 8)] * 2 + [(38, 3, 8, 8)] * 2


@pytest.mark.slow  # a compiler runs for a minute
def test_a_compiled_run_trains_as_an_uncompiled_one(options, tmp_path):
    losses = {}
    for compiled in (False, True):
        run = options(compile=compiled, out=tmp_path / str(compiled), val=VAL, ema=0.9)
        train(run)
        losses[compiled] = [float(row["train_loss"]) for row in history(run.out)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert losses[True][-1] < losses[True][0]
