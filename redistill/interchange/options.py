"""Options of `redistill archive import` and `redistill archive export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from redistill_cache.errors import UsageError
from redistill_cache.spec import LOGITS, check_name, check_signal_name, check_text

from redistill.caching.options import CHOICES, check_local
from redistill.option_fields import check_values, option
from redistill.specs import did_you_mean

__all__ = ["ExportOptions", "ImportOptions"]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the source does not say about itself is an option; the archive records it."""

    source: Path = field(
        metadata=option("What another program wrote: a table of logits, or a folder in its layout.", positional=True)
    )
    layout: Literal["table", "fkd", "ml-dr"] = field(
        metadata=option(
            "Layout of SOURCE. table: .npz, .npy, .csv or .parquet of file names and logits, of the central crop. "
            "fkd: a folder of FKD, one file of crops and soft labels per image. ml-dr: a folder of ml-dr, with "
            "crops and flips only.",
            name="from",
        )
    )
    data: str | Any = field(metadata=option("Images that the logits are of: folder:PATH, ..., or a path."))
    out: Path = field(metadata=option("Archive to write or resume."))
    recipe: str | None = field(
        default=None,
        metadata=option(
            "Views as the teacher saw them, for their size and interpolation: center?size=224&crop_pct=0.875 for a "
            "table, rrc?size=224&interpolation=bicubic for crops.",
            default_text="center for a table, rrc for crops",
        ),
    )
    match: Literal["key", "name", "stem"] = field(
        default="key",
        metadata=option(
            "What a name in a table is of an image: its path below the data, its file name, or its file name up to the "
            "first dot."
        ),
    )
    names: Path | None = field(
        default=None, metadata=option("File with one name per line, in the order of the rows of an .npy table.")
    )
    values: Literal["logits", "probabilities"] = field(
        default="logits", metadata=option("What the rows of a table are. Of probabilities the logarithm is stored.")
    )
    temperature: float | None = field(
        default=None,
        metadata=option(
            "Temperature of the softmax that gave the probabilities; the archive then has that of T = 1.",
            default_text="1",
            above=0,
        ),
    )
    classes: int | None = field(
        default=None,
        metadata=option("Number of classes.", default_text="that of the data or of the table", at_least=2),
    )
    views: int | None = field(
        default=None, metadata=option("Import the first views only.", default_text="all", at_least=1)
    )
    accept: tuple[Literal["missing", "extra", "duplicate"], ...] = field(
        default=(),
        metadata=option(
            "What the names may be. missing: images without logits are left out; extra: logits without an image are "
            "ignored; duplicate: the first record of a name counts.",
            metavar="A,B",
            commas=True,
        ),
    )
    teacher_name: str = field(
        default="imported", metadata=option("Name of the teacher in the archive.", metavar="NAME")
    )
    codec: str = field(default="auto", metadata=option(f"Codec of whole rows: {', '.join(CHOICES)}. Others are topk."))
    fidelity: float = field(
        default=1e-3,
        metadata=option(
            "Largest KL(source || stored) of any whole row, at T = 1 and at T = 4.", at_least=1e-9, at_most=1
        ),
    )
    block_rows: int | None = field(
        default=None,
        metadata=option("Rows per committed block.", default_text="from the number of samples", at_least=1),
    )
    licence: str = field(default="", metadata=option("Licence of the archive."))
    citation: str = field(default="", metadata=option("How to cite the archive."))

    def __post_init__(self) -> None:
        for name in ("source", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        object.__setattr__(self, "accept", tuple(self.accept))
        check_values(self)
        if self.codec not in CHOICES:
            raise UsageError(f"--codec {self.codec!r} is not known; {did_you_mean(self.codec, CHOICES)}")
        if self.temperature is not None and self.layout == "table" and self.values == "logits":
            raise UsageError("--temperature is that of probabilities, and the table has logits; drop it")
        check_local(self.out)
        check_name(self.teacher_name, "--teacher-name")
        check_text(self.licence, "--licence")
        check_text(self.citation, "--citation")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which part of an archive is exported, and as what."""

    archive: str = field(metadata=option("Path such as name.redistill.zarr, or URL.", positional=True, location=True))
    out: Path = field(metadata=option("Folder for the files.", positional=True))
    to: Literal["npz", "webdataset"] = field(
        metadata=option("npz: a file per view with keys, labels and logits. webdataset: tars with a sample per image.")
    )
    views: tuple[int, ...] = field(
        default=(), metadata=option("Views to export.", metavar="A,B", commas=True, default_text="all", at_least=0)
    )
    teacher: str | None = field(
        default=None, metadata=option("Teacher, as shown by redistill inspect.", default_text="the only one")
    )
    signals: tuple[str, ...] = field(
        default=(LOGITS,), metadata=option("Signals to export: logits, and layers.", metavar="A,B", commas=True)
    )
    dtype: Literal["float32", "float16"] = field(default="float32", metadata=option("Type of the values."))
    images: str | None = field(
        default=None,
        metadata=option(
            "For webdataset: put the image files of this data beside the logits.", metavar="DATA", location=True
        ),
    )
    per_tar: int = field(default=1000, metadata=option("Images per tar of webdataset.", at_least=1, at_most=1_000_000))

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        for name in ("views", "signals"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        check_values(self)
        for signal in self.signals:
            check_signal_name(signal, "--signals")
        if not self.signals:
            raise UsageError("--signals names nothing to export; expected logits, or layers of the archive")
        if self.images is not None and self.to != "webdataset":
            raise UsageError("--images has no effect with --to npz; use --to webdataset, or drop it")
