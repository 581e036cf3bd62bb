"""Distillation from an archive in a timm training loop: python examples/timm_loop.py ARCHIVE DATA [EPOCHS]

Model, optimiser, schedule and weight average come from timm; dataset, teacher and loss from redistill.
"""

from __future__ import annotations

import sys

import timm
import torch
from redistill_cache import open_archive
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3

import redistill
from redistill.losses import power_divergence


def main(path: str, data: str, epochs: int) -> None:
    torch.manual_seed(0)
    archive = open_archive(path)
    dataset = redistill.ViewDataset(data, archive)  # refuses images whose views are not those the teacher saw
    teacher = redistill.CachedTeacher(archive)
    student = timm.create_model("resnet18", num_classes=archive.num_classes)
    mean, std = (torch.tensor(student.pretrained_cfg[name]).view(3, 1, 1) * 255 for name in ("mean", "std"))
    optimizer = create_optimizer_v2(student, opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1)
    average = ModelEmaV3(student, decay=0.999)
    sampler = redistill.ViewSampler(dataset)
    loader = torch.utils.data.DataLoader(dataset, batch_size=64, sampler=sampler)
    for epoch in range(epochs):
        losses = AverageMeter()
        sampler.set_epoch(epoch)
        for pixels, labels, rows, views in loader:
            logits = student((pixels - mean) / std)
            loss = 0.9 * power_divergence(logits, teacher(rows, views), lam=2 / 3, temperature=4.0)
            loss = loss + 0.1 * torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(student)
            losses.update(loss.item(), len(rows))
        scheduler.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss {losses.avg:.3f}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/timm_loop.py ARCHIVE DATA [EPOCHS]")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 2)
