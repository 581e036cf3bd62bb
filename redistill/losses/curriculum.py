"""What changes during training: the weight of a term, TAID (an interpolated target), CTKD (a learned temperature)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from redistill_cache.errors import UsageError
from torch import Tensor, nn

from redistill.losses.checks import fraction, positive, prepare, reduce_rows
from redistill.losses.divergences import kl_rows, log_probs
from redistill.specs import did_you_mean

__all__ = ["DECAYS", "CurriculumTemperature", "Schedule", "Taid", "TrainingProgress", "taid"]


# -- the weight of a term ---------------------------------------------------------------------------------------------

DECAYS = ("none", "linear", "cosine")


@dataclass(frozen=True)
class TrainingProgress:
    """The position in a run. `epoch` is fractional (3.5 = half-way through the fourth), `epochs` the planned total."""

    epoch: float = 0.0
    epochs: float = 1.0

    @property
    def fraction(self) -> float:
        """0 at the start, 1 at the planned end and after it."""
        return min(max(self.epoch / self.epochs, 0.0), 1.0) if self.epochs > 0 else 1.0


@dataclass(frozen=True)
class Schedule:
    """The factor of a term's weight: 0 -> 1 over `warmup` epochs, then 1 -> `floor` from `decay_from` to the end."""

    warmup: float = 0.0
    decay: str = "none"
    decay_from: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise UsageError(f"unknown decay {self.decay!r}; {did_you_mean(self.decay, DECAYS)}")
        if not (0 <= self.warmup < math.inf and 0 <= self.decay_from < math.inf and 0 <= self.floor <= 1):
            raise UsageError(
                f"expected warmup >= 0, decay_from >= 0 (epochs) and floor in 0..1, "
                f"found warmup={self.warmup:g} decay_from={self.decay_from:g} floor={self.floor:g}"
            )

    def factor(self, progress: TrainingProgress) -> float:
        """The factor at `progress`, between 0 and 1."""
        warm = min(progress.epoch / self.warmup, 1.0) if self.warmup > 0 else 1.0
        return max(warm, 0.0) * self._decayed(progress)

    def _decayed(self, progress: TrainingProgress) -> float:
        if self.decay == "none" or progress.epoch <= self.decay_from:
            return 1.0
        span = progress.epochs - self.decay_from
        done = min((progress.epoch - self.decay_from) / span, 1.0) if span > 0 else 1.0
        left = 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.floor + (1.0 - self.floor) * left


# -- losses -----------------------------------------------------------------------------------------------------------


def taid(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mix: float | Tensor = 0.4,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    """TAID at a fixed mix: T² KL(p || s), p = softmax(((1 - mix) sg[z] + mix v) / T), s = softmax(z / T).

    sg = no gradient. mix = 0 has no gradient, mix = 1 is KD. `Taid` changes mix during training.
    Shing et al., ICLR 2025 (arXiv 2501.16937). Published: T = 1.
    Needs: logits only, full rows.
    """
    student, teacher = prepare(student_logits, teacher_logits)
    temperature = positive("temperature", temperature)
    target = torch.lerp(student.detach(), teacher, torch.as_tensor(mix, dtype=student.dtype, device=student.device))
    rows = kl_rows(log_probs(target, temperature), log_probs(student, temperature))
    return reduce_rows(temperature**2 * rows, reduction)


class Taid(nn.Module):
    """TAID with its schedule: `taid`, whose mix grows from `start` to `end` in training, faster while the loss falls.

    After each training step, with the relative fall of the loss r = (L_prev - L) / L_prev:
        m <- momentum · m + (1 - momentum) · r
        mix <- min(end, max(start + (end - start) · progress, mix + rate · sigmoid(m) · (1 - mix)))
    Shing et al., ICLR 2025 (arXiv 2501.16937).
    Published: start 0.4, end 1, momentum 0.99, rate 5e-4, T = 1, without CE.
    Needs: state (mix, m, L_prev: buffers, saved with the module, updated in training mode only), full rows.
    """

    mix: Tensor
    trend: Tensor
    previous: Tensor

    def __init__(
        self,
        *,
        start: float = 0.4,
        end: float = 1.0,
        momentum: float = 0.99,
        rate: float = 5e-4,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.start, self.end = fraction("start", start), fraction("end", end)
        self.momentum, self.rate = fraction("momentum", momentum), fraction("rate", rate)
        self.temperature = positive("temperature", temperature)
        self.register_buffer("mix", torch.tensor(start))
        self.register_buffer("trend", torch.tensor(0.0))
        self.register_buffer("previous", torch.tensor(math.nan))

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        progress: TrainingProgress,
        reduction: str = "batchmean",
    ) -> Tensor:
        rows = taid(
            student_logits, teacher_logits, mix=self.mix.clone(), temperature=self.temperature, reduction="none"
        )
        if self.training:
            self.advance(rows.detach().mean(), progress)
        return reduce_rows(rows, reduction)

    @torch.no_grad()
    def advance(self, loss: Tensor, progress: TrainingProgress) -> None:
        """One step of the schedule, without synchronising the device. The first step and a loss of 0 have no trend."""
        has_trend = self.previous > 0
        fall = torch.where(has_trend, (self.previous - loss) / torch.where(has_trend, self.previous, 1.0), 0.0)
        trend = torch.where(has_trend, self.momentum * self.trend + (1 - self.momentum) * fall, self.trend)
        step = torch.where(has_trend, self.rate * trend.sigmoid() * (1 - self.mix), 0.0)
        linear = self.start + (self.end - self.start) * progress.fraction
        self.mix.copy_((self.mix + step).clamp(min=linear).clamp(max=self.end))
        self.trend.copy_(trend)
        self.previous.copy_(loss)


class CurriculumTemperature(nn.Module):
    """CTKD: KD with one learned temperature T = low + span · sigmoid(θ), trained AGAINST the student.

    The gradient of θ is multiplied by λ = -(1 - cos(π min(epoch, ramp) / ramp)) / 2, from 0 to -1 over `ramp` epochs:
    θ ascends the loss that the student descends. θ must be among the parameters of the optimiser.
    Li et al., AAAI 2023 (arXiv 2211.16231), the global variant.
    Published: weights 0.1 CE + 0.9 KD, ramp 10 epochs, low 1, span 20, initial θ = 1; θ ascends the factor T² as well.
    Needs: one trainable parameter.
    """

    def __init__(self, *, low: float = 1.0, span: float = 20.0, ramp: float = 10.0) -> None:
        super().__init__()
        self.low, self.span, self.ramp = positive("low", low), positive("span", span), positive("ramp", ramp)
        self.theta = nn.Parameter(torch.tensor(1.0))

    @property
    def temperature(self) -> Tensor:
        """The current temperature (for logging; no gradient)."""
        return self.temperature_at(self.theta.detach())

    def temperature_at(self, theta: Tensor) -> Tensor:
        return self.low + self.span * theta.sigmoid()

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        progress: TrainingProgress,
        reduction: str = "batchmean",
    ) -> Tensor:
        student, teacher = prepare(student_logits, teacher_logits)
        factor = -0.5 * (1 - math.cos(math.pi * min(progress.epoch, self.ramp) / self.ramp))
        # The value is θ, its derivative is `factor`: a gradient reversal without a custom autograd.Function.
        theta = factor * self.theta + ((1 - factor) * self.theta).detach()
        temperature = self.temperature_at(theta)
        rows = kl_rows(log_probs(teacher, temperature), log_probs(student, temperature))
        return reduce_rows(temperature**2 * rows, reduction)
