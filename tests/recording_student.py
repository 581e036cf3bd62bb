"""A student that records the images of every training step, and sends its process SIGTERM at one of the steps."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn


class RecordingStudent(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
        self.path = Path(f"{os.environ['RECORD_TO']}-{os.environ.get('RANK', '0')}.jsonl")
        self.stop_at = int(os.environ.get("STOP_AT", "0"))
        self.steps = 0

    def forward(self, pixels: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.steps += 1
            images = [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest() for image in pixels]
            with self.path.open("a") as file:
                file.write(json.dumps(images) + "\n")
            if self.steps == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
        logits: Tensor = self.inner(pixels)
        return logits


def build(num_classes: int = 8) -> nn.Module:
    return RecordingStudent(num_classes)
