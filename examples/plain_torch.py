"""Distillation from an archive in a plain training loop: python examples/plain_torch.py ARCHIVE DATA [EPOCHS]

Only the dataset, the teacher and the loss come from redistill.
"""

from __future__ import annotations

import sys

import torch
import torchvision
from redistill_cache import open_archive

import redistill
from redistill.losses import power_divergence


def main(path: str, data: str, epochs: int) -> None:
    torch.manual_seed(0)
    archive = open_archive(path)
    dataset = redistill.ViewDataset(data, archive)  # refuses images whose views are not those the teacher saw
    teacher = redistill.CachedTeacher(archive)
    student = torchvision.models.resnet18(num_classes=archive.num_classes)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    sampler = redistill.ViewSampler(dataset)
    loader = torch.utils.data.DataLoader(dataset, batch_size=64, sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for pixels, labels, rows, views in loader:
            logits = student(pixels / 255)
            loss = 0.9 * power_divergence(logits, teacher(rows, views), lam=2 / 3, temperature=4.0)
            loss = loss + 0.1 * torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/plain_torch.py ARCHIVE DATA [EPOCHS]")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 2)
