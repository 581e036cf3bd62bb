"""The catalogue of losses: name in spec strings -> function or module, published weights, requirements.

`dkd?beta=2&temperature=4` -> entry "dkd", its function with beta and temperature bound. Options are the keyword
arguments of the function that have a plain default, so that adding a loss takes one line here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from redistill_cache.errors import UsageError
from torch import Tensor, nn

from redistill.losses import (
    controls,
    corrections,
    curriculum,
    decoupled,
    divergences,
    hinton,
    power,
    ranking,
    relational,
)
from redistill.losses.curriculum import TrainingProgress
from redistill.specs import Spec, did_you_mean, parse_spec

__all__ = ["CATALOGUE", "Entry", "find", "make_loss"]

Option = str | int | float | bool
Loss = Callable[..., Tensor]
PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class Entry:
    """A loss: a function, or the class of a module with parameters or state."""

    name: str
    make: Callable[..., Tensor] | type[nn.Module]
    weight: float = 1.0
    """Published weight of the term (that for CIFAR-100 if there are several)."""
    ce_weight: float = 1.0
    """Published weight of the hard-label cross-entropy that is added to it."""
    warmup: float = 0.0
    """Published linear warm-up of the weight, in epochs."""
    full_rows: bool = True
    """Needs all classes of a teacher row; False if the top k with a uniform tail is a usable approximation."""
    batch_statistics: bool = False
    """Compares rows of a batch with each other, so that its value depends on the batch size."""
    per_row: bool = True
    """Has one value per row (reduction="none")."""
    shift: bool = False
    """Depends on a constant added to a teacher row, which softmax ignores: the archive must keep the shift."""
    diagnostics: Callable[[Mapping[str, Option]], Mapping[str, Loss]] = lambda _: {}
    """options -> figures to log beside the value; each is called with student and teacher logits."""

    @property
    def is_module(self) -> bool:
        return isinstance(self.make, type)

    @functools.cached_property
    def labels(self) -> bool:
        """Needs the labels of the batch. Cached: it is read at every step."""
        call = getattr(self.make, "forward") if self.is_module else self.make  # noqa: B009  a class of modules
        return "labels" in inspect.signature(call).parameters

    @property
    def options(self) -> Mapping[str, Option]:
        """The options that a spec string may set, with their defaults."""
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in parameters if isinstance(p.default, PLAIN) and p.name != "reduction"}


def _power_diagnostics(options: Mapping[str, Option]) -> Mapping[str, Loss]:
    """The share of rows that the cap changes, for members with a cap."""
    member: dict[str, Any] = {key: options[key] for key in ("lam", "form", "order")}
    if not power.may_be_capped(**member):
        return {}
    bound: dict[str, Any] = {key: options[key] for key in ("temperature", "cap")}
    return {"capped": functools.partial(power.capped_fraction, **member, **bound)}


# Divergences without a published recipe for classification have KD's weights, 0.1 CE + 0.9 KD.
CATALOGUE: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("power", power.power_divergence, weight=0.9, ce_weight=0.1, diagnostics=_power_diagnostics),
        Entry("kl", divergences.kl, weight=0.9, ce_weight=0.1, full_rows=False),
        Entry("reverse_kl", divergences.reverse_kl, weight=0.9, ce_weight=0.1),
        Entry("hellinger", divergences.hellinger, weight=0.9, ce_weight=0.1),
        Entry("jensen_shannon", divergences.jensen_shannon, weight=0.9, ce_weight=0.1),
        Entry("skew_kl", divergences.skew_kl, weight=0.9, ce_weight=0.1),
        Entry("skew_reverse_kl", divergences.skew_reverse_kl, weight=0.9, ce_weight=0.1),
        Entry("total_variation", divergences.total_variation, weight=0.9, ce_weight=0.1),
        Entry("ab", divergences.alpha_beta, weight=32.0),
        Entry("kd", hinton.kd, weight=0.9, ce_weight=0.1, full_rows=False),
        Entry("bd_kd", hinton.bd_kd),
        Entry("dkd", decoupled.dkd, warmup=20.0),
        Entry("nkd", decoupled.nkd),
        Entry("rld", decoupled.rld, warmup=20.0),
        Entry("ttm", hinton.ttm, weight=45.0),
        Entry("wttm", hinton.wttm),
        Entry("luminet", hinton.luminet, ce_weight=2.0, warmup=20.0, batch_statistics=True),
        Entry("dist", relational.dist, weight=2.0, batch_statistics=True, per_row=False),
        Entry("r2kd", relational.r2kd, weight=2.0, batch_statistics=True, per_row=False),
        Entry("mlkd_class", relational.mlkd_class, weight=0.9, ce_weight=0.1, batch_statistics=True, per_row=False),
        Entry("mlkd_batch", relational.mlkd_batch, weight=0.9, ce_weight=0.1, batch_statistics=True, per_row=False),
        Entry("pearson", relational.pearson),
        Entry("spearman", relational.spearman),
        Entry("sinkhorn", relational.sinkhorn, weight=0.0008, batch_statistics=True, per_row=False),
        Entry("pld", ranking.pld, ce_weight=0.0),
        Entry("topkd", ranking.topkd, batch_statistics=True, per_row=False, shift=True),
        Entry("swap_kd", corrections.swap_kd, ce_weight=0.0),
        Entry("label_revision", corrections.label_revision, ce_weight=0.0, batch_statistics=True, shift=True),
        Entry("rc", corrections.rc),
        Entry("taid", curriculum.Taid, ce_weight=0.0),
        Entry("ctkd", curriculum.CurriculumTemperature, weight=0.9, ce_weight=0.1),
        Entry("cwtm", controls.cwtm, ce_weight=0.0, batch_statistics=True),
        Entry("dkpp", controls.dkpp, ce_weight=0.0),
        Entry("logit_mse", hinton.logit_mse, ce_weight=0.0, shift=True),
        Entry("mld", hinton.mld, weight=10.0, ce_weight=0.0, shift=True),
        Entry("label_smoothing", controls.label_smoothing, ce_weight=0.0, full_rows=False),
        Entry("virtual_teacher", controls.virtual_teacher, weight=0.1, ce_weight=0.9, full_rows=False),
        Entry("tf_kd", controls.tf_kd, weight=0.1, ce_weight=0.9, full_rows=False),
    )
}


def find(spec: Spec) -> Entry:
    """The entry that a spec string names; an unknown name is refused with the nearest known ones."""
    entry = CATALOGUE.get(spec.scheme.replace("-", "_"))
    if entry is None:
        raise UsageError(
            f"{spec.text!r}: unknown loss {spec.scheme!r}; {did_you_mean(spec.scheme, [*CATALOGUE, 'ce'])}"
        )
    if spec.name:
        raise UsageError(f"{spec.text!r}: a loss has options but no name; expected {spec.scheme}?key=value&key=value")
    return entry


def read_options(spec: Spec, entry: Entry) -> dict[str, Option]:
    """The values of all options of the loss: those of the spec string, else the defaults."""
    # T is one type for each option, which a checker cannot infer from a mapping of mixed types.
    return {key: spec.take(key, default) for key, default in entry.options.items()}  # type: ignore[type-var]


def make_loss(spec: Spec | str, *, also: tuple[str, ...] = ()) -> tuple[Entry, Loss]:
    """The loss of a spec string with its options bound; bad values are refused here, by a call on a tiny batch.

    `also` names the options of a spec string that the caller reads, such as the weight of a term.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    entry = find(spec)
    spec.refuse_unknown([*entry.options, *also])
    options = read_options(spec, entry)
    try:
        loss: Loss = _bind(entry, options)
        _try_once(entry, loss)
    except UsageError as error:
        raise UsageError(f"{spec.text!r}: {error}") from None
    return entry, loss


def _bind(entry: Entry, options: Mapping[str, Option]) -> Loss:
    # Both are called with logits and return a loss: a module, or a function with its options bound.
    loss: Any = entry.make(**options) if entry.is_module else functools.partial(entry.make, **options)
    return cast(Loss, loss)


def _try_once(entry: Entry, loss: Loss) -> None:
    """Call the loss once: it checks its options, so that a bad one is refused before any data is opened."""
    logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    needed: dict[str, Any] = {"labels": torch.tensor([0, 1])} if entry.labels else {}
    if isinstance(loss, nn.Module):
        loss.eval()
        needed["progress"] = TrainingProgress()
    with torch.no_grad():
        loss(logits, logits, **needed)
    if isinstance(loss, nn.Module):
        loss.train()
