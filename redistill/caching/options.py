"""What stage 1 is told. Every default of `redistill cache-teacher` is here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from redistill_cache.codecs import CODECS
from redistill_cache.errors import UsageError
from redistill_cache.spec import check_name, check_text

from redistill.signals import LOGITS
from redistill.specs import did_you_mean

__all__ = ["CacheOptions"]


# -- options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Options of `cache_teacher`. Those that decide content are kept in the archive and compared on resume."""

    data: str | Any
    """A spec string, or any object that can be made a source."""
    teacher: str
    views: int
    out: Path
    recipe: str | None = None
    """`rrc`, or `cifar` for networks of small images, where nothing is said."""
    size: int | None = None
    """Side of the views; the teacher's own input size where nothing is said."""
    codec: str = "auto"
    fidelity: float = 1e-3
    feature_fidelity: float = 0.02
    """Bound on the relative error of every row of features."""
    signals: tuple[str, ...] = (LOGITS,)
    keep_shift: bool = False
    """Keep the mean of every row of logits too: softmax does not see it, losses on raw logits do."""
    batch_size: int = 128
    workers: int | None = None
    device: str = "auto"
    amp: bool | None = None
    channels_last: bool = True
    compile: bool = False
    seed: int = 0
    teacher_name: str | None = None
    licence: str = ""
    citation: str = ""
    block_rows: int | None = None
    on_bad_image: Literal["fail", "exclude"] = "fail"
    extend_views: bool = False
    allow_python: bool = False
    """Whether `teacher` may name code to import; only a command line may say so."""
    command: str = ""
    """How this was asked for, for the record; without secrets."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        layers = dict.fromkeys((LOGITS, *self.signals))  # logits always, and nothing twice
        object.__setattr__(self, "signals", tuple(layers))
        for name in ("views", "batch_size", "size", "block_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"expected {name} of at least 1, found {value}")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"expected workers of at least 0, found {self.workers}")
        if self.codec == "topk":
            raise UsageError("topk keeps a part of each row and is for importing other formats; use --codec auto")
        known = ("auto", *(name for name in CODECS if name != "topk"))
        if self.codec not in known:
            raise UsageError(f"unknown codec {self.codec!r}; {did_you_mean(self.codec, known)}")
        if re.match("[a-z0-9]{2,}:/", str(self.out)):
            raise UsageError(f"{self.out} is a URL; archives are written to a local disk and copied from there")
        for name in ("fidelity", "feature_fidelity"):
            if not 1e-9 <= getattr(self, name) <= 1:
                raise UsageError(f"expected {name} from 1e-9 to 1, found {getattr(self, name):g}")
        if self.teacher_name is not None:
            check_name(self.teacher_name, "--teacher-name")
        check_text(self.licence, "--licence")
        check_text(self.citation, "--citation")

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(signal for signal in self.signals if signal != LOGITS)

    def name_of_teacher(self, network: str) -> str:
        """What the teacher is called in the archive: as told, or after its network."""
        return self.teacher_name or re.sub(r"[^a-z0-9_-]+", "-", network.lower()).strip("-_")[:64] or "teacher"
