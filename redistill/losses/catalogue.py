"""The catalogue of losses: name in spec strings -> function or module, published weights, requirements.

`dkd?beta=2&temperature=4` -> entry "dkd", its function with beta and temperature bound. Options are the keyword
arguments of the function that have a plain default, so that adding a loss takes one line here. What a loss needs is
read from its signature: logits, features of one pair of layers, labels, progress, and in the constructor of a module
the widths of the features and the number of classes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from redistill_cache.errors import UsageError
from torch import Tensor, nn

from redistill.losses import (
    controls,
    corrections,
    curriculum,
    decoupled,
    divergences,
    features,
    heads,
    hinton,
    power,
    ranking,
    relational,
)
from redistill.losses.curriculum import TrainingProgress
from redistill.specs import Spec, did_you_mean, parse_spec

__all__ = ["CATALOGUE", "Entry", "bind", "find", "make_loss", "read_loss"]

Option = str | int | float | bool
Loss = Callable[..., Tensor]
PLAIN = (bool, int, float, str)

INPUTS = ("student_logits", "teacher_logits", "student_features", "teacher_features", "labels", "progress")
"""What a loss may be called with."""
WIDTHS = ("student_width", "teacher_width", "num_classes")
"""What the constructor of a module may ask for."""


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
    ce_on: Literal["all", "head"] = "all"
    """What the published cross-entropy trains: the whole network, or its last layer alone."""
    layers: Literal["stages", "penultimate"] = "stages"
    """Published layers of a loss on features: the ends of the stages and penultimate, or penultimate alone."""
    diagnostics: Callable[[Mapping[str, Option]], Mapping[str, Loss]] = lambda _: {}
    """options -> figures to log beside the value; each is called with student and teacher logits."""

    @property
    def is_module(self) -> bool:
        return isinstance(self.make, type)

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Those of INPUTS that the loss is called with. Cached: they are read at every step."""
        call = getattr(self.make, "forward") if self.is_module else self.make  # noqa: B009  a class of modules
        parameters = inspect.signature(call).parameters
        return tuple(name for name in INPUTS if name in parameters)

    @property
    def labels(self) -> bool:
        """Needs the labels of the batch."""
        return "labels" in self.inputs

    @property
    def on_features(self) -> bool:
        """Compares features, so that it is computed for every pair of layers."""
        return "student_features" in self.inputs or "teacher_features" in self.inputs

    @property
    def widths(self) -> tuple[str, ...]:
        """Those of WIDTHS that the constructor asks for."""
        return tuple(name for name in WIDTHS if self.is_module and name in inspect.signature(self.make).parameters)

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
        # On features.
        Entry("features", features.FeatureMatch, ce_on="head"),
        Entry("rkd", relational.rkd, layers="penultimate", batch_statistics=True, per_row=False),
        Entry("nd", features.NormDirection, weight=2.0, layers="penultimate"),
        Entry("vkd", features.OrthogonalMatch, layers="penultimate"),
        Entry("dcd", features.Contrast, layers="penultimate", batch_statistics=True, per_row=False),
        Entry("dual", heads.DualHead, weight=0.5, ce_weight=0.5, layers="penultimate"),
        Entry("exit", heads.ExitHead),
        Entry("lelp", heads.SubclassHead, ce_on="head", layers="penultimate"),
        Entry("pesf", heads.AdaptedTeacher, layers="penultimate"),
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


def make_loss(spec: Spec | str, **widths: int) -> tuple[Entry, Loss]:
    """The loss of a spec string with its options bound; bad values are refused here, by a call on a tiny batch.

    `widths` are those of `Entry.widths`, for the losses on features that have parameters.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    entry, options = read_loss(spec)
    missing = [name for name in entry.widths if name not in widths]
    if missing:
        raise UsageError(f"{spec.text!r}: this loss has parameters of the size of its features; give {missing[0]}=")
    return entry, bind(spec, entry, options, widths)


def read_loss(
    spec: Spec, *, also: Callable[[Entry], tuple[str, ...]] = lambda _: ()
) -> tuple[Entry, dict[str, Option]]:
    """The entry and the options of a spec string, checked by a call on a tiny batch.

    `also` names the options of a spec string that the caller reads, such as the weight of a term.
    """
    entry = find(spec)
    spec.refuse_unknown([*entry.options, *also(entry)])
    options = read_options(spec, entry)
    with torch.random.fork_rng(devices=[]):
        _try_once(spec, entry, bind(spec, entry, options, TINY))
    return entry, options


def bind(spec: Spec, entry: Entry, options: Mapping[str, Option], widths: Mapping[str, int]) -> Loss:
    """A module, or a function with its options bound; both are called with `Entry.inputs` by name."""
    own = {name: widths[name] for name in entry.widths}
    with refused_as(spec):
        loss: Any = entry.make(**own, **options) if entry.is_module else functools.partial(entry.make, **options)
    return cast(Loss, loss)


@contextmanager
def refused_as(spec: Spec) -> Iterator[None]:
    """Names the loss in an error about its options."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{spec.text!r}: {error}") from None


TINY = {"student_width": 256, "teacher_width": 256, "num_classes": 3}


def _try_once(spec: Spec, entry: Entry, loss: Loss) -> None:
    """Call the loss once: it checks its options, so that a bad one is refused before any data is opened."""
    logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    features = torch.eye(4, 256) + 0.1
    batch: dict[str, Any] = {"labels": torch.tensor([0, 1, 2, 0]), "progress": TrainingProgress()}
    batch |= {"student_logits": logits, "teacher_logits": logits}
    batch |= {"student_features": features, "teacher_features": features}
    if isinstance(loss, nn.Module):
        loss.eval()
    with torch.no_grad(), refused_as(spec):
        if hasattr(loss, "fit"):
            loss.fit(features, batch["labels"])
        loss(**{name: batch[name] for name in entry.inputs})
    if isinstance(loss, nn.Module):
        loss.train()
