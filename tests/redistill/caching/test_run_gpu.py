"""Stage 1 on a GPU, a simulated one: an archive within the bound, for which the host waits as little as possible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import redistill_cache
import torch
from redistill_cache.codecs import kl_rows
from redistill_cache.verify import verify

import redistill
from redistill.cached_teacher import CachedTeacher
from redistill.caching import cache_teacher
from redistill.caching.encoder import BlockEncoder
from redistill.models import open_model
from redistill.progress import NoProgress
from redistill.teachers import Teacher
from tests.redistill.caching.test_run import render_view
from tests.simulated_cuda import simulated_cuda
from tests.stage1 import file_hashes, five_class_options

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("codec", "amp"),
    [pytest.param("linear", None, marks=pytest.mark.slow), ("linear", False), ("compander", None), ("float16", False)],
)
def test_an_archive_written_on_a_gpu(tmp_path: Path, codec: str, amp: bool | None):
    options = five_class_options(tmp_path / "a.zarr", device="cuda", codec=codec, amp=amp, recipe="cifar?cutmix=1")
    with simulated_cuda():
        cache_teacher(options)
        archive = redistill_cache.open_archive(options.out)
        teacher = Teacher(open_model(options.teacher), device=GPU, amp=torch.bfloat16 if amp is None else None)
        pixels = render_view(redistill.open_source(options.data), archive, 1)
        exact = torch.cat([teacher(part)["logits"].cpu() for part in pixels[:32].split(16)]).numpy()
        rows, views = np.array([3, 40, 77, 5]), np.array([1, 0, 1, 1])
        with torch.autocast("cuda", torch.bfloat16):
            mixed = CachedTeacher(archive, GPU)(rows, views)
        assert mixed.dtype == torch.float32
        mixed = mixed.cpu().numpy()
    assert verify(options.out, full=True).ok
    assert kl_rows(exact, archive.logits(1)[:32], 1.0).max() <= options.fidelity + 1e-6
    precision = "float32" if amp is False else "bfloat16, final layer float32"
    assert archive.teachers["small"].model["precision"] == precision
    expected = np.stack([archive.logits(int(view), [int(row)])[0] for row, view in zip(rows, views, strict=True)])
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-5)


def test_in_float32_a_gpu_with_the_arithmetic_of_the_cpu_writes_its_bytes(tmp_path: Path):
    for name in ("cuda", "cpu"):
        options = five_class_options(tmp_path / name, device=name, amp=False, signals=("layer2", "penultimate"))
        with simulated_cuda():
            cache_teacher(options)
    found, expected = file_hashes(tmp_path / "cuda"), file_hashes(tmp_path / "cpu")
    rows = {name for name in expected if "/c." in name}
    assert len(rows) > 8
    assert {name: found.get(name) for name in rows} == {name: expected[name] for name in rows}


def test_the_encoder_waits_for_a_piece_once_and_for_rows_that_it_finishes_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pieces: list[object] = []
    encode = BlockEncoder._encode
    monkeypatch.setattr(BlockEncoder, "_encode", lambda *args: pieces.append(args[1]) or encode(*args))
    with simulated_cuda() as gpu, gpu.counting() as syncs:
        cache_teacher(five_class_options(tmp_path / "a.zarr", device="cuda", codec="linear", amp=False, views=1))
    waits = [sync for sync in syncs if sync.within("encoder.py") and sync.within(" _run")]
    assert len([sync for sync in waits if sync.within("backend.py") and sync.within(" read")]) == len(pieces) > 1
    # Once more in pieces with rows that are finished on the host, and for rows that are stored exactly.
    others = [sync for sync in waits if not sync.within(" read")]
    assert {sync.stack[1].split()[-1] for sync in others} <= {"encode_on_device", "exact_rows"}, list(map(str, others))
    assert len(others) <= 2 * len(pieces)


class Said(NoProgress):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)


def test_without_triton_the_encoder_runs_in_torch_and_says_so_once(tmp_path: Path):
    said = Said()
    with simulated_cuda():  # on which no kernel of Triton can run
        cache_teacher(five_class_options(tmp_path / "a.zarr", device="cuda", codec="linear", views=1), said)
    lines = [line for line in said.lines if "Triton" in line]
    assert len(lines) == 1
    assert lines[0].startswith("Triton is not installed, so encoding on cuda:0")
