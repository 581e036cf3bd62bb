"""Which layer of a student learns from which layer of the teacher, where a loss does not name them.

Both networks have an order of layers: the ends of their stages, then penultimate. They are paired from the end, and
pairs of layers that the teacher's side does not have are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from redistill_cache import Archive
from redistill_cache.errors import Refused, UsageError
from torch import Tensor, nn

from redistill.caching.additions import missing_signal
from redistill.losses.objective import Objective, Pair, Source, Term, Widths, with_pairs
from redistill.models.open_model import meta_network
from redistill.signals import (
    HEAD_LOGITS,
    LOGITS,
    PENULTIMATE,
    PROBE_SIZE,
    Layers,
    in_eval_mode,
    look_into,
    outputs_in_order,
    pool,
    stage_ends,
    suggest,
)

__all__ = ["StudentLayers", "TeacherLayers", "connected", "online_layers", "stored_layers"]


@dataclass(frozen=True)
class StudentLayers:
    """A student that is looked at over `probe`."""

    name: str
    module: nn.Module
    probe: Tensor

    @cached_property
    def ends(self) -> tuple[str, ...]:
        return stage_ends(self.module, self.probe)

    @cached_property
    def head(self) -> str | None:
        return self.look(()).head

    def look(self, layers: Sequence[str]) -> Layers:
        try:
            return look_into(self.module, layers, self.probe)
        except (Refused, UsageError) as error:
            raise type(error)(f"the student {self.name!r}: {error}") from None


@dataclass(frozen=True)
class TeacherLayers:
    """The layers of a teacher that can be used, with their widths, and the ends of its stages."""

    name: str
    widths: Mapping[str, int]
    ends: tuple[str, ...]
    defaults: Collection[str]
    """Those that may be chosen for a term that names none."""
    names: Collection[str]
    """The names of all layers of its network; none where the network is not known here."""
    refuse: Callable[[str], Refused]
    """layer -> the error about a layer that this teacher does not offer."""

    def missing(self, layer: str) -> Refused | UsageError:
        """The error about a layer that this teacher does not offer."""
        if layer != PENULTIMATE and self.names and layer not in self.names:
            return UsageError(f"{self.name} has no layer {layer!r}; {suggest(layer, {*self.names, PENULTIMATE})}")
        return self.refuse(layer)


def stored_layers(archive: Archive, teacher: str, only: Collection[str] | None = None) -> TeacherLayers:
    """The layers of a teacher in an archive; `only` those, of a run that began before others were added."""
    names = [name for name in archive.signals_of(teacher) if name != LOGITS]
    defaults = names if only is None else [name for name in names if name in only]
    widths = {name: archive.signal(teacher, name)[1].width for name in names}
    inner = tuple(sorted((name for name in defaults if name != PENULTIMATE), key=natural_order))
    network, ends = stored_network(archive, teacher)
    return TeacherLayers(
        name=f"teacher {teacher!r} of {archive.path.name}",
        widths=widths,
        ends=ends if {*ends} & {*inner} else inner,
        defaults=defaults,
        names=[] if network is None else [name for name, _ in network.named_modules()],
        refuse=partial(missing_signal, archive, teacher),
    )


def stored_network(archive: Archive, teacher: str) -> tuple[nn.Module | None, tuple[str, ...]]:
    """The network that the archive says the teacher is, and the ends of its stages; None where it is not known here."""
    model = archive.teacher(teacher).model
    spec, size = model.get("spec"), model.get("input_size")
    side = size if isinstance(size, int) else PROBE_SIZE
    try:
        network = meta_network(str(spec), archive.num_classes, side)
        return network, stage_ends(network, torch.zeros(2, 3, side, side, device="meta"))
    except Exception:  # noqa: BLE001  of a library or version that is not here: the order of names is used instead
        return None, ()


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts layer2 before layer10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def online_layers(name: str, module: nn.Module, probe: Tensor) -> TeacherLayers:
    """The layers of a teacher that runs at every step: all of its modules that run once and give a row per image."""
    with in_eval_mode(module), torch.no_grad():
        calls = outputs_in_order(module, probe)
    names = [layer for layer, _ in calls]
    widths = {}
    for layer, output in calls:
        if names.count(layer) == 1 and isinstance(output, Tensor) and output.ndim in (2, 3, 4):
            with suppress(Refused):
                widths[layer] = pool(output, layer).shape[1]
    last = {layer: width for layer, width in look_into(module, (), probe).widths.items() if layer == PENULTIMATE}
    widths |= last
    return TeacherLayers(
        name=f"the teacher {name!r}",
        widths=widths,
        ends=stage_ends(module, probe),
        defaults={*widths},
        names=names,
        refuse=lambda layer: Refused(f"the teacher {name!r} has no layer {layer!r} with a row for every image"),
    )


def connected(
    draft: Objective, student: StudentLayers, teachers: Mapping[str | None, TeacherLayers], num_classes: int
) -> Objective:
    """The objective with pairs of layers, and parameters of their widths, in every term on features.

    `teachers` has those that terms name, and under None the one of a term that names none.
    """
    chosen = {}
    for term in draft.all_terms:
        teacher = teachers.get(term.teacher)
        if term.entry.on_features and term.pairs is None:
            chosen[term.text] = with_pairs(term.text, term.entry, default_pairs(term, student, teacher))
        for pair in term.pairs or ():
            if pair.teacher is not None and teacher is not None and pair.teacher not in teacher.widths:
                raise teacher.missing(pair.teacher)
    specs = [chosen.get(text, text) for text in draft.specs]
    needs = Objective(specs).needs
    if HEAD_LOGITS in needs.outputs and student.head is None:
        raise Refused(
            f"the student {student.name!r}: its logits are not the output of one final linear layer, which on=head "
            "would train; use on=all"
        )
    offered = {
        Source(name, layer).key: width for name, teacher in teachers.items() for layer, width in teacher.widths.items()
    }
    return Objective(specs, Widths(student.look(needs.layers).widths, offered, num_classes))


def default_pairs(term: Term, student: StudentLayers, teacher: TeacherLayers | None) -> list[Pair]:
    """The published layers of a loss, as far as both networks have them."""
    inputs, stages = term.entry.inputs, term.entry.layers == "stages"
    if "teacher_features" not in inputs:
        if stages and student.ends:
            return [Pair(layer, None) for layer in student.ends]
        student.look([PENULTIMATE])
        return [Pair(PENULTIMATE, None)]
    assert teacher is not None, f"{term.label} needs a teacher"
    if "student_features" not in inputs:
        pairs = [Pair(None, PENULTIMATE)]
    else:
        pairs = [Pair(PENULTIMATE, PENULTIMATE)] if student.head is not None else []
        if stages:
            pairs += [Pair(*pair) for pair in zip(reversed(student.ends), reversed(teacher.ends), strict=False)]
    pairs = [pair for pair in reversed(pairs) if pair.teacher in teacher.defaults]
    if not pairs:
        raise teacher.missing(PENULTIMATE)
    return pairs
