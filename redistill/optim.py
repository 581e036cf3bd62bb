"""Optimisers and learning rates, under the names that timm's users know.

The learning rate is a pure function of progress: nothing has to be saved or replayed to resume in the middle of an
epoch. `sgd` is torch's plain momentum, as the distillation literature uses it; `nesterov` is what timm calls sgd.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from redistill_cache.errors import UsageError
from torch import Tensor, nn

from redistill.specs import did_you_mean

__all__ = ["PRESETS", "OptimConfig", "Preset", "clip_gradients", "lr_at", "make_optimizer", "preset", "set_lr"]

OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
SCHEDULES = ("cosine", "step", "multistep", "constant")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights are moved. Field names are option names."""

    opt: str = "nesterov"
    lr: float = 0.1
    """The highest rate, at the batch size in use: nothing scales it silently."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    no_decay_norm_bias: bool = False
    """Leave biases and the parameters of norms out of weight decay."""
    sched: str = "cosine"
    epochs: int = 240
    warmup_epochs: float = 0.0
    """From `warmup_lr` to `lr` on a straight line, counted within `epochs`. Milestones count from the start."""
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    """Where cosine ends, and what step and multistep never go below."""
    decay_epochs: float = 30.0
    """`step`: multiply by `decay_rate` every so many epochs."""
    decay_milestones: tuple[float, ...] = ()
    """`multistep`: multiply by `decay_rate` when these epochs are complete."""
    decay_rate: float = 0.1
    clip_grad: float | None = None
    """Largest norm of the whole gradient."""

    def __post_init__(self) -> None:
        one_of("opt", self.opt, OPTIMIZERS)
        one_of("sched", self.sched, SCHEDULES)
        for name in ("lr", "decay_epochs", "decay_rate", "epochs", "clip_grad"):
            within(name, getattr(self, name), low_open=True)
        for name in ("weight_decay", "warmup_epochs", "warmup_lr", "min_lr"):
            within(name, getattr(self, name))
        if not 0 <= self.momentum < 1:
            raise UsageError(f"{flag('momentum')} must be in [0, 1), found {self.momentum!r}")
        if self.opt == "nesterov" and self.momentum == 0:
            raise UsageError("--opt nesterov needs --momentum above 0")
        if self.warmup_epochs > self.epochs:
            raise UsageError(f"{self.warmup_epochs:g} warm-up epochs do not fit into {self.epochs} epochs")
        if self.min_lr > self.lr:
            raise UsageError(f"--min-lr {self.min_lr:g} is above --lr {self.lr:g}")
        if self.sched == "multistep" and not self.decay_milestones:
            raise UsageError("--sched multistep needs --decay-milestones, such as 150,180,210")
        if any(not m > 0 for m in self.decay_milestones) or list(self.decay_milestones) != sorted(
            set(self.decay_milestones)
        ):
            raise UsageError(f"--decay-milestones must rise from above 0, found {list(self.decay_milestones)}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"decay_milestones": list(self.decay_milestones)}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise UsageError(f"{flag(name)} {value!r} is not known; {did_you_mean(value, known)}")


def within(name: str, value: float | None, *, low_open: bool = False) -> None:
    """A finite number, not below zero; with `low_open`, above it."""
    if value is None:
        return
    if not math.isfinite(value) or value < 0 or (low_open and value == 0):
        raise UsageError(f"{flag(name)} must be a finite number {'above' if low_open else 'from'} 0, found {value!r}")


def lr_at(config: OptimConfig, progress: float) -> float:
    """The learning rate after `progress` epochs: 1.5 is half-way through the second.

    Ask with steps_done / steps_per_epoch before each step.
    """
    if progress < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * progress / config.warmup_epochs
    if config.sched == "cosine":
        length = config.epochs - config.warmup_epochs
        part = min((progress - config.warmup_epochs) / length, 1.0) if length else 1.0
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * part)) / 2
    if config.sched == "step":
        return max(config.lr * config.decay_rate ** int(progress / config.decay_epochs), config.min_lr)
    if config.sched == "multistep":
        return max(config.lr * config.decay_rate ** sum(progress >= m for m in config.decay_milestones), config.min_lr)
    return config.lr


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of a module's trainable parameters, with the rate of step 0."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = parameter_groups(named, config)
    lr = lr_at(config, 0.0)
    if config.opt == "adam":
        return torch.optim.Adam(groups, lr=lr)
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.opt == "nesterov")


def parameter_groups(named: list[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """One group per weight decay. A vector is a bias or belongs to a norm."""
    if not config.no_decay_norm_bias:
        return [{"params": [p for _, p in named], "weight_decay": config.weight_decay}]
    spared = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim <= 1 or name.endswith(".bias"))]
    groups = [(decayed, config.weight_decay), (spared, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], config: OptimConfig) -> Tensor | None:
    """Scale the gradients to `clip_grad` where they are longer; the norm before that, or None without clipping.

    Under a gradient scaler, call `scaler.unscale_(optimizer)` first.
    """
    if config.clip_grad is None:
        return None
    return nn.utils.clip_grad_norm_(parameters, config.clip_grad)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A recipe of the literature: what `preset` hands out, at the batch size in use."""

    batch_size: int
    optim: OptimConfig
    note: str


# CRD (arXiv 1910.10699) and its followers; rates of the narrow families are those of their scripts.
CIFAR_KD = OptimConfig(
    opt="sgd",
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    sched="multistep",
    epochs=240,
    decay_milestones=(150.0, 180.0, 210.0),
)
IMAGENET_100 = OptimConfig(
    opt="sgd",
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    sched="multistep",
    epochs=100,
    decay_milestones=(30.0, 60.0, 90.0),
)
QUICK = OptimConfig(opt="nesterov", lr=0.1, weight_decay=5e-4, sched="cosine", epochs=10, warmup_epochs=1.0)

PRESETS = {
    "cifar-kd": Preset(batch_size=64, optim=CIFAR_KD, note="CIFAR-100 as in CRD: 240 epochs, x0.1 at 150, 180, 210"),
    "imagenet-100": Preset(batch_size=256, optim=IMAGENET_100, note="ImageNet: 100 epochs, x0.1 at 30, 60, 90"),
    "quick": Preset(batch_size=128, optim=QUICK, note="10 epochs, cosine: to see that everything works"),
}

# Families that diverge at 0.05 without warm-up: CRD's scripts train them at a fifth of the rate.
GENTLE = ("mobilenet", "shuffle")
GENTLE_FACTOR = 0.2


def preset(name: str, *, model: str = "", batch_size: int | None = None) -> Preset:
    """A preset for this model (by name) at this batch size: the rate is scaled in proportion to the batch."""
    one_of("preset", name, PRESETS)
    found = PRESETS[name]
    gentle = name == "cifar-kd" and model.lower().startswith(GENTLE)
    batch = found.batch_size if batch_size is None else batch_size
    lr = found.optim.lr * (GENTLE_FACTOR if gentle else 1.0) * (batch / found.batch_size)
    return replace(found, batch_size=batch, optim=replace(found.optim, lr=lr))
