"""Initial weights, shared by the networks of this package."""

from __future__ import annotations

from torch import nn

__all__ = ["fan_out_init"]


def fan_out_init(module: nn.Module, *, linear_std: float | None = None) -> None:
    """He initialisation by fan-out for convolutions, one and zero for norms: what the residual papers train from.

    Linear layers keep torch's default, or get N(0, linear_std²) with zero bias.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            # Depthwise convolutions count their full fan-out here, as the published networks do (groups ignored).
            fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels
            nn.init.normal_(part.weight, 0.0, (2.0 / fan_out) ** 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear) and linear_std is not None:
            nn.init.normal_(part.weight, 0.0, linear_std)
            nn.init.zeros_(part.bias)
