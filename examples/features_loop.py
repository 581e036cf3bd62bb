"""A student that learns the teacher's features: python examples/features_loop.py ARCHIVE DATA [EPOCHS]

    redistill cache-teacher DATA --teacher MODEL --signals logits,penultimate --out ARCHIVE

The backbone learns to match the teacher's penultimate rows through a linear map; the labels train the last layer only,
on features without gradient (arXiv 2511.14981). `redistill train --loss features` does the same.
"""

from __future__ import annotations

import sys

import torch
from redistill_cache import open_archive
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler

import redistill


def main(path: str, data: str, epochs: int) -> None:
    torch.manual_seed(0)  # the projector and the order of the images
    archive = open_archive(path)
    dataset, teacher = redistill.ViewDataset(data, archive), redistill.CachedTeacher(archive)
    opened = redistill.open_model("demo:tiny", num_classes=archive.num_classes)
    student, normalise = redistill.tap(opened.module, ["penultimate"]), opened.normalise()
    width = archive.signal(None, "penultimate")[1].width
    projector = torch.nn.Linear(student.head.in_features, width, bias=False)
    optimizer = torch.optim.AdamW([*student.parameters(), *projector.parameters()], lr=0.005, weight_decay=0.01)
    for epoch in range(epochs):
        sampler = SubsetRandomSampler(dataset.indices(epoch % archive.num_views).tolist())
        for pixels, labels, rows, views in DataLoader(dataset, batch_size=64, sampler=sampler):
            features = student(normalise(pixels))["penultimate"]
            match = F.mse_loss(projector(features), teacher.features(rows, views, "penultimate"))
            loss = match + F.cross_entropy(student.head(features.detach()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/features_loop.py ARCHIVE DATA [EPOCHS]")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 2)
