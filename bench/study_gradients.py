"""The gradient of a distillation loss on the student's logits, beside that of KL: the third part of bench/study.py.

A student is trained with each loss; after some epochs, on the same rows of view 0, the gradient of the loss and that of
KL at the same temperature are computed for the student as it is, with the published weight of both:

    norm      the mean over rows of the length of the loss's gradient, and of KL's
    shrunk    the share of rows whose gradient is less than a tenth of KL's
    cosine    between the gradients, weighted by row lengths: that of the whole batch
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from redistill_cache import open_archive
from torch import Tensor
from torch.nn import functional as F

import redistill
from redistill.losses.catalogue import make_loss
from redistill.optim import OptimConfig, lr_at, set_lr
from redistill.training.feed import Feed

__all__ = ["AUDITED", "audit"]

AUDITED = tuple(
    f"{name}temperature={t}"
    for t in (4, 1)
    for name in ("kl?", "power?", "power?calibrate=1&", "power?form=cressie-read&")
)
CE_WEIGHT, KD_WEIGHT, BATCH_SIZE, ROWS = 0.1, 0.9, 32, 512


def audit(archive_path: Path, data: str, student: str, epochs: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """A row for each loss and each of some epochs, from 0 (the first weights) to the end."""
    archive = open_archive(archive_path)
    dataset, teacher = redistill.ViewDataset(data, archive), redistill.CachedTeacher(archive)
    watched = dataset.indices(0)[:ROWS]
    items = dataset.__getitems__(watched.tolist())
    pixels = torch.stack([item.pixels for item in items])
    target = teacher(torch.tensor([int(item.row) for item in items]), 0)
    at = sorted({round(epochs * share) for share in (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1)})
    for text in AUDITED:
        opened = redistill.open_model(student, num_classes=archive.num_classes, seed=seed)
        network, normalise = opened.module, opened.normalise()
        optim = OptimConfig(lr=0.1, weight_decay=5e-4, epochs=epochs, warmup_epochs=1.0)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        loss, kl = make_loss(text)[1], make_loss(f"kl?temperature={text.rpartition('=')[2]}")[1]
        for epoch in range(epochs + 1):
            if epoch in at:
                with torch.no_grad():
                    logits = network.eval()(normalise(pixels))
                yield {"loss": text, "epoch": epoch} | comparison(loss, kl, logits, target)
            if epoch == epochs:
                break
            network.train()
            batches = Feed(dataset, epochs=epoch + 1, batch_size=BATCH_SIZE, seed=seed).start(epoch)
            for plan, images in batches:
                set_lr(optimizer, lr_at(optim, epoch + plan.batch / plan.batches))
                logits = network(normalise(images.pixels))
                hard = F.cross_entropy(logits, images.labels)
                soft = loss(student_logits=logits, teacher_logits=teacher(plan.rows, plan.views[0]))
                optimizer.zero_grad()
                (CE_WEIGHT * hard + KD_WEIGHT * soft).backward()
                optimizer.step()


def comparison(loss: Any, kl: Any, logits: Tensor, target: Tensor) -> dict[str, float]:  # noqa: ANN401  losses
    own, of_kl = (KD_WEIGHT * row_gradients(each, logits, target) for each in (loss, kl))
    lengths, of_kl_lengths = own.norm(dim=1), of_kl.norm(dim=1)
    return {
        "norm": float(lengths.mean()),
        "kl_norm": float(of_kl_lengths.mean()),
        "shrunk": float((lengths < 0.1 * of_kl_lengths).float().mean()),
        "cosine": float(F.cosine_similarity(own.flatten(), of_kl.flatten(), dim=0)),
    }


def row_gradients(loss: Any, logits: Tensor, target: Tensor) -> Tensor:  # noqa: ANN401
    """The gradient of each row's own value, [rows, classes]."""
    leaf = logits.clone().requires_grad_()
    value = loss(student_logits=leaf, teacher_logits=target)
    return torch.autograd.grad(value, leaf)[0] * len(leaf)  # the value is the mean over rows
