"""What decides the last bit of a pixel: the versions an archive notes, and a reader compares its own with."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import features

__all__ = ["view_environment"]


def view_environment() -> dict[str, str]:
    """Decoder, resizer and processor of this machine, as plain JSON."""
    return {
        "pillow": version("pillow"),
        "libjpeg": _libjpeg(),
        "torchvision": version("torchvision"),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _libjpeg() -> str:
    if features.check_feature("libjpeg_turbo"):
        return f"libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
    return f"libjpeg {features.version_codec('jpg')}"


def _processor() -> str:
    """The processor's own name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
