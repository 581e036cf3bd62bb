"""The objective of a student: hard-label cross-entropy and any number of weighted, scheduled distillation terms.

    Objective(["power?lam=0.6667&temperature=4"])                     0.1 CE + 0.9 power, the published weights
    Objective(["ce?weight=1&smoothing=0.1", "dkd?beta=2&warmup=5", "dist?weight=2&decay=cosine"])
    Objective(["features?pairs=layer3:layer3,penultimate:penultimate", "ce?on=head"], widths)

Options of every term: weight; warmup, decay, decay_from and floor (see `Schedule`); label (its name in the log). Of a
term on logits, and of `ce`: on (all, or head: the term trains the last layer only). Of a term on logits: standardize
(first give each logit row of student and teacher mean 0 and deviation 1). Of a term on features: pairs (of layers,
student:teacher), or layer where it uses those of one network only, and teacher (the one whose features are used).
`ce` takes weight, smoothing and on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from redistill_cache.codecs import Codec
from redistill_cache.errors import Refused, SpecMismatch, UsageError
from torch import Tensor, nn
from torch.nn import functional as F

from redistill.losses.catalogue import Entry, Loss, bind, read_loss
from redistill.losses.checks import check_labels, check_matrix
from redistill.losses.curriculum import Schedule, Taid, TrainingProgress
from redistill.losses.features import FeatureMatch
from redistill.losses.hinton import standardize
from redistill.signals import HEAD_LOGITS, LOGITS, PENULTIMATE
from redistill.specs import Spec, parse_spec

__all__ = ["Mix", "Needs", "Objective", "Pair", "Source", "Term", "Widths", "with_pairs"]

TERM_OPTIONS = ("weight", "warmup", "decay", "decay_from", "floor", "label")
CE_OPTIONS = ("weight", "smoothing", "on")
ON = {"all": LOGITS, "head": HEAD_LOGITS}
"""`on` of a term -> the student's logits that it is computed from."""

Rows = Mapping[str, Tensor]
"""The outputs of a network for a batch: {"logits": [B, C], "layer3": [B, d], ...}."""


@dataclass(frozen=True)
class Mix:
    """The labels of mixed views: image = weight · own + (1 - weight) · partner, row by row."""

    partner_labels: Tensor
    """int64 [batch]"""
    weights: Tensor
    """float [batch], the share of the row's own image"""


class Pair(NamedTuple):
    """A layer of the student that learns from a layer of the teacher; None where a loss uses one network only."""

    student: str | None
    teacher: str | None

    def __str__(self) -> str:
        return ":".join(layer for layer in self if layer is not None)


class Source(NamedTuple):
    """A signal, and its teacher where a term names one: logits are those of all teachers of the run."""

    teacher: str | None
    signal: str

    @property
    def key(self) -> str:
        """Its name among the rows of a batch."""
        return self.signal if self.teacher is None else f"{self.teacher}/{self.signal}"


@dataclass(frozen=True)
class Widths:
    """The sizes of both networks' features, by name, as terms with parameters need them."""

    student: Mapping[str, int]
    teacher: Mapping[str, int]
    """By the key of the source."""
    num_classes: int


@dataclass(frozen=True)
class Needs:
    """What the training loop must pass to an objective."""

    labels: bool
    sources: tuple[Source, ...]
    """Of the teacher; without the features of terms whose pairs are not chosen yet."""
    layers: tuple[str, ...]
    """Of the student."""
    outputs: tuple[str, ...]
    """LOGITS, HEAD_LOGITS, both or none: the logits of the student."""
    open_pairs: bool
    """Whether a term has no pairs of layers yet."""

    @property
    def teacher(self) -> bool:
        return bool(self.sources) or self.open_pairs

    @property
    def taps(self) -> bool:
        """Whether logits alone are not enough of the student."""
        return bool(self.layers) or HEAD_LOGITS in self.outputs


class Term(nn.Module):
    """One weighted, scheduled loss of an objective."""

    def __init__(self, text: str, widths: Widths | None) -> None:
        super().__init__()
        spec = parse_spec(text)
        self.text = text
        self.entry, self.options = read_loss(spec, also=term_options)
        self.spec = spec
        self.label = spec.take("label", self.entry.name)
        self.weight = _weight(spec, self.entry.weight)
        self.schedule = _read_schedule(spec, self.entry.warmup)
        self.standardize = spec.take("standardize", False)
        self.on = _read_on(spec)
        self.teacher = spec.options.get("teacher")
        self.pairs = _read_pairs(spec, self.entry) if self.entry.on_features else (Pair(None, None),)
        self.diagnostics = dict(self.entry.diagnostics(self.options))
        unknown = self.entry.widths and widths is None  # then it can only be asked what it needs
        losses = [] if unknown else [self._bind(pair, widths) for pair in self.pairs or ()]
        if self.entry.on_features:
            self.losses = nn.ModuleList([loss for loss in losses if isinstance(loss, nn.Module)]) or losses
        else:
            self.loss = losses[0]

    def _bind(self, pair: Pair, widths: Widths | None) -> Any:  # noqa: ANN401  a module or a function
        sizes: dict[str, int] = {}
        if widths is not None:
            if pair.student is not None:
                sizes["student_width"] = widths.student[pair.student]
            if pair.teacher is not None:
                sizes["teacher_width"] = widths.teacher[self.source(pair.teacher).key]
            sizes["num_classes"] = widths.num_classes
        return bind(self.spec, self.entry, self.options, sizes)

    def source(self, layer: str) -> Source:
        return Source(self.teacher, layer)

    @property
    def sources(self) -> list[Source]:
        """What it reads of the teacher."""
        logits = [Source(None, LOGITS)] if "teacher_logits" in self.entry.inputs else []
        return logits + [self.source(pair.teacher) for pair in self.pairs or () if pair.teacher is not None]

    @property
    def follows_the_end(self) -> bool:
        """Whether the weight or the target depends on the planned number of epochs."""
        return self.schedule.decay != "none" or self.entry.make is Taid

    @property
    def needs_shift(self) -> bool:
        """Whether a constant added to a teacher row changes the value: not if rows are standardised or centred."""
        centered = self.options.get("centered", False)
        return self.entry.shift and not self.standardize and not centered

    def forward(
        self, student: Rows, teacher: Rows, labels: Tensor | None, progress: TrainingProgress, mix: Mix | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The unweighted value of the batch, the mean over its pairs of layers, and the figures to log."""
        logits = {}
        if "student_logits" in self.entry.inputs:
            logits["student_logits"] = student[ON[self.on]]
        if "teacher_logits" in self.entry.inputs:
            logits["teacher_logits"] = teacher[LOGITS]
        if self.standardize:
            logits = {name: standardize(rows) for name, rows in logits.items()}
        values = []
        for pair, loss in zip(self.pairs or (), self.losses if self.entry.on_features else [self.loss], strict=True):
            rows = dict(logits)
            if pair.student is not None:
                rows["student_features"] = student[pair.student]
            if pair.teacher is not None:
                rows["teacher_features"] = teacher[self.source(pair.teacher).key]
            values.append(self._value(loss, rows, labels, progress, mix))
        value = values[0] if len(values) == 1 else torch.stack(values).mean()
        log = {self.label: value.detach()}
        with torch.no_grad():
            log |= {f"{self.label}/{name}": figure(*logits.values()) for name, figure in self.diagnostics.items()}
        return value, log

    def refuse_mix(self) -> None:
        """Refuse mixed views for a loss that cannot be weighted row by row between two labels."""
        if self.entry.labels and not self.entry.per_row:
            raise Refused(
                f"loss {self.label!r} needs one label per row and has no value per row, so it cannot be used with "
                "mixed views; use a recipe without mixing"
            )

    def _value(
        self,
        loss: Loss,
        rows: Rows,
        labels: Tensor | None,
        progress: TrainingProgress,
        mix: Mix | None,
    ) -> Tensor:
        inputs: dict[str, Any] = {**rows}
        if "progress" in self.entry.inputs:
            inputs["progress"] = progress
        if not self.entry.labels:
            return loss(**inputs)
        if mix is None:
            return loss(**inputs, labels=labels)
        self.refuse_mix()
        # On mixed views, a loss with labels is computed for both labels, weighted like the pixels of the row.
        own = loss(**inputs, labels=labels, reduction="none")
        partner = loss(**inputs, labels=mix.partner_labels, reduction="none")
        return torch.lerp(partner, own, mix.weights.to(own.dtype)).mean()


class Objective(nn.Module):
    """Cross-entropy and distillation terms, from spec strings.

    Without a `ce` spec, the weight of the cross-entropy is the one published with the terms (1 without terms), and so
    is what it trains. Terms with parameters (CTKD, projectors of features) or state (TAID) are sub-modules, so
    `parameters()`, `state_dict()`, `train()` and `to()` include them. A state dict of other specs is refused.

    A term on features has pairs of layers in its spec; where it has parameters, `widths` are their sizes. Without
    these, an objective can be asked for its needs and not be computed.
    """

    def __init__(self, specs: Sequence[str], widths: Widths | None = None) -> None:
        super().__init__()
        hard = [spec for spec in map(parse_spec, specs) if spec.scheme == "ce"]
        terms = [Term(text, widths) for text in specs if parse_spec(text).scheme != "ce"]
        if len(hard) > 1:
            raise UsageError(f"'ce' is specified {len(hard)} times; specify it once")
        self.specs = tuple(specs)
        self.terms = nn.ModuleList(terms)
        self.ce_weight, self.smoothing, self.ce_on = _read_ce(hard[0]) if hard else _published_ce(terms)
        _make_labels_unique(terms)
        if not terms and not self.ce_weight:
            raise UsageError("the weight of ce is 0 and there is no other loss, so there is nothing to minimise")

    @property
    def needs(self) -> Needs:
        """What the training loop must pass to `forward`."""
        terms = self.all_terms
        logits = [ON[term.on] for term in terms if "student_logits" in term.entry.inputs]
        logits += [ON[self.ce_on]] if self.ce_weight > 0 else []
        pairs = [pair for term in terms for pair in term.pairs or ()]
        return Needs(
            labels=self.ce_weight > 0 or any(term.entry.labels for term in terms),
            sources=unique(source for term in terms for source in term.sources),
            layers=unique(pair.student for pair in pairs if pair.student is not None),
            outputs=unique(logits),
            open_pairs=any(term.pairs is None for term in terms),
        )

    @property
    def follows_the_end(self) -> str | None:
        """The first term whose weight or target depends on the planned number of epochs."""
        return next((term.label for term in self.all_terms if term.follows_the_end), None)

    def refuse_codec(self, codec: Codec) -> None:
        """Refuse an archive whose codec stores less of a row of logits than a term needs."""
        of_logits = [term for term in self.all_terms if "teacher_logits" in term.entry.inputs]
        needs_rows = [term.label for term in of_logits if term.entry.full_rows and not codec.full_rows]
        if needs_rows:
            raise Refused(
                f"loss {needs_rows[0]!r} needs whole teacher rows, and codec {codec.name!r} holds only the highest "
                "classes; use kd or kl, or cache the teacher with --codec linear"
            )
        needs_shift = [term.label for term in of_logits if term.needs_shift and not codec.keeps_shift]
        if needs_shift:
            raise Refused(
                f"loss {needs_shift[0]!r} compares raw logits, and this archive dropped the constant of each row that "
                "softmax ignores; cache the teacher with the shift kept, or set standardize=true for this loss"
            )

    def penultimate_match(self) -> tuple[Term, FeatureMatch] | None:
        """The term, and its loss, whose projector maps the student's penultimate features to the teacher's."""
        for term in self.all_terms:
            for pair, loss in zip(term.pairs or (), getattr(term, "losses", ()), strict=False):
                if pair == (PENULTIMATE, PENULTIMATE) and isinstance(loss, FeatureMatch) and loss.match == "mse":
                    return term, loss
        return None

    def fit(self, read: Callable[[Source], tuple[Tensor, Tensor]]) -> None:
        """Before the first step: terms that must see the teacher's features of many images get them, with labels."""
        for term in self.all_terms:
            for pair, loss in zip(term.pairs or (), getattr(term, "losses", ()), strict=False):
                if hasattr(loss, "fit"):
                    assert pair.teacher is not None, f"{term.label} has nothing to fit to"
                    loss.fit(*read(term.source(pair.teacher)))

    def forward(
        self,
        student: Tensor | Rows,
        teacher: Tensor | Rows | None,
        labels: Tensor | None,
        *,
        progress: TrainingProgress | None = None,
        mix: Mix | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and the unweighted value of each part for the log (detached, on the device).

        Both networks' outputs are rows by name, or logits alone.
        """
        progress = progress or TrainingProgress()
        student = {LOGITS: student} if isinstance(student, Tensor) else student
        teacher = {LOGITS: teacher} if isinstance(teacher, Tensor) else teacher or {}
        total, log = self._cross_entropy_part(student, labels, mix)
        for term in self.all_terms:
            missing = [source.key for source in term.sources if source.key not in teacher]
            if missing:
                raise UsageError(
                    f"loss {term.label!r} needs teacher {missing[0]}, found {', '.join(teacher) or 'none'}"
                )
            if term.entry.on_features and not term.losses:
                raise UsageError(f"loss {term.label!r} needs pairs of layers and their widths")
            value, values = term(student, teacher, labels, progress, mix)
            total = total + term.weight * term.schedule.factor(progress) * value
            log |= values
        return total, log

    def synchronise(self) -> None:
        """On several ranks, average the terms' gradients and buffers; call it between backward and step."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        # Those of terms on features are constants, the same on all ranks; an average would round them.
        buffers = [buffer for term in self.all_terms if not term.entry.on_features for buffer in term.buffers()]
        for tensor in [*gradients, *buffers]:
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
        on = "" if self.ce_on == "all" else f" on {self.ce_on}"
        return " + ".join([f"{self.ce_weight:g} ce{on}", *(f"{term.weight:g} {term.spec}" for term in self.all_terms)])

    @property
    def all_terms(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term, Term)]

    def _cross_entropy_part(
        self, student: Rows, labels: Tensor | None, mix: Mix | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross-entropy, and its unweighted value for the log; 0 and no log entry if its weight is 0."""
        if not self.ce_weight:
            return next(iter(student.values())).new_zeros((), dtype=torch.float32), {}
        logits = student[ON[self.ce_on]]
        check_matrix("student", logits)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        rows = self._cross_entropy(logits, labels)
        if mix is not None:
            rows = torch.lerp(self._cross_entropy(logits, mix.partner_labels), rows, mix.weights.to(rows.dtype))
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


def _read_ce(spec: Spec) -> tuple[float, float, str]:
    spec.refuse_unknown(CE_OPTIONS)
    if spec.name:
        raise UsageError(f"{spec.text!r}: a loss has options but no name; expected ce?weight=1&smoothing=0.1")
    smoothing = spec.take("smoothing", 0.0)
    if not 0 <= smoothing < 1:
        raise UsageError(f"{spec.text!r}: smoothing must be at least 0 and below 1, found {smoothing:g}")
    return _weight(spec, 1.0), smoothing, _read_on(spec)


def _published_ce(terms: Sequence[Term]) -> tuple[float, float, str]:
    """Weight, smoothing and `on` of the cross-entropy that was published with the terms; refused if they differ."""
    published = {(term.entry.ce_weight, term.entry.ce_on) for term in terms}
    if len(published) > 1:
        listing = ", ".join(
            f"{term.label}: {term.entry.ce_weight:g}" + (" on=head" if term.entry.ce_on == "head" else "")
            for term in terms
        )
        raise UsageError(
            f"these losses were published with different cross-entropy weights ({listing}); add --loss ce?weight=..."
        )
    weight, on = published.pop() if published else (1.0, "all")
    return weight, 0.0, on


# -- what a spec string says about layers -----------------------------------------------------------------------------


def term_options(entry: Entry) -> tuple[str, ...]:
    """The options of a spec string that belong to the term and not to the loss."""
    names = [*TERM_OPTIONS]
    if "student_logits" in entry.inputs:
        names += ["on"]
    if "student_logits" in entry.inputs and "teacher_logits" in entry.inputs:
        names += ["standardize"]
    if entry.on_features:
        names += [layers_option(entry)]
    if "teacher_features" in entry.inputs:
        names += ["teacher"]
    return tuple(names)


def layers_option(entry: Entry) -> str:
    """`pairs` of layers, or `layer` for a loss that uses the features of one network only."""
    return "pairs" if {"student_features", "teacher_features"} <= {*entry.inputs} else "layer"


def with_pairs(text: str, entry: Entry, pairs: Sequence[Pair]) -> str:
    """A spec string with its pairs of layers."""
    return f"{text}{'&' if '?' in text else '?'}{layers_option(entry)}={','.join(map(str, pairs))}"


def _read_pairs(spec: Spec, entry: Entry) -> tuple[Pair, ...] | None:
    """The pairs of a spec string; None if it leaves them open."""
    option = layers_option(entry)
    text = spec.options.get(option)
    if text is None:
        return None
    items = text.split(",")
    if len(set(items)) < len(items):
        raise UsageError(f"{spec.text!r}: {option} has {next(i for i in items if items.count(i) > 1)!r} twice")
    if option == "layer":
        if not all(items):
            raise UsageError(f"{spec.text!r}: expected layer=NAME or layer=NAME,NAME, found layer={text}")
        return tuple(Pair(layer, None) if "student_features" in entry.inputs else Pair(None, layer) for layer in items)
    pairs = []
    for item in items:
        student, _, teacher = item.partition(":")
        if not student or not teacher:
            raise UsageError(f"{spec.text!r}: expected pairs=STUDENT:TEACHER,STUDENT:TEACHER, found {item!r}")
        pairs.append(Pair(student, teacher))
    return tuple(pairs)


def _read_on(spec: Spec) -> str:
    on = spec.take("on", "all")
    if on not in ON:
        raise UsageError(f"{spec.text!r}: on must be all or head, found {on!r}")
    return on


T = TypeVar("T")


def unique(items: Iterable[T]) -> tuple[T, ...]:
    """In the order of their first occurrence."""
    return tuple(dict.fromkeys(items))


def _make_labels_unique(terms: Sequence[Term]) -> None:
    """Rename the second of two terms `power` to `power-2`, so that each has its own entry in the log."""
    taken = {"ce"}
    for term in terms:
        base, number = term.label, 2
        while term.label in taken:
            term.label, number = f"{base}-{number}", number + 1
        taken.add(term.label)
