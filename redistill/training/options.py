"""What stage 2 is told. Every default of `redistill train` is here or in OptimConfig, and nowhere else."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from redistill_cache.errors import UsageError
from redistill_cache.storage import LOCAL

from redistill.optim import OptimConfig, preset
from redistill.specs import did_you_mean, parse_spec

__all__ = [
    "CONFIG",
    "POWER",
    "MemberSpec",
    "TrainOptions",
    "check_types",
    "read_config",
    "to_toml",
    "write_config",
]


# -- given ------------------------------------------------------------------------------------------------------------
#
# Values that came as text, from a TOML file above all, against the types of the options they are for.

WORDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}


def check_types(given: Mapping[str, Any], options: type) -> None:
    """Refuse the first value that its field in the dataclass `options` cannot hold."""
    hints = type_hints(options)
    for name, value in given.items():
        if name in hints and not fits(value, hints[name]):
            raise UsageError(f"{name} must be {' or '.join(words(hints[name]))}, found {value!r}")


@cache
def type_hints(options: type) -> dict[str, Any]:
    return get_type_hints(options)


def fits(value: object, hint: Any) -> bool:  # noqa: ANN401  a type, a union or a tuple of one
    if hint is Any:  # an object, which comes from code and not from text
        return False
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    if get_args(hint):
        return any(fits(value, one) for one in get_args(hint))
    wider = {float: int | float, Path: str | Path}.get(hint, hint)
    return isinstance(value, wider) and (hint is bool or not isinstance(value, bool))


def words(hint: Any) -> list[str]:  # noqa: ANN401  as above
    if get_origin(hint) is tuple:
        return [f"a list, each {' or '.join(words(get_args(hint)[0]))}"]
    return [found for one in get_args(hint) or (hint,) if one in WORDS for found in (WORDS[one],)]


# -- config -----------------------------------------------------------------------------------------------------------
#
# config.toml: everything a run was told and found, so that `redistill train --config` repeats it.

CONFIG = "config.toml"


def write_config(folder: Path, options: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> None:
    """`options` as `TrainOptions.to_json` gives them; `facts` are tables that are read by people only."""
    LOCAL.publish(folder / CONFIG, to_toml({"options": options, **facts}).encode())


def read_config(path: Path) -> dict[str, Any]:
    """The options of a config.toml."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no configuration at {path}; a run folder holds it as {CONFIG}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} is not TOML that can be read: {error}") from None
    options = found.get("options")
    if not isinstance(options, dict):
        raise UsageError(f"{path}: expected a table [options], as in the {CONFIG} of a run")
    return options


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of strings, numbers, booleans and lists of them."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{to_value(key) if not key.isidentifier() else key} = {to_value(v)}" for key, v in table.items()]
        lines.append("")
    return "\n".join(lines)


def to_value(value: Any) -> str:  # noqa: ANN401  whatever an option holds
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)  # inf and nan are TOML too
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_value, value))}]"
    # TOML's basic strings are JSON's, but for DEL, which must be escaped as well.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


# -- options ----------------------------------------------------------------------------------------------------------

POWER = "power?lam=0.6667&temperature=4"
LISTS = ("students", "losses", "seeds", "teachers", "log")
PATHS = ("archive", "out", "val_archive")
LOGS = ("csv", "tensorboard", "wandb")
# How a run is carried out, not what comes out: free to differ when it is resumed.
FREE = (
    "out",
    "data",
    "archive",
    "val",
    "val_archive",
    "workers",
    "cache_memory",
    "log",
    "checkpoint_minutes",
    "resume",
)


@dataclass(frozen=True)
class MemberSpec:
    """One student of a cohort: a network, what it minimises, and the seed of its weights and noise."""

    name: str
    student: str
    losses: tuple[str, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `train`. Several students, losses or seeds make a cohort: every combination, in one pass."""

    data: str | Any
    archive: Path
    students: tuple[str, ...]
    out: Path
    losses: tuple[str, ...] = (POWER,)
    """Each is an objective: terms joined by '+', as in `kl?weight=0.5+dist?weight=2+ce?weight=1`."""
    seeds: tuple[int, ...] = (0,)
    ce_weight: float | None = None
    """Of the cross-entropy with the labels; what was published with the loss where nothing is said."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: int = 128
    """Rows of a step, over all processes. Batches of an epoch differ by one row at most, so none is tiny."""
    grad_accum: int = 1
    """Parts in which each process computes its share of a batch."""
    views_per_image: int = 1
    """Views of an image in one batch: decoded once. An epoch shows every image so many times."""
    val: str | Any | None = None
    val_archive: Path | None = None
    """An archive over the images of `val`: agreement with the teacher on views nobody trained on."""
    teachers: tuple[str, ...] = ()
    """Which teachers of the archive; the mean of their logits where there are several. All that there are."""
    online_teacher: str | None = None
    """A teacher that runs beside the students instead of the archive's answers; the views are the archive's."""
    order_seed: int = 0
    size: int | None = None
    device: str = "auto"
    amp: bool | None = None
    compile: bool = False
    channels_last: bool = True
    sync_bn: bool = False
    ema: float | None = None
    """Decay of an average of the weights; it is what is validated and kept as the student."""
    workers: int | None = None
    cache_memory: float = 4.0
    """GiB of memory for teacher's rows; above it they lie in a temporary file."""
    allow_missing: bool = False
    checkpoint_minutes: float = 10.0
    resume: str = "auto"
    """`auto` continues what is in `out`; `never` refuses a folder that holds a run."""
    log: tuple[str, ...] = ("csv", "tensorboard")
    allow_python: bool = False

    def __post_init__(self) -> None:
        for name in LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in PATHS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        self._check_numbers()
        if self.batch_size < self.views_per_image * self.grad_accum:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be cut into {self.grad_accum} parts of {self.views_per_image} "
                "views of an image"
            )
        for name in ("students", "losses", "seeds"):
            if not getattr(self, name):
                raise UsageError(f"expected at least one of --{name[:-1] if name != 'losses' else 'loss'}")
        if self.val_archive is not None and self.val is None:
            raise UsageError(f"--val-archive {self.val_archive} needs the images it was made from: give --val as well")
        if self.archive.resolve() in (self.out.resolve(), *self.out.resolve().parents):
            raise UsageError(f"--out {self.out} lies in the archive {self.archive}; choose a folder of its own")
        if len(set(self.teachers)) < len(self.teachers):
            raise UsageError(f"--teacher-names {','.join(self.teachers)} has a name twice; give each once")
        if self.resume not in ("auto", "never"):
            raise UsageError(f"--resume must be auto or never, found {self.resume!r}")
        for kind in self.log:
            if kind not in LOGS:
                raise UsageError(f"--log {kind!r} is not known; {did_you_mean(kind, LOGS)}")

    def _check_numbers(self) -> None:
        for name in ("batch_size", "grad_accum", "views_per_image"):
            within(name, getattr(self, name), 1, "at least 1")
        within("size", self.size, 2, "at least 2 pixels")
        for name in ("workers", "cache_memory", "checkpoint_minutes"):
            within(name, getattr(self, name), 0, "0 or more")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UsageError(f"--ema is a decay between 0 and 1 such as 0.999, found {self.ema:g}")
        for name, seed in (("order-seed", self.order_seed), *(("seed", seed) for seed in self.seeds)):
            if not 0 <= seed < 2**63:
                raise UsageError(f"--{name} must be a number from 0 to 2^63 - 1, found {seed}")

    # -- members ------------------------------------------------------------------------------------------------------

    def members(self) -> tuple[MemberSpec, ...]:
        """Every student with every loss and every seed, named after what tells them apart."""
        found = []
        losses, students = (
            distinct(map(loss_name, self.losses), self.losses),
            distinct((student.partition("?")[0].replace(":", "-") for student in self.students), self.students),
        )
        for student, student_name in zip(self.students, students, strict=True):
            for loss, name in zip(self.losses, losses, strict=True):
                for seed in self.seeds:
                    parts = [student_name] if len(self.students) > 1 else []
                    full = "-".join([*parts, name, str(seed)])
                    found.append(MemberSpec(full, student, self.terms(loss), seed))
        names = [member.name for member in found]
        if len(set(names)) < len(names):
            raise UsageError("the same student, loss and seed are asked for twice; give each once")
        return tuple(found)

    def terms(self, loss: str) -> tuple[str, ...]:
        """The specs of one objective, with the cross-entropy where its weight is said."""
        terms = tuple(term.strip() for term in loss.split("+"))
        if self.ce_weight is None or any(parse_spec(term).scheme == "ce" for term in terms):
            return terms
        return (*terms, f"ce?weight={self.ce_weight:g}")

    def folder(self, member: MemberSpec) -> Path:
        """Where its files go: a cohort has a folder each."""
        return self.out / member.name if len(self.members()) > 1 else self.out

    # -- files --------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything, for config.toml and checkpoints. None is left out: it means the default."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("optim", "allow_python", "resume")}
        plain = {name: plain_value(value) for name, value in own.items() if value is not None}
        return plain | {name: value for name, value in self.optim.to_json().items() if value is not None}

    def deciding(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {name: value for name, value in self.to_json().items() if name not in FREE}

    @classmethod
    def read(cls, given: Mapping[str, Any], *, preset_name: str | None = None) -> TrainOptions:
        """From flat names, as on the command line or in config.toml; a preset says what is not given."""
        known, optim_names = {f.name for f in fields(cls)} - {"optim"}, {f.name for f in fields(OptimConfig)}
        for key in given:
            if key not in known | optim_names:
                raise UsageError(f"unknown option {key!r}; {did_you_mean(key, known | optim_names)}")
        check_types(given, cls)
        check_types(given, OptimConfig)
        own = {key: value for key, value in given.items() if key in known}
        optim = {key: value for key, value in given.items() if key in optim_names}
        base = OptimConfig()
        if preset_name is not None:
            students = own.get("students", ())
            found = preset(
                preset_name,
                model=parse_spec(students[0]).name if students else "",
                batch_size=own.get("batch_size"),
            )
            base = found.optim
            own.setdefault("batch_size", found.batch_size)
        if "decay_milestones" in optim:
            optim["decay_milestones"] = tuple(optim["decay_milestones"])
        return cls(**own, optim=replace(base, **optim))


def within(name: str, value: float | None, least: float, words: str) -> None:
    if value is not None and not value >= least:  # so that not-a-number is refused, too
        raise UsageError(f"--{name.replace('_', '-')} must be {words}, found {value:g}")


def plain_value(value: Any) -> Any:  # noqa: ANN401  whatever an option holds
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def loss_name(loss: str) -> str:
    """The terms by name; the cross-entropy only where it is alone."""
    schemes = [parse_spec(term.strip()).scheme for term in loss.split("+")]
    return "+".join([scheme for scheme in schemes if scheme != "ce"] or schemes)


def distinct(short: Any, full: tuple[str, ...]) -> list[str]:  # noqa: ANN401  an iterable of names
    """Short names where these are unique, else the whole text as a file name."""
    names = list(short)
    return [
        name if names.count(name) == 1 else re.sub(r"[^A-Za-z0-9.+-]+", "-", text)
        for name, text in zip(names, full, strict=True)
    ]
