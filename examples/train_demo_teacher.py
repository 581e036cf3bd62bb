"""Train the teacher that ships with `redistill demo`: python examples/train_demo_teacher.py OUT.safetensors

It is trained on sixty times as many images as the demo's students, in about four minutes on one core. The weights in
redistill/demo/ were written by this script.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from redistill.demo.run import TEACHER_DATA, TEACHER_NETWORK, VAL_DATA
from redistill.models import OpenedModel, open_model
from redistill.models.weights import save_weights
from redistill.sources.open_source import open_source

EPOCHS, BATCH, LR, WARMUP, SHIFT = 5, 64, 0.1, 200, 3


def pixels_of(data: str) -> tuple[torch.Tensor, torch.Tensor]:
    source = open_source(data)
    samples = [source.sample(i) for i in range(len(source))]
    pixels = np.stack([np.asarray(sample.payload) for sample in samples]).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.tensor([sample.label for sample in samples])


def train(model: OpenedModel, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    network, normalise = model.module.to(memory_format=torch.channels_last), model.normalise()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    generator, size = torch.Generator().manual_seed(0), pixels.shape[-1]
    steps = EPOCHS * (len(pixels) // BATCH)
    done, start = 0, time.monotonic()
    for epoch in range(EPOCHS):
        network.train()
        for rows in torch.randperm(len(pixels), generator=generator).split(BATCH)[: len(pixels) // BATCH]:
            lr = LR * min(1.0, (done + 1) / WARMUP) * (1 + math.cos(math.pi * done / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr
            top, left = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
            padded = F.pad(pixels[rows], (SHIFT,) * 4, mode="replicate")
            views = normalise(padded[:, :, top : top + size, left : left + size])
            loss = F.cross_entropy(network(views.contiguous(memory_format=torch.channels_last)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)


@torch.no_grad()
def top1(model: OpenedModel, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    network, normalise = model.module.eval(), model.normalise()
    predictions = torch.cat([network(normalise(batch)).argmax(1) for batch in pixels.split(500)])
    return float((predictions == labels).float().mean())


def main(out: Path) -> None:
    model = open_model(f"{TEACHER_NETWORK}&weights=random")
    train(model, *pixels_of(TEACHER_DATA))
    model.module.half()  # halves the file; the weights are converted back to float32 when they are loaded
    save_weights(model.module, out, model.metadata())
    accuracy = top1(open_model(f"{TEACHER_NETWORK}&weights={out}"), *pixels_of(VAL_DATA))
    print(f"{out}: top-1 {accuracy:.2%} on held-out images")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/train_demo_teacher.py OUT.safetensors")
    main(Path(sys.argv[1]))
