"""Distillation in a webdataset pipeline of one's own: python examples/webdataset_loop.py ARCHIVE TARS [EPOCHS]

TARS is a pattern such as 'train-{0000..0146}.tar', of paths or addresses. The pipeline gives pixels, labels and rows of
one view; its other stages are webdataset's.
"""

from __future__ import annotations

import sys

import torch
import torchvision
from redistill_cache import open_archive

import redistill
from redistill.losses import power_divergence


def main(path: str, tars: str, epochs: int) -> None:
    torch.manual_seed(0)
    archive = open_archive(path)
    teacher = redistill.CachedTeacher(archive)
    student = torchvision.models.resnet18(num_classes=archive.num_classes)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        view = epoch % archive.num_views
        pipeline = redistill.webdataset_views(tars, archive, view).shuffle(1000, seed=epoch).batched(64)
        for pixels, labels, rows in torch.utils.data.DataLoader(pipeline, batch_size=None):
            logits = student(pixels / 255)
            loss = 0.9 * power_divergence(logits, teacher(rows, view), lam=2 / 3, temperature=4.0)
            loss = loss + 0.1 * torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/webdataset_loop.py ARCHIVE TARS [EPOCHS]")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 2)
