"""Optimisers and learning rate schedules, under timm's names.

The learning rate is a pure function of progress, so resuming in the middle of an epoch needs no scheduler state. `sgd`
is torch's plain momentum, as the distillation literature uses it; `nesterov` is what timm calls sgd.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from redistill_cache.errors import UsageError

from redistill.option_fields import check_values, option
from redistill.specs import did_you_mean

if TYPE_CHECKING:  # imported where it is used: `redistill --help` shows these options and must not wait for torch
    import torch
    from torch import Tensor, nn

__all__ = ["PRESETS", "OptimConfig", "Preset", "clip_gradients", "lr_at", "make_optimizer", "preset", "set_lr"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and learning rate schedule."""

    epochs: int = field(default=240, metadata=option("Epochs of training.", at_least=1, at_most=1_000_000))
    opt: Literal["sgd", "nesterov", "adam", "adamw"] = field(
        default="nesterov", metadata=option("Optimiser; nesterov is what timm calls sgd.")
    )
    lr: float = field(
        default=0.1,
        metadata=option(
            "Peak learning rate. Only that of a preset is scaled with the batch size.", above=0, below=math.inf
        ),
    )
    momentum: float = field(default=0.9, metadata=option("Momentum of sgd and nesterov.", at_least=0, below=1))
    weight_decay: float = field(default=5e-4, metadata=option("Weight decay.", at_least=0, below=math.inf))
    no_decay_norm_bias: bool = field(
        default=False, metadata=option("No weight decay for biases and normalisation layers.")
    )
    sched: Literal["cosine", "onecycle", "step", "multistep", "constant"] = field(
        default="cosine",
        metadata=option("Learning rate schedule; onecycle rises over 30 % of the epochs and falls to almost 0."),
    )
    warmup_epochs: float = field(
        default=0.0,
        metadata=option(
            "Linear warm-up from --warmup-lr to --lr, counted within --epochs.", at_least=0, below=math.inf
        ),
    )
    warmup_lr: float = field(
        default=0.0, metadata=option("Learning rate at the start of warm-up.", at_least=0, below=math.inf)
    )
    min_lr: float = field(
        default=0.0,
        metadata=option(
            "Final learning rate of cosine, lower bound of onecycle, step and multistep.", at_least=0, below=math.inf
        ),
    )
    decay_epochs: float = field(
        default=30.0,
        metadata=option("With --sched step: epochs between multiplications by --decay-rate.", above=0, below=math.inf),
    )
    decay_milestones: tuple[float, ...] = field(
        default=(),
        metadata=option(
            "With --sched multistep: epochs, counted from the start, after which to multiply by --decay-rate, as in "
            "150,180,210.",
            metavar="A,B",
            commas=True,
            above=0,
        ),
    )
    decay_rate: float = field(
        default=0.1,
        metadata=option("Factor of the learning rate in --sched step and multistep.", above=0, below=math.inf),
    )
    clip_grad: float | None = field(
        default=None, metadata=option("Clip the norm of the whole gradient to this.", above=0, below=math.inf)
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.opt == "nesterov" and self.momentum == 0:
            raise UsageError("--opt nesterov needs --momentum above 0")
        if self.warmup_epochs > self.epochs:
            raise UsageError(f"--warmup-epochs {self.warmup_epochs:g} is above --epochs {self.epochs}")
        if self.sched == "onecycle" and self.warmup_epochs:
            raise UsageError("--sched onecycle warms up over 30 % of the epochs; leave out --warmup-epochs")
        if self.min_lr > self.lr:
            raise UsageError(f"--min-lr {self.min_lr:g} is above --lr {self.lr:g}")
        if self.sched == "multistep" and not self.decay_milestones:
            raise UsageError("--sched multistep needs --decay-milestones, such as 150,180,210")
        if list(self.decay_milestones) != sorted(set(self.decay_milestones)):
            raise UsageError(f"--decay-milestones must increase, found {list(self.decay_milestones)}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"decay_milestones": list(self.decay_milestones)}


# The curve of torch's OneCycleLR: the share of the epochs in which the learning rate rises, and its start and end as
# fractions of the peak. The momentum stays as it is.
ONECYCLE_RISE, ONECYCLE_START, ONECYCLE_END = 0.3, 1 / 25, 1 / 25e4


def lr_at(config: OptimConfig, progress: float) -> float:
    """The learning rate after `progress` epochs: steps_done / steps_per_epoch before each step."""
    if progress < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * progress / config.warmup_epochs
    if config.sched == "onecycle":
        part = min(progress / config.epochs, 1.0)
        if part < ONECYCLE_RISE:
            share = half_cosine(ONECYCLE_START, 1.0, part / ONECYCLE_RISE)
        else:
            share = half_cosine(1.0, ONECYCLE_END, (part - ONECYCLE_RISE) / (1 - ONECYCLE_RISE))
        return max(config.lr * share, config.min_lr)
    if config.sched == "cosine":
        length = config.epochs - config.warmup_epochs
        part = min((progress - config.warmup_epochs) / length, 1.0) if length else 1.0
        return half_cosine(config.lr, config.min_lr, part)
    if config.sched == "step":
        return max(config.lr * config.decay_rate ** int(progress / config.decay_epochs), config.min_lr)
    if config.sched == "multistep":
        return max(config.lr * config.decay_rate ** sum(progress >= m for m in config.decay_milestones), config.min_lr)
    return config.lr


def half_cosine(start: float, end: float, part: float) -> float:
    """From `start` to `end` as `part` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of the module's trainable parameters, at the learning rate of step 0."""
    import torch

    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = parameter_groups(named, config)
    lr = lr_at(config, 0.0)
    if config.opt == "adam":
        return torch.optim.Adam(groups, lr=lr)
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.opt == "nesterov")


def parameter_groups(named: list[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """One group per weight decay. A parameter of one dimension is a bias or belongs to a normalisation layer."""
    if not config.no_decay_norm_bias:
        return [{"params": [p for _, p in named], "weight_decay": config.weight_decay}]
    exempt = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim <= 1 or name.endswith(".bias"))]
    groups = [(decayed, config.weight_decay), (exempt, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], config: OptimConfig) -> Tensor | None:
    """Clip the gradient norm to `clip_grad`; returns the norm before clipping, or None without clipping.

    Under a gradient scaler, call `scaler.unscale_(optimizer)` first.
    """
    from torch import nn

    if config.clip_grad is None:
        return None
    return nn.utils.clip_grad_norm_(parameters, config.clip_grad)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of a published recipe."""

    batch_size: int
    optim: OptimConfig
    lr_of: Mapping[str, float] = field(default_factory=dict)
    """Published learning rates of families of networks, by the beginning of their names."""

    def lr(self, model: str) -> float:
        of_family = [lr for family, lr in self.lr_of.items() if model.lower().startswith(family)]
        return of_family[0] if of_family else self.optim.lr


PRESETS = {
    # CIFAR-100 as in CRD (arXiv 1910.10699) and its followers.
    "cifar-kd": Preset(
        batch_size=64,
        optim=OptimConfig(
            opt="sgd",
            lr=0.05,
            momentum=0.9,
            weight_decay=5e-4,
            sched="multistep",
            epochs=240,
            decay_milestones=(150.0, 180.0, 210.0),
        ),
        # Families that diverge at 0.05 without warm-up.
        lr_of={"mobilenet": 0.01, "shuffle": 0.01},
    ),
    # Losses on features, as in arXiv 2511.14981.
    "features": Preset(
        batch_size=128,
        optim=OptimConfig(opt="adamw", lr=0.0075, weight_decay=0.01, sched="onecycle", epochs=50),
        lr_of={"vgg": 0.005, "vit": 0.001, "deit": 0.001},
    ),
    # The usual ImageNet recipe: 100 epochs, x0.1 at 30, 60, 90.
    "imagenet-100": Preset(
        batch_size=256,
        optim=OptimConfig(
            opt="sgd",
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            sched="multistep",
            epochs=100,
            decay_milestones=(30.0, 60.0, 90.0),
        ),
    ),
    # 10 epochs, to see that everything works.
    "quick": Preset(
        batch_size=128,
        optim=OptimConfig(opt="nesterov", lr=0.1, weight_decay=5e-4, sched="cosine", epochs=10, warmup_epochs=1.0),
    ),
}


def preset(name: str, *, model: str = "", batch_size: int | None = None) -> Preset:
    """The preset for a model (by name) at a batch size: the learning rate is proportional to the batch size."""
    if name not in PRESETS:
        raise UsageError(f"--preset {name!r} is not known; {did_you_mean(name, PRESETS)}")
    published = PRESETS[name]
    batch = published.batch_size if batch_size is None else batch_size
    lr = published.lr(model) * (batch / published.batch_size)
    return Preset(batch_size=batch, optim=replace(published.optim, lr=lr))
