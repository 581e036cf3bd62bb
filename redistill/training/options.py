"""Options of stage 2, with the defaults of `redistill train`; and config.toml, from which a run can be repeated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tomli_w
from redistill_cache.addresses import redact, split_pin
from redistill_cache.errors import UsageError
from redistill_cache.limits import MAX_VIEWS
from redistill_cache.storage import LOCAL

from redistill.optim import OptimConfig, preset
from redistill.option_fields import check_types, check_values, option, options_of, shown
from redistill.sources import DEFAULT_STREAM_CACHE, STREAM_CACHE_HELP, OnBadImage
from redistill.specs import did_you_mean, parse_spec
from redistill.strict_toml import read_toml

__all__ = [
    "CONFIG",
    "FREE_ON_RESUME",
    "POWER",
    "MemberSpec",
    "TrainOptions",
    "locations",
    "loss_name",
    "read_config",
    "write_config",
]

POWER = "power?lam=0.6667&temperature=4"
LARGEST_SEED = 2**63 - 1
MAX_MEMBERS = 1000
MAX_TERMS = 32  # of a loss
LISTS = ("students", "losses", "seeds", "teachers", "log")
PATHS = ("archive", "out", "val_archive")
# These do not change the result, or no more than rounding (device), so they may differ when a run is resumed.
FREE_ON_RESUME = (
    "device",
    "out",
    "data",
    "archive",
    "val",
    "val_archive",
    "on_bad_image",
    "workers",
    "cache_memory",
    "stream_cache",
    "log",
    "checkpoint_minutes",
    "resume",
)


@dataclass(frozen=True)
class MemberSpec:
    """One student of a run: its network, the terms of its loss, and the seed of its weights and noise."""

    name: str
    student: str
    losses: tuple[str, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `train`. Every combination of students, losses and seeds is trained, in one pass over the images."""

    data: str | Any = field(
        metadata=option(
            "Images the archive was made from: folder:PATH, cifar100:PATH, ...", positional=True, location=True
        )
    )
    """From Python also any object that `open_source` takes; so is `val`."""
    archive: Path = field(
        metadata=option(
            "Archive that cache-teacher wrote; with #sha256=ID after it, only the one with this id.",
            metavar="PATH|URL",
            location=True,
        )
    )
    students: tuple[str, ...] = field(
        metadata=option(
            "Student network: torchvision:resnet18, cifar:resnet8x4, ... May be repeated.",
            name="student",
            metavar="MODEL",
        )
    )
    out: Path = field(
        metadata=option("Folder of the run. Several students, losses or seeds get a subfolder each.", location=True)
    )
    val: str | Any | None = field(
        default=None,
        metadata=option(
            "Held-out images for validation after every epoch; or a share of the training images, such as 0.1, that is "
            "held out of every class, drawn by --order-seed.",
            metavar="DATA|SHARE",
            location=True,
        ),
    )
    val_archive: Path | None = field(
        default=None,
        metadata=option(
            "Archive of the --val images, for agreement with and KL to the teacher on held-out views.",
            metavar="PATH|URL",
            location=True,
        ),
    )
    on_bad_image: OnBadImage = field(
        default="fail",
        metadata=option("What to do with an image of --val that cannot be decoded; images of DATA are the archive's."),
    )
    losses: tuple[str, ...] = field(
        default=(POWER,),
        metadata=option(
            "Loss: terms joined by '+', as in 'kl?weight=0.5+ce?weight=1'. May be repeated.",
            name="loss",
            metavar="LOSS",
        ),
    )
    seeds: tuple[int, ...] = field(
        default=(0,),
        metadata=option(
            "Seed for weights and noise. May be repeated.",
            name="seed",
            at_least=0,
            at_most=LARGEST_SEED,
        ),
    )
    head: Literal["teacher"] | None = field(
        default=None,
        metadata=option(
            "With --loss features, teacher: the last layer is the teacher's behind the projector, not trained; it is "
            "fitted to the archive's logits and penultimate.",
            default_text="the student's own",
        ),
    )
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: int = field(default=128, metadata=option("Batch size over all processes.", at_least=1, at_most=2**24))
    """Batches of an epoch differ by one row at most, so that none is tiny."""
    grad_accum: int = field(
        default=1,
        metadata=option(
            "Parts in which each process computes its share of a batch, to save memory.", at_least=1, at_most=2**24
        ),
    )
    views_per_image: int = field(
        default=1,
        metadata=option(
            "Views per image in one batch; the image is decoded once. An epoch contains each image this many times.",
            at_least=1,
            at_most=MAX_VIEWS,
        ),
    )
    teachers: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "Teachers of the archive; the mean of their logits is used, and features of one.",
            name="teacher-names",
            metavar="A,B",
            default_text="the only one",
            commas=True,
        ),
    )
    online_teacher: str | None = field(
        default=None,
        metadata=option("Baseline: run this teacher at every step instead of reading its logits.", metavar="MODEL"),
    )
    order_seed: int = field(
        default=0, metadata=option("Seed for the order of images.", at_least=0, at_most=LARGEST_SEED)
    )
    size: int | None = field(
        default=None,
        metadata=option("Side of a view in pixels.", default_text="as in the archive", at_least=2, at_most=4096),
    )
    device: str = field(default="auto", metadata=option("Device: auto, cpu, cuda, cuda:N or mps."))
    amp: bool | None = field(default=None, metadata=option("Train in bfloat16.", default_text="on CUDA only"))
    compile: bool = field(default=False, metadata=option("Run the students through torch.compile."))
    channels_last: bool = field(default=True, metadata=option("Memory format of images and weights."))
    sync_bn: bool = field(default=False, metadata=option("Synchronise batch norm statistics over all GPUs."))
    ema: float | None = field(
        default=None,
        metadata=option(
            "Decay of an average of the weights, such as 0.999; the average is validated and saved.",
            above=0,
            below=1,
        ),
    )
    workers: int | None = field(
        default=None,
        metadata=option("Rendering processes.", default_text="one per CPU core", at_least=0, at_most=1024),
    )
    cache_memory: float = field(
        default=4.0,
        metadata=option(
            "GiB of memory for teacher rows, on the host and on a GPU; above it, they are stored in a temporary file, "
            "and copied to the GPU with every batch.",
            at_least=0,
        ),
    )
    stream_cache: float = field(
        default=DEFAULT_STREAM_CACHE,
        metadata=option(STREAM_CACHE_HELP, metavar="GIB", above=0, at_most=2**20),
    )
    allow_missing: bool = field(
        default=False, metadata=option("Train on the matching images even if others are missing.")
    )
    checkpoint_minutes: float = field(
        default=10.0, metadata=option("Minutes between checkpoints within an epoch.", at_least=0)
    )
    resume: Literal["auto", "never"] = field(
        default="auto", metadata=option("What to do with a run in --out: auto resumes it, never refuses it.")
    )
    log: tuple[Literal["csv", "tensorboard", "wandb"], ...] = field(
        default=("csv", "tensorboard"), metadata=option("Where metrics are logged.", commas=True)
    )
    allow_python: bool = False
    """Whether models may name code to import; set for command lines, never for files."""

    def __post_init__(self) -> None:
        for name in LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in PATHS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        check_values(self)
        if self.batch_size < self.views_per_image * self.grad_accum:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be split into {self.grad_accum} parts of "
                f"{self.views_per_image} views of an image"
            )
        for name in ("students", "losses", "seeds"):
            if not getattr(self, name):
                raise UsageError(f"expected at least one {options_of(TrainOptions)[name].flag}")
        if isinstance(self.val, float):
            object.__setattr__(self, "val", f"{self.val:g}")
        if self.val_share is not None:
            if not 0 < self.val_share < 1:
                raise UsageError(
                    f"--val as a share of the training images must be above 0 and below 1, found {self.val}"
                )
            if self.val_archive is not None:
                raise UsageError(f"--val {self.val} holds out training images, for which there is no --val-archive")
        members = len(self.students) * len(self.losses) * len(self.seeds)
        if members > MAX_MEMBERS:
            raise UsageError(f"a run trains at most {MAX_MEMBERS:,} students, found {members:,}; start several runs")
        if any(loss.count("+") >= MAX_TERMS for loss in self.losses):
            raise UsageError(f"--loss takes at most {MAX_TERMS} terms, joined by '+'")
        if self.val_archive is not None and self.val is None:
            raise UsageError(f"--val-archive {self.val_archive} needs the images it was made from; add --val")
        archive = Path(split_pin(str(self.archive))[0])
        if archive.resolve() in (self.out.resolve(), *self.out.resolve().parents):
            raise UsageError(f"--out {self.out} is inside the archive {self.archive}; choose another folder")
        if len(set(self.teachers)) < len(self.teachers):
            raise UsageError(f"--teacher-names {','.join(self.teachers)} has a name twice; list each once")
        _ = self.members  # refuses malformed losses, and members that occur twice

    @property
    def val_share(self) -> float | None:
        """`val` as a share of the training images; None where it names images of its own."""
        return parse_share(self.val)

    # -- members ------------------------------------------------------------------------------------------------------

    @cached_property
    def members(self) -> tuple[MemberSpec, ...]:
        """Every student with every loss and every seed, named after what distinguishes them."""
        networks = (student.partition("?")[0].replace(":", "-") for student in self.students)
        result = []
        for student, network in unique_names(networks, self.students):
            for loss, name in unique_names(map(loss_name, self.losses), self.losses):
                for seed in self.seeds:
                    parts = [network] if len(self.students) > 1 else []
                    full_name = "-".join([*parts, name, str(seed)])
                    result.append(MemberSpec(full_name, student, split_terms(loss), seed))
        if len({member.name for member in result}) < len(result):
            raise UsageError("the same student, loss and seed occur twice; list each once")
        return tuple(result)

    def folder(self, member: MemberSpec) -> Path:
        """The folder of a member: a subfolder of `out` where there are several."""
        return self.out / member.name if len(self.members) > 1 else self.out

    # -- files --------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything, for config.toml and checkpoints. None is left out: it means the default."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("optim", "allow_python", "resume")}
        plain = {name: plain_value(value) for name, value in own.items() if value is not None}
        return plain | {name: value for name, value in self.optim.to_json().items() if value is not None}

    def fixed_on_resume(self) -> dict[str, Any]:
        """Options that must be the same for a run to be resumed; `epochs` may grow where nothing depends on the end."""
        fixed = {name: value for name, value in self.to_json().items() if name not in FREE_ON_RESUME}
        return fixed if self.val_share is None else fixed | {"val": self.val}

    @classmethod
    def read(cls, values: Mapping[str, Any], *, preset_name: str | None = None) -> TrainOptions:
        """From flat field names, as in config.toml; a preset replaces defaults."""
        known = options_of(TrainOptions)
        for name in values:
            if name == "ce_weight":
                raise UsageError(replace_ce_weight(values))
            if name not in known:
                raise UsageError(f"unknown option {shown(name)}; {did_you_mean(name[:80], known)}")
        check_types(values, cls)
        optim = {name: value for name, value in values.items() if name in options_of(OptimConfig)}
        own = {name: value for name, value in values.items() if name not in optim}
        base = OptimConfig()
        if preset_name is not None:
            students = own.get("students", ())
            settings = preset(
                preset_name,
                model=parse_spec(students[0]).name if students else "",
                batch_size=own.get("batch_size"),
            )
            base = settings.optim
            own.setdefault("batch_size", settings.batch_size)
        if "decay_milestones" in optim:
            optim["decay_milestones"] = tuple(optim["decay_milestones"])
        return cls(**own, optim=replace(base, **optim))


def replace_ce_weight(values: Mapping[str, Any]) -> str:
    """The error message for an option that configurations of earlier versions may have."""
    losses = [str(loss) for loss in values.get("losses", (POWER,))]
    term = f"ce?weight={values['ce_weight']}"
    new = [loss if "ce" in map(scheme, split_terms(loss)) else f"{loss}+{term}" for loss in losses]
    return f"ce_weight is no longer an option; remove it and set losses = {new}"


def plain_value(value: object) -> object:
    """A value that TOML and JSON can hold, without the secrets of addresses."""
    if isinstance(value, tuple):
        return [plain_value(item) for item in value]
    return value if isinstance(value, bool | int | float) else redact(str(value))


def split_terms(loss: str) -> tuple[str, ...]:
    return tuple(term.strip() for term in loss.split("+"))


def scheme(term: str) -> str:
    return parse_spec(term).scheme


def loss_name(loss: str) -> str:
    """The names of the terms; cross-entropy is named only where it is alone."""
    schemes = [scheme(term) for term in split_terms(loss)]
    return "+".join([name for name in schemes if name != "ce"] or schemes)


def unique_names(short: Iterable[str], full: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Each text of `full` with its short name, or with the whole text as a file name where that is not unique."""
    names = list(short)
    for name, text in zip(names, full, strict=True):
        yield text, name if names.count(name) == 1 else re.sub(r"[^A-Za-z0-9.+-]+", "-", text)


# -- config.toml ------------------------------------------------------------------------------------------------------

CONFIG = "config.toml"


def write_config(folder: Path, options: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> None:
    """`options` as from `TrainOptions.to_json`; `facts` are tables for human readers."""
    LOCAL.publish(folder / CONFIG, tomli_w.dumps({"options": options, **facts}).encode())


def read_config(path: Path) -> dict[str, Any]:
    """The options in a config.toml."""
    tables = read_toml(path, f"configuration (the {CONFIG} of a run)")
    options = tables.get("options")
    if not isinstance(options, dict):
        raise UsageError(f"{path}: expected a table [options], as in the {CONFIG} of a run")
    return options


def locations(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a config.toml that choose what is read or written: paths, addresses, and weights in files."""
    known = {name for name, option in options_of(TrainOptions).items() if option.location}
    for name in ("students", "online_teacher"):
        value = options.get(name)
        models = value if isinstance(value, list) else [value]
        if any(names_a_file(model) for model in models if isinstance(model, str)):  # other types are refused later
            known.add(name)
    if parse_share(options.get("val")) is not None:
        known.discard("val")
    return {name: value for name, value in options.items() if name in known}


def parse_share(val: object) -> float | None:
    """`--val 0.1` as a number; None for anything else."""
    try:
        return float(val) if isinstance(val, str) else None
    except ValueError:
        return None


def names_a_file(model: str) -> bool:
    """Whether a model is, or has weights, elsewhere than in a library under a plain name."""
    spec = parse_spec(model)
    return re.search(r"[/\\:]", spec.name) is not None or re.search(r"\W", spec.options.get("weights", "")) is not None
