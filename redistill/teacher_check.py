"""Is this teacher fit to be written down? Asked once, on the first batch, before anything is spent.

A model in train mode, one that drops at random, one that normalises with the statistics of the batch: each answers
without complaint, and each would fill an archive with answers that belong to no network.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from redistill_cache.errors import Refused
from torch import Tensor, nn

from redistill.models.weights import tensor_bytes
from redistill.signals import LOGITS
from redistill.teachers import Teacher
from redistill.wording import listed

__all__ = ["TeacherCheck", "check_teacher"]

# How far answers for one image may move with its neighbours in the batch, relative to the spread of the logits.
# Rounding moves them by 1e-6 (float32), 1e-3 (TF32) or 1e-2 (bfloat16); statistics of the batch move them by 0.1 to 1.
NEIGHBOUR_BOUND = {None: 0.02, torch.float16: 0.1, torch.bfloat16: 0.1}
# Two runs of the same batch: bit for bit on a CPU. A GPU may pick another kernel the second time.
REPEAT_BOUND = {"cpu": 0.0, "cuda": 1e-3, "mps": 1e-3}


@dataclass(frozen=True)
class TeacherCheck:
    """What was measured on the batch. Differences are of logits, in absolute terms."""

    images: int
    floor: float
    """Largest difference between the same views in two batch compositions: below it, logits mean nothing."""
    relative_floor: float
    """`floor` over the standard deviation of the logits."""
    repeat: float
    """Largest difference between two runs of the same batch."""


def check_teacher(teacher: Teacher, pixels: Tensor) -> TeacherCheck:
    """Run the teacher a few times over `pixels` [B >= 4, 3, H, W]; refuse it, or say how exact its answers are."""
    assert len(pixels) >= 4, len(pixels)
    refuse_train_mode(teacher)
    before = state_digests(teacher.network)
    first, second = teacher(pixels), teacher(pixels)
    refuse_not_finite(teacher, first)
    refuse_changed(before, state_digests(teacher.network))
    refuse_train_mode(teacher)
    spread = max(first[LOGITS].std().item(), 1e-12)
    repeat = difference(first, second)
    if repeat > REPEAT_BOUND[teacher.device.type] * spread:
        raise Refused(
            f"the teacher gives different answers for the same images (by {repeat:.3g}); dropout or sampling must not "
            f"run in eval mode"
        )
    floor = difference(first, regrouped(teacher, pixels))
    if floor > NEIGHBOUR_BOUND[teacher.amp] * spread:
        raise Refused(
            f"the teacher's answer for an image depends on the other images of the batch (by {floor:.3g}, where logits "
            f"spread by {spread:.3g}); batch norm must use its running statistics"
        )
    return TeacherCheck(images=len(pixels), floor=floor, relative_floor=floor / spread, repeat=repeat)


def regrouped(teacher: Teacher, pixels: Tensor) -> dict[str, Tensor]:
    """The answers to the same images in reverse order, the first two of them alone."""
    backwards = pixels.flip(0)
    alone, rest = teacher(backwards[:2]), teacher(backwards[2:])
    return {name: torch.cat([alone[name], rest[name]]).flip(0) for name in alone}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return (one[LOGITS] - other[LOGITS]).abs().max().item()


def refuse_train_mode(teacher: Teacher) -> None:
    stuck = [plain(name) for name, part in teacher.network.named_modules() if part.training]
    if stuck:
        raise Refused(
            f"the teacher stays in train mode after eval(): {listed(stuck)}; its train() must reach all of it, or "
            "dropout and the statistics of the batch decide what is stored"
        )


def plain(name: str) -> str:
    """A name inside the user's model: ours wraps it as `network`."""
    return name.removeprefix("network").removeprefix(".") or "the model itself"


def refuse_not_finite(teacher: Teacher, answers: dict[str, Tensor]) -> None:
    for name, rows in answers.items():
        bad = int((~torch.isfinite(rows)).any(1).sum())
        if bad:
            advice = "; try --no-amp" if teacher.amp is not None else "; are its weights and normalisation right?"
            raise Refused(f"the teacher's {name} hold NaN or infinity for {bad} of {len(rows)} images{advice}")


def refuse_changed(before: dict[str, str], after: dict[str, str]) -> None:
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if changed:
        raise Refused(
            f"the teacher changes its own state when it answers: {listed(sorted(map(plain, changed)))}; in eval mode a "
            "teacher must only read its parameters and buffers"
        )


def state_digests(network: nn.Module) -> dict[str, str]:
    """Parameters and all buffers, those outside the state_dict too."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
