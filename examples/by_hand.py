"""From a teacher to an archive to a student, with the library alone: what exists before the two commands do.

python examples/by_hand.py OUT

Draws a small image set, trains a teacher on it for a few seconds, caches what it says of augmented views in an
archive, verifies the archive, and trains a student from it with the power divergence and no teacher in memory. On a
CPU it takes about a minute. It shows how the pieces fit, not which loss is best: the task is too easy for that.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from redistill_cache import ArchiveSpec, ArchiveWriter, SignalSpec, TeacherSpec, open_archive
from redistill_cache.codecs import BlockStats, fit_codec
from redistill_cache.inspect import describe
from redistill_cache.verify import verify

import redistill
from redistill.devices import pick_device
from redistill.losses.objective import Objective
from redistill.models import OpenedModel, open_model
from redistill.sources.index import index_source
from redistill.teachers import Teacher
from redistill.views import DrawnViews, ViewDataset, parse_recipe

CLASSES, VIEWS, BLOCK = 10, 4, 128
TEACHER_IMAGES, STUDENT_IMAGES, TEST_IMAGES = 2048, 256, 512


@dataclass(frozen=True)
class Stripes:
    """Any object with `__len__` and `sample(i) -> (array or bytes, label, key)` is an image set."""

    name: str
    count: int
    class_names: tuple[str, ...] = tuple(f"slant-{i}" for i in range(CLASSES))

    def __len__(self) -> int:
        return self.count

    def sample(self, i: int) -> tuple[np.ndarray, int, str]:
        rng = np.random.default_rng([*self.name.encode(), i])
        label = i % CLASSES
        slant = (label + rng.normal(0, 0.15)) * np.pi / CLASSES  # neighbours overlap: some images cannot be told apart
        y, x = np.mgrid[:32, :32]
        wave = np.sin((x * np.cos(slant) + y * np.sin(slant)) * rng.uniform(0.5, 1.1) + rng.uniform(0, 6.3))
        colour = rng.uniform(20, 90, 3)
        pixels = 128 + wave[..., None] * colour + rng.normal(0, 80, (32, 32, 3))
        return np.clip(pixels, 0, 255).astype(np.uint8), label, f"{self.name}/{i:05d}"


def pixels_of(source: Stripes) -> tuple[torch.Tensor, torch.Tensor]:
    samples = [source.sample(i) for i in range(len(source))]
    images = np.stack([pixels for pixels, _, _ in samples]).transpose(0, 3, 1, 2)
    return torch.from_numpy(images), torch.tensor([label for _, label, _ in samples])


def train_on_labels(model: OpenedModel, source: Stripes, epochs: int) -> None:
    images, labels = pixels_of(source)
    normalise, optimizer = model.normalise(), torch.optim.AdamW(model.module.parameters(), lr=3e-3)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        shifted = torch.nn.functional.pad(images, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # all crops, no copy
        for rows in order.split(64):
            top, left = torch.randint(9, (2,), generator=torch.Generator().manual_seed(int(rows[0]))).tolist()
            pixels = normalise(shifted[rows, :, top, left])
            loss = torch.nn.functional.cross_entropy(model.module(pixels), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def top1(model: OpenedModel, source: Stripes) -> float:
    images, labels = pixels_of(source)
    return float((model.module.eval()(model.normalise()(images)).argmax(1) == labels).float().mean())


def cache(path: Path, source: Stripes, teacher: Teacher) -> str:
    """What stage 1 does: draw views, render them, ask the teacher, encode, commit block by block, seal."""
    recipe, index = parse_recipe("cifar?hflip=0"), index_source(redistill.open_source(source))
    views = DrawnViews(index, recipe, seed=0, num_views=VIEWS)
    dataset = ViewDataset(source, views)

    def ask(view: int, rows: range) -> np.ndarray:
        items = dataset.__getitems__([dataset.index(view, row) for row in rows])
        return teacher(torch.stack([item.pixels for item in items]))["logits"].numpy()

    codec = fit_codec("linear", ask(0, range(len(source))))
    spec = ArchiveSpec(
        num_samples=len(index),
        num_views=VIEWS,
        num_classes=CLASSES,
        class_names=index.class_names,
        block_rows=BLOCK,
        recipe=recipe.to_json(),
        view_arrays=recipe.arrays(),
        licence="CC0-1.0",
    )
    writer = ArchiveWriter.create(path, spec)
    writer.write_samples(index.keys, index.labels, index.digests, index.sizes)
    description = TeacherSpec("stripes", (SignalSpec.of("logits", codec),), teacher.model.describe())
    writer.add_teacher(description, {"logits": codec.side()})
    for block in writer.missing("views"):
        writer.write(block, views.params(block.view, np.arange(block.start, block.stop)))
    for block in writer.missing("teachers/stripes"):
        encoded = codec.encode(ask(block.view, block.rows))
        arrays = {f"logits/{name}": values for name, values in encoded.arrays.items()}
        writer.write(block, arrays, {"logits": BlockStats.of(encoded).to_json()})
    return writer.seal()


def train_from_archive(model: OpenedModel, path: Path, source: Stripes, epochs: int, losses: list[str]) -> None:
    """A student in an ordinary loop: pixels from the dataset, the teacher's answers from the archive, by row."""
    archive = open_archive(path)
    dataset, objective = ViewDataset(source, archive), Objective(losses)
    normalise, optimizer = model.normalise(), torch.optim.AdamW(model.module.parameters(), lr=3e-3)
    for epoch in range(epochs):
        view = epoch % archive.num_views
        packed = archive.load_view(view)
        order = np.random.default_rng(epoch).permutation(dataset.indices(view))
        loader = torch.utils.data.DataLoader(dataset, batch_size=16, sampler=order)
        for pixels, labels, rows, _ in loader:
            teacher_logits = torch.from_numpy(packed.decode(rows.numpy()))
            loss, _ = objective(model.module(normalise(pixels)), teacher_logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main(out: Path) -> None:
    start = time.perf_counter()
    out.mkdir(parents=True)
    many, few, test = Stripes("many", TEACHER_IMAGES), Stripes("few", STUDENT_IMAGES), Stripes("test", TEST_IMAGES)
    large = open_model(f"demo:small?num_classes={CLASSES}&weights=random")
    train_on_labels(large, many, epochs=4)
    print(f"teacher: {top1(large, test):.1%} on unseen images, trained on {len(many)}")

    path = out / "teacher.redistill.zarr"
    identity = cache(path, few, Teacher(large, device=pick_device("cpu")))
    found, report = describe(open_archive(path)), verify(path, full=True)
    signal = found["teachers"]["stripes"]["logits"]
    print(f"archive: {path}, id {identity[:12]}, {VIEWS} views of {len(few)} images")
    bound = signal["fidelity"]["bound"]
    print(f"         {signal['bytes_per_view']:.1f} bytes a view for logits of {2 * CLASSES} bytes in float16")
    print(f"         every row within KL {bound:g} of what the teacher said; all files verified: {report.ok}")

    student = open_model(f"demo:tiny?num_classes={CLASSES}", seed=1)
    train_from_archive(student, path, few, 8, ["power?lam=0.6667&temperature=4", "ce?weight=0.1"])
    print(
        f"student: {top1(student, test):.1%} on unseen images, trained on {len(few)} from the archive, no teacher near"
    )
    print(f"{time.perf_counter() - start:.0f} s in all. Try: redistill inspect {path}; redistill verify {path} --full")


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: python examples/by_hand.py OUT    (a folder that does not exist yet)")
    main(Path(sys.argv[1]))
