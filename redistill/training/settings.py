"""The settings in effect of a run that is prepared: defaults, preset, file and command line together, as text."""

from __future__ import annotations

from redistill_cache.wording import counted

from redistill.devices import precision_text
from redistill.optim import OptimConfig
from redistill.ranks import World
from redistill.signals import LOGITS
from redistill.training.options import TrainOptions
from redistill.training.prepare import TrainSetup
from redistill.training.targets import OnlineTargets
from redistill.views import archive_recipe, recipe_text

__all__ = ["settings_in_effect"]


def settings_in_effect(options: TrainOptions, setup: TrainSetup, world: World) -> dict[str, str]:
    archive = setup.archive
    size = setup.feed.dataset.size
    resized = "" if size == archive_recipe(archive).size else f", students at {size} pixels"
    identity = "not sealed" if archive.id is None else archive.id[:12]
    members = len(setup.members)
    batches = len(setup.feed.global_batches(0))
    return {
        "archive": (
            f"{archive.path.name} ({identity}), {counted(archive.num_samples, 'sample')}, "
            f"{counted(archive.num_views, 'view')}"
        ),
        "teacher": teacher_text(options, setup),
        "recipe": recipe_text(archive_recipe(archive)) + resized,
        "validation": "none" if options.val is None else str(options.val),
        "student": ", ".join(options.students),
        "loss": ", ".join(dict.fromkeys("+".join(member.spec.losses) for member in setup.members)),
        "seed": ", ".join(map(str, options.seeds)) + (f" ({members} students in all)" if members > 1 else ""),
        "optimizer": optimizer_text(options.optim, options.ema),
        "schedule": schedule_text(options.optim),
        "batch": (
            f"{options.batch_size:,}, {counted(options.views_per_image, 'view')} per image, "
            f"{batches:,} batch{'es' * (batches != 1)} per epoch"
        ),
        "device": f"{world.device}, {precision_text(world.device, setup.members[0].amp)}"
        + (f", {world.size} processes" if world.size > 1 else ""),
    }


def teacher_text(options: TrainOptions, setup: TrainSetup) -> str:
    if setup.targets is None:
        return "not used by this loss"
    if isinstance(setup.targets, OnlineTargets):
        return f"{options.online_teacher}, run at every step"
    reads = setup.targets.shared_views.reads
    logits = [read.teacher for read in reads if read.signal == LOGITS]
    texts = [logits[0] if len(logits) == 1 else f"mean of {', '.join(logits)}"] if logits else []
    for name in dict.fromkeys(read.teacher for read in reads if read.signal != LOGITS):
        layers = ", ".join(read.signal for read in reads if read.teacher == name and read.signal != LOGITS)
        texts.append(f"features of {name}: {layers}")
    return "; ".join(texts)


def optimizer_text(optim: OptimConfig, ema: float | None) -> str:
    parts = [optim.opt, f"lr {optim.lr:g}"]
    if optim.opt in ("sgd", "nesterov"):
        parts.append(f"momentum {optim.momentum:g}")
    exempt = " (not of biases and normalisation layers)" if optim.no_decay_norm_bias else ""
    parts.append(f"weight decay {optim.weight_decay:g}{exempt}")
    if optim.clip_grad is not None:
        parts.append(f"gradient norm at most {optim.clip_grad:g}")
    if ema is not None:
        parts.append(f"weights averaged with {ema:g}")
    return ", ".join(parts)


def schedule_text(optim: OptimConfig) -> str:
    parts = [f"{optim.epochs:,} epoch{'s' * (optim.epochs > 1)}", optim.sched]
    if optim.warmup_epochs:
        parts.append(f"warm-up from {optim.warmup_lr:g} in {optim.warmup_epochs:g} epochs")
    if optim.sched == "step":
        parts.append(f"times {optim.decay_rate:g} every {optim.decay_epochs:g} epochs")
    if optim.sched == "multistep":
        milestones = ", ".join(f"{milestone:g}" for milestone in optim.decay_milestones)
        parts.append(f"times {optim.decay_rate:g} after {milestones}")
    if optim.sched != "constant" and optim.min_lr:
        parts.append(f"at least {optim.min_lr:g}")
    return ", ".join(parts)
