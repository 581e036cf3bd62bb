"""A model and what must be known to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from redistill.models.facts import Facts, Norm, Triple

__all__ = ["Normalise", "OpenedModel"]


@dataclass(frozen=True)
class OpenedModel:
    """A network on the CPU in float32, and the facts its user needs. Made by `open_model`."""

    module: nn.Module
    spec: str
    """As given, paths included; `portable_spec` is the one to write down."""
    name: str
    num_classes: int
    input_size: int | None
    """Side of the square input in pixels; None where neither the network nor its weights decide it."""
    mean: Triple
    std: Triple
    weights_digest: str | None
    """`state_digest` of the loaded state; None for fresh weights nobody asked for."""
    weights_source: str | None
    """"file", "random" (asked for), a library's own label, "python", or None: a student before training."""
    interpolation: str | None = None
    resize: int | None = None
    portable_spec: str = ""
    """The spec without paths: it opens the same architecture anywhere."""

    @property
    def facts(self) -> Facts:
        return Facts(
            num_classes=self.num_classes,
            input_size=self.input_size,
            norm=Norm(self.mean, self.std),
            interpolation=self.interpolation,
            resize=self.resize,
        )

    def metadata(self) -> dict[str, Any]:
        """For `save_weights`: a file with this header opens without further options."""
        return {"spec": self.portable_spec, **self.facts.to_json()}

    def describe(self) -> dict[str, Any]:
        """For an archive: what decides the model's answers, and nothing of this machine."""
        return {
            "name": self.name,
            "weights_digest": self.weights_digest,
            "weights_source": self.weights_source,
            **self.metadata(),
        }

    def normalise(self) -> Normalise:
        return Normalise(self.mean, self.std)


class Normalise(nn.Module):
    """uint8 pixels to what the network was trained on: (pixels / 255 - mean) / std, as one multiply and one add.

    Holds buffers that follow `.to(device)` but are in no state_dict.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Triple, std: Triple) -> None:
        super().__init__()
        means, stds = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
        self.register_buffer("scale", (1 / (255 * stds)).float(), persistent=False)
        self.register_buffer("shift", (-means / stds).float(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.shift, pixels.to(torch.float32), self.scale)


def portable(scheme: str, name: str, options: Mapping[str, str]) -> str:
    """A spec string without what only means something on this machine or was an order for this one opening."""
    kept = "&".join(f"{key}={value}" for key, value in sorted(options.items()) if key not in ("weights", "seed"))
    return f"{scheme}:{name}" + (f"?{kept}" if kept else "")
