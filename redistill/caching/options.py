"""Options of stage 1, with the defaults of `redistill cache-teacher`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redistill_cache.codecs import CODECS
from redistill_cache.errors import UsageError
from redistill_cache.spec import LOGITS, TERMS, check_name, check_signal_name

from redistill.option_fields import check_values, option
from redistill.shares import parse_share
from redistill.sharing.terms import checked_terms
from redistill.sources import DEFAULT_STREAM_CACHE, STREAM_CACHE_HELP, OnBadImage
from redistill.specs import did_you_mean

__all__ = ["CHOICES", "CacheOptions", "check_local"]

CHOICES = ("auto", *(name for name in CODECS if name != "topk"))


def check_local(out: Path) -> None:
    """`UsageError` for an address where a path is expected."""
    if re.match("[a-z0-9]{2,}:/", str(out)):
        raise UsageError(f"--out {out} is a URL; write the archive to a local path and copy it from there")


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Options of `cache_teacher`. Those that affect its content are stored in the archive and compared on resume."""

    data: str | Any = field(
        metadata=option("Images: folder:PATH, cifar100:PATH, wds:PATTERN, ..., or a path.", positional=True)
    )
    """From Python also any object that `open_source` takes."""
    teacher: str | Any = field(
        metadata=option("Teacher model: torchvision:resnet50?weights=DEFAULT, ...", metavar="MODEL")
    )
    """From Python also a model from `open_model`."""
    out: Path = field(metadata=option("Archive to write or resume."))
    views: int | None = field(
        default=None,
        metadata=option(
            "Augmented views per image; each epoch of training reads one. Long training needs several, such as 8.",
            default_text="1, or those that the teacher has in the archive",
            at_least=1,
        ),
    )
    recipe: str | None = field(
        default=None,
        metadata=option(
            "Augmentation: center, rrc or cifar with ?key=value options, or a TOML file.",
            default_text="cifar for teachers of small images, else rrc",
        ),
    )
    size: int | None = field(
        default=None,
        metadata=option("Side of a view in pixels.", default_text="the teacher's input size", at_least=1),
    )
    codec: str = field(default="auto", metadata=option(f"Codec: {', '.join(CHOICES)}."))
    fidelity: float = field(
        default=1e-3,
        metadata=option("Largest KL(teacher || stored) of any row, at T = 1 and at T = 4.", at_least=1e-9, at_most=1),
    )
    feature_fidelity: float = field(
        default=0.1,
        metadata=option(
            "Largest error of any row of features, relative to its distance from the mean row.",
            at_least=1e-9,
            at_most=1,
        ),
    )
    signals: tuple[str, ...] = field(
        default=(LOGITS,),
        metadata=option(
            "Outputs to store: logits, and layers such as layer3 or penultimate. Exactly these of a new teacher; those "
            "that a finished one lacks are added to it, over the same views.",
            metavar="A,B",
            commas=True,
        ),
    )
    zstd_level: int | None = field(
        default=None,
        metadata=option(
            "zstd level of the teacher's arrays: bytes of the archive, not its values. 1 costs least time.",
            default_text="19 for logits, 3 for rows stored exactly",
            at_least=1,
            at_most=22,
        ),
    )
    keep_shift: bool = field(
        default=False,
        metadata=option("Also store the mean of each row of logits. Softmax ignores it; losses on raw logits need it."),
    )
    batch_size: int = field(default=128, metadata=option("Teacher batch size.", at_least=1))
    workers: int | None = field(
        default=None, metadata=option("Rendering processes.", default_text="one per CPU core", at_least=0)
    )
    stream_cache: float = field(
        default=DEFAULT_STREAM_CACHE,
        metadata=option(STREAM_CACHE_HELP, metavar="GIB", above=0, at_most=2**20),
    )
    device: str = field(default="auto", metadata=option("Device: auto, cpu, cuda, cuda:N or mps."))
    amp: bool | None = field(default=None, metadata=option("Run the teacher in bfloat16.", default_text="on CUDA only"))
    channels_last: bool = True
    compile: bool = field(default=False, metadata=option("Run the teacher through torch.compile."))
    seed: int | None = field(
        default=None,
        metadata=option("Seed for all augmentation parameters.", default_text="0, or that of the archive"),
    )
    teacher_name: str | None = field(
        default=None,
        metadata=option(
            "Name of the teacher in the archive. A new name adds a teacher.",
            metavar="NAME",
            default_text="after its network",
        ),
    )
    licence: str = field(default="", metadata=option("Licence of the archive, such as CC-BY-4.0.", metavar="SPDX"))
    citation: str = field(default="", metadata=option("How to cite the archive.", metavar="TEXT"))
    data_source: str = field(
        default="", metadata=option("Where the images come from: name and version, or a URL.", metavar="TEXT")
    )
    data_licence: str = field(
        default="", metadata=option("Licence of the images, such as LicenseRef-ImageNet.", metavar="SPDX")
    )
    teacher_licence: str = field(
        default="", metadata=option("Licence of the teacher's weights, such as BSD-3-Clause.", metavar="SPDX")
    )
    block_rows: int | None = field(
        default=None,
        metadata=option("Rows per committed block.", default_text="from the number of samples", at_least=1),
    )
    on_bad_image: OnBadImage = field(
        default="fail", metadata=option("What to do with an image that cannot be decoded.")
    )
    extend_views: bool = field(
        default=False,
        metadata=option("Add views to a finished archive, up to --views. Existing views are not recomputed."),
    )
    share: str | None = field(
        default=None,
        metadata=option(
            "This process's share of the blocks, from 0/N to (N-1)/N.",
            metavar="I/N",
            default_text="from torchrun, srun or a SLURM array, else 0/1",
        ),
    )
    no_help: bool = field(
        default=False,
        metadata=option("Stop after this share. By default, a process then helps with the blocks of the others."),
    )
    allow_python: bool = False
    """Whether `teacher` may name code to import; set for command lines, never for files."""
    command: str = ""
    """The command line without secrets, recorded in the archive's notes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        # Logits first, and nothing twice.
        signals = dict.fromkeys((*(name for name in self.signals if name == LOGITS), *self.signals))
        object.__setattr__(self, "signals", tuple(signals))
        check_values(self)
        if not self.signals:
            raise UsageError("--signals names nothing to store; expected logits, or layers such as penultimate")
        for signal in self.signals:
            check_signal_name(signal, "--signals")
        if self.extend_views and self.views is None:
            raise UsageError("--extend-views needs --views, the number of views that the archive shall have")
        if self.codec == "topk":
            raise UsageError("topk drops most of each row and is only for importing other formats; use --codec auto")
        if self.codec not in CHOICES:
            raise UsageError(f"--codec {self.codec!r} is not known; {did_you_mean(self.codec, CHOICES)}")
        check_local(self.out)
        if self.teacher_name is not None:
            check_name(self.teacher_name, "--teacher-name")
        if self.share is not None:
            parse_share(self.share)
        for name, value in checked_terms({name: getattr(self, name) for name in TERMS}).items():
            object.__setattr__(self, name, value)

    def name_of_teacher(self, network: str) -> str:
        """The teacher's name in the archive: `teacher_name`, or the network's name in the allowed characters."""
        return self.teacher_name or re.sub(r"[^a-z0-9_-]+", "-", network.lower()).strip("-_")[:64] or "teacher"
