"""Distillation from an archive in Lightning: python examples/lightning_loop.py ARCHIVE DATA [EPOCHS]

An ordinary LightningModule. Lightning calls `set_epoch` of the sampler, so that each epoch shows another view.
"""

from __future__ import annotations

import sys

import lightning
import torch
import torchvision
from redistill_cache import open_archive

import redistill
from redistill.losses import power_divergence


class Distilled(lightning.LightningModule):
    def __init__(self, path: str, data: str) -> None:
        super().__init__()
        self.archive = open_archive(path)
        self.dataset = redistill.ViewDataset(data, self.archive)  # refuses images with other views than the teacher saw
        self.student = torchvision.models.resnet18(num_classes=self.archive.num_classes)

    def on_fit_start(self) -> None:
        self.teacher = redistill.CachedTeacher(self.archive, device=self.device)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        sampler = redistill.ViewSampler(self.dataset)  # knows the ranks of the process group
        return torch.utils.data.DataLoader(self.dataset, batch_size=64, sampler=sampler)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        pixels, labels, rows, views = batch
        logits = self.student(pixels / 255)
        loss = 0.9 * power_divergence(logits, self.teacher(rows, views), lam=2 / 3, temperature=4.0)
        loss = loss + 0.1 * torch.nn.functional.cross_entropy(logits, labels)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(path: str, data: str, epochs: int) -> None:
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=epochs, use_distributed_sampler=False, logger=False, enable_checkpointing=False
    )
    trainer.fit(Distilled(path, data))
    print(f"epoch {trainer.current_epoch}: loss {trainer.callback_metrics['loss']:.3f}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/lightning_loop.py ARCHIVE DATA [EPOCHS]")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 2)
