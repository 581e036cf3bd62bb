"""The objective of a student: hard-label cross-entropy and any number of weighted, scheduled distillation terms.

    Objective(["power?lam=0.6667&temperature=4"])                     0.1 CE + 0.9 power, the published weights
    Objective(["ce?weight=1&smoothing=0.1", "dkd?beta=2&warmup=5", "dist?weight=2&decay=cosine"])

Options of every term: weight; warmup, decay, decay_from and floor (see `Schedule`); standardize (first give each logit
row of student and teacher mean 0 and deviation 1); label (its name in the log). `ce` takes weight and smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from redistill_cache.codecs import Codec
from redistill_cache.errors import Refused, SpecMismatch, UsageError
from torch import Tensor, nn
from torch.nn import functional as F

from redistill.losses.catalogue import Entry, make_loss, read_options
from redistill.losses.checks import check_labels, check_matrix
from redistill.losses.curriculum import Schedule, Taid, TrainingProgress
from redistill.losses.hinton import standardize
from redistill.specs import Spec, parse_spec

__all__ = ["Mix", "Needs", "Objective"]

TERM_OPTIONS = ("weight", "warmup", "decay", "decay_from", "floor", "standardize", "label")
CE_OPTIONS = ("weight", "smoothing")


@dataclass(frozen=True)
class Mix:
    """The labels of mixed views: image = weight · own + (1 - weight) · partner, row by row."""

    partner_labels: Tensor
    """int64 [batch]"""
    weights: Tensor
    """float [batch], the share of the row's own image"""


@dataclass(frozen=True)
class Needs:
    """What the training loop must pass to an objective."""

    teacher: bool
    labels: bool


class Term(nn.Module):
    """One weighted, scheduled loss of an objective."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        entry, self.loss = make_loss(spec, also=TERM_OPTIONS)
        self.entry: Entry = entry
        self.spec = spec
        self.label = spec.take("label", entry.name)
        self.weight = _weight(spec, entry.weight)
        self.schedule = _read_schedule(spec, entry.warmup)
        self.standardize = spec.take("standardize", False)
        self.diagnostics = dict(entry.diagnostics(read_options(spec, entry)))

    @property
    def follows_the_end(self) -> bool:
        """Whether the weight or the target depends on the planned number of epochs."""
        return self.schedule.decay != "none" or isinstance(self.loss, Taid)

    @property
    def needs_shift(self) -> bool:
        """Whether a constant added to a teacher row changes the value: not if rows are standardised or centred."""
        centered = "centered" in self.entry.options and self.spec.take("centered", False)
        return self.entry.shift and not self.standardize and not centered

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, progress: TrainingProgress, mix: Mix | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The unweighted value of the batch, and the figures to log."""
        if self.standardize:
            student, teacher = standardize(student), standardize(teacher)
        if mix is not None and self.entry.labels:
            value = self._mixed(student, teacher, labels, progress, mix)
        else:
            value = self._call(student, teacher, labels, progress, "batchmean")
        log = {self.label: value.detach()}
        with torch.no_grad():
            log |= {f"{self.label}/{name}": figure(student, teacher) for name, figure in self.diagnostics.items()}
        return value, log

    def _mixed(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, progress: TrainingProgress, mix: Mix
    ) -> Tensor:
        """On mixed views, a loss with labels is computed for both labels, weighted like the pixels of the row."""
        if not self.entry.per_row:
            raise Refused(
                f"loss {self.label!r} needs one label per row and has no value per row, so it cannot be used with "
                "mixed views; use a recipe without mixing"
            )
        own = self._call(student, teacher, labels, progress, "none")
        partner = self._call(student, teacher, mix.partner_labels, progress, "none")
        return torch.lerp(partner, own, mix.weights.to(own.dtype)).mean()

    def _call(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, progress: TrainingProgress, reduction: str
    ) -> Tensor:
        options: dict[str, Any] = {"reduction": reduction}
        if self.entry.labels:
            options["labels"] = labels
        if self.entry.is_module:
            options["progress"] = progress
        return self.loss(student, teacher, **options)


class Objective(nn.Module):
    """Cross-entropy and distillation terms, from spec strings.

    Without a `ce` spec, the weight of the cross-entropy is the one published with the terms (1 without terms).
    Terms with parameters (CTKD) or state (TAID) are sub-modules, so `parameters()`, `state_dict()`, `train()` and
    `to()` include them. A state dict of other specs is refused.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        super().__init__()
        parsed = [parse_spec(text) for text in specs]
        hard = [spec for spec in parsed if spec.scheme == "ce"]
        terms = [Term(spec) for spec in parsed if spec.scheme != "ce"]
        if len(hard) > 1:
            raise UsageError(f"'ce' is specified {len(hard)} times; specify it once")
        self.specs = tuple(specs)
        self.terms = nn.ModuleList(terms)
        self.ce_weight, self.smoothing = _read_ce(hard[0]) if hard else (_published_ce_weight(terms), 0.0)
        _make_labels_unique(terms)
        if not terms and not self.ce_weight:
            raise UsageError("the weight of ce is 0 and there is no other loss, so there is nothing to minimise")

    @property
    def needs(self) -> Needs:
        """What the training loop must pass to `forward`."""
        terms = self._terms()
        return Needs(teacher=bool(terms), labels=self.ce_weight > 0 or any(term.entry.labels for term in terms))

    @property
    def follows_the_end(self) -> str | None:
        """The first term whose weight or target depends on the planned number of epochs."""
        return next((term.label for term in self._terms() if term.follows_the_end), None)

    def refuse_codec(self, codec: Codec) -> None:
        """Refuse an archive whose codec stores less of a row than a term needs."""
        needs_rows = [term.label for term in self._terms() if term.entry.full_rows and not codec.full_rows]
        if needs_rows:
            raise Refused(
                f"loss {needs_rows[0]!r} needs whole teacher rows, and codec {codec.name!r} holds only the highest "
                "classes; use kd or kl, or cache the teacher with --codec linear"
            )
        needs_shift = [term.label for term in self._terms() if term.needs_shift and not codec.keeps_shift]
        if needs_shift:
            raise Refused(
                f"loss {needs_shift[0]!r} compares raw logits, and this archive dropped the constant of each row that "
                "softmax ignores; cache the teacher with the shift kept, or set standardize=true for this loss"
            )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        *,
        progress: TrainingProgress | None = None,
        mix: Mix | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and the unweighted value of each part for the log (detached, on the device)."""
        progress = progress or TrainingProgress()
        total, log = self._cross_entropy_part(student_logits, labels, mix)
        if self.terms and teacher_logits is None:
            raise UsageError(f"loss {self._terms()[0].label!r} needs teacher logits, found none")
        for term in self._terms():
            assert teacher_logits is not None
            value, values = term(student_logits, teacher_logits, labels, progress, mix)
            total = total + term.weight * term.schedule.factor(progress) * value
            log |= values
        return total, log

    def synchronise(self) -> None:
        """On several ranks, average the terms' gradients and buffers; call it between backward and step."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        for tensor in [*gradients, *self.buffers()]:
            torch.distributed.all_reduce(tensor)
            tensor.div_(torch.distributed.get_world_size())

    def get_extra_state(self) -> dict[str, list[str]]:
        """Saved beside the tensors, so that the state is loaded into an objective of the same specs only."""
        return {"specs": list(self.specs)}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        if list(state["specs"]) != list(self.specs):
            raise SpecMismatch(
                f"the saved state belongs to the losses {' '.join(state['specs'])}, "
                f"this run has {' '.join(self.specs)}; resume with the same --loss"
            )

    def extra_repr(self) -> str:
        return " + ".join([f"{self.ce_weight:g} ce", *(f"{term.weight:g} {term.spec}" for term in self._terms())])

    def _terms(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term, Term)]

    def _cross_entropy_part(
        self, student_logits: Tensor, labels: Tensor | None, mix: Mix | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross-entropy, and its unweighted value for the log; 0 and no log entry if its weight is 0."""
        if not self.ce_weight:
            return student_logits.new_zeros((), dtype=torch.float32), {}
        check_matrix("student", student_logits)
        student = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
        rows = self._cross_entropy(student, labels)
        if mix is not None:
            rows = torch.lerp(self._cross_entropy(student, mix.partner_labels), rows, mix.weights.to(rows.dtype))
        mean = rows.mean()
        return self.ce_weight * mean, {"ce": mean.detach()}

    def _cross_entropy(self, student: Tensor, labels: Tensor | None) -> Tensor:
        labels = check_labels(labels, student)
        return F.cross_entropy(student, labels, label_smoothing=self.smoothing, reduction="none")


def _weight(spec: Spec, default: float) -> float:
    weight = spec.take("weight", default)
    if not 0 <= weight < math.inf:
        raise UsageError(f"{spec.text!r}: weight must be a finite number, 0 or above, found {weight:g}")
    return weight


def _read_schedule(spec: Spec, warmup: float) -> Schedule:
    try:
        return Schedule(
            warmup=spec.take("warmup", warmup),
            decay=spec.take("decay", "none"),
            decay_from=spec.take("decay_from", 0.0),
            floor=spec.take("floor", 0.0),
        )
    except UsageError as error:
        if spec.text in str(error):
            raise
        raise UsageError(f"{spec.text!r}: {error}") from None


def _read_ce(spec: Spec) -> tuple[float, float]:
    spec.refuse_unknown(CE_OPTIONS)
    if spec.name:
        raise UsageError(f"{spec.text!r}: a loss has options but no name; expected ce?weight=1&smoothing=0.1")
    smoothing = spec.take("smoothing", 0.0)
    if not 0 <= smoothing < 1:
        raise UsageError(f"{spec.text!r}: smoothing must be at least 0 and below 1, found {smoothing:g}")
    return _weight(spec, 1.0), smoothing


def _published_ce_weight(terms: Sequence[Term]) -> float:
    """The cross-entropy weight that was published with the terms; refused if they differ."""
    weights = {term.entry.ce_weight for term in terms}
    if len(weights) > 1:
        listing = ", ".join(f"{term.label}: {term.entry.ce_weight:g}" for term in terms)
        raise UsageError(
            f"these losses were published with different cross-entropy weights ({listing}); add --loss ce?weight=..."
        )
    return weights.pop() if weights else 1.0


def _make_labels_unique(terms: Sequence[Term]) -> None:
    """Rename the second of two terms `power` to `power-2`, so that each has its own entry in the log."""
    taken = {"ce"}
    for term in terms:
        base, number = term.label, 2
        while term.label in taken:
            term.label, number = f"{base}-{number}", number + 1
        taken.add(term.label)
