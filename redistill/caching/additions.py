"""Which parts of an archive a run writes: a new teacher, a teacher that exists, or signals that are added to it.

The blocks of a teacher never change, so signals that a finished teacher lacks become a part of their own, which readers
see as that teacher's. Its name follows from its signals, so every rank and every resumed run arrives at the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from redistill_cache import Archive, TeacherSpec
from redistill_cache.errors import OutOfRange, Refused
from redistill_cache.strict_json import canonical

__all__ = ["Part", "missing_signal", "parts_to_write"]


@dataclass(frozen=True)
class Part:
    """Signals of a teacher that are stored together; `adds_to` is the teacher if they were added to it."""

    name: str
    signals: tuple[str, ...]
    adds_to: str | None = None

    @property
    def owner(self) -> str:
        return self.adds_to or self.name

    @classmethod
    def of(cls, spec: TeacherSpec) -> Part:
        return cls(spec.name, tuple(signal.name for signal in spec.signals), spec.adds_to)


def parts_to_write(
    teacher: str, signals: Sequence[str], declared: Mapping[str, TeacherSpec], *, every: bool
) -> tuple[Part, ...]:
    """The parts that hold these signals of a teacher, or with `every` all of its parts; the teacher itself first.

    Signals that none holds become a new part.
    """
    if teacher not in declared:
        return (Part(teacher, tuple(signals)),)
    own = [Part.of(spec) for spec in declared.values() if spec.owner == teacher]
    held = {signal for part in own for signal in part.signals}
    chosen = [part for part in own if every or not set(part.signals).isdisjoint(signals)]
    lacking = tuple(signal for signal in signals if signal not in held)
    if lacking:
        chosen.append(Part(name_of_addition(teacher, lacking), lacking, teacher))
    return tuple(sorted(chosen, key=lambda part: (part.adds_to is not None, part.name)))


def name_of_addition(teacher: str, signals: Sequence[str]) -> str:
    """A name that no other signals have, and that users do not give."""
    digest = hashlib.sha256(canonical([teacher, sorted(signals)])).hexdigest()
    return f"{teacher[:50]}--{digest[:12]}"


def missing_signal(archive: Archive, teacher: str | None, signal: str) -> Refused:
    """The error for a signal that a teacher does not have, with the command that adds it."""
    spec = archive.teacher(teacher)
    command = f"redistill cache-teacher DATA --teacher '{typed_model(spec)}' --teacher-name {spec.name}"
    return OutOfRange(
        f"archive has no {signal!r} of teacher {spec.name!r} (it has {', '.join(archive.signals_of(spec.name))}); add "
        f"it: {command} --out {archive.path} --signals {signal}"
    )


def typed_model(spec: TeacherSpec) -> str:
    """The teacher as --teacher takes it, without the path of its weights, which no archive records."""
    text, source = (str(spec.model.get(key) or "MODEL") for key in ("spec", "weights_source"))
    weights = {"file": "weights=FILE", "python": "", "MODEL": ""}.get(source, f"weights={source}")
    return f"{text}{'&' if '?' in text else '?'}{weights}" if weights and "weights=" not in text else text
