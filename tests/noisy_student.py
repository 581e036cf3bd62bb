"""A student with dropout, loaded as `--student python:tests.noisy_student:build`."""

from __future__ import annotations

from torch import nn


def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(3 * 32 * 32, 8))
