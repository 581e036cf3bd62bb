"""Effect of codec, loss and number of views on students: python bench/accuracy.py [--quick] [--work DIR] [--json PATH]

The task of the demo: ten classes of drawn glyphs, 500 images for the students, a teacher trained on 30,000 others.
Three studies, each a set of cohorts that share seeds, so that differences are paired:

    codec   students from exact logits, from linear at three fidelities, and from the top 3 and top 1 of ten classes
    loss    KL, the power divergence bounded and literal, ABKD and DKD, at T = 1 and 4, with the original teacher and
            with one that is confidently wrong on a fifth of its inputs
    views   1, 4 and 16 cached views, compared with an online teacher that sees a new view in every epoch

Top-1 on 2,000 unseen images: mean and standard deviation over seeds, and the difference from the first line of the
study with the p-value of a paired t-test. With --work the study can be interrupted anywhere and resumes.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import torch
from redistill_cache import open_archive
from scipy.stats import ttest_rel

from redistill.caching import CacheOptions, cache_teacher
from redistill.demo.rewriting import mislead, rewrite_logits
from redistill.demo.run import (
    BATCH_SIZE,
    OPTIM,
    RECIPE,
    STUDENT_DATA,
    STUDENT_NETWORK,
    TEACHER_NETWORK,
    TEACHER_WEIGHTS,
    VAL_DATA,
)
from redistill.training import TrainOptions, train

TEACHER = f"{TEACHER_NETWORK}&weights={TEACHER_WEIGHTS}"
VIEWS = 8
CODECS = {
    "exact": ("float32", 1e-3, 1),
    "linear 1e-2": ("linear", 1e-2, 1),
    "linear 1e-3": ("linear", 1e-3, 1),
    "linear 1e-4": ("linear", 1e-4, 1),
    "top 3 of 10": ("topk", 1e-3, 3),
    "top 1 of 10": ("topk", 1e-3, 1),
}
WHOLE_ROWS = ("kl?temperature=4", "kl?temperature=1", "power?temperature=4", "power?temperature=1")
# The losses that accept truncated rows; the power divergence needs whole rows.
TRUNCATED = WHOLE_ROWS[:2]
LOSSES = {
    "KL, T = 4": "kl?temperature=4",
    "KL, T = 1": "kl?temperature=1",
    "power, T = 4": "power?temperature=4",
    "power, T = 1": "power?temperature=1",
    "power literal, T = 4": "power?form=cressie-read&temperature=4",
    "power literal, T = 1": "power?form=cressie-read&temperature=1",
    "ABKD, T = 4": "ab?temperature=4",
    "DKD, T = 4": "dkd?temperature=4",
}


@dataclass(frozen=True)
class Study:
    """The folder of the runs, their seeds and their length."""

    work: Path
    seeds: tuple[int, ...]
    epochs: int

    def archive(self, name: str, write: Callable[[Path], object]) -> Path:
        """The path of an archive, written if it is missing."""
        path = self.work / f"{name}.redistill.zarr"
        if not (path / "_redistill" / "manifest.json").exists():
            write(path)
        return path

    def exact(self, views: int) -> Path:
        options = {"data": STUDENT_DATA, "teacher": TEACHER, "views": views, "recipe": RECIPE, "codec": "float32"}
        return self.archive(f"exact-{views}", lambda path: cache_teacher(CacheOptions(out=path, **options)))

    def train(self, name: str, archive: Path, losses: Sequence[str], online: bool = False) -> dict[str, list[float]]:
        """Top-1 of every seed, by loss."""
        options = TrainOptions(
            data=STUDENT_DATA,
            archive=archive,
            students=(STUDENT_NETWORK,),
            out=self.work / "runs" / name,
            losses=tuple(losses),
            seeds=self.seeds,
            batch_size=BATCH_SIZE,
            optim=replace(OPTIM, epochs=self.epochs),
            val=VAL_DATA,
            online_teacher=TEACHER if online else None,
            workers=1,
            log=("csv",),
        )
        outcomes = train(options)
        return {
            loss: [result.top1 or 0.0 for result in outcomes[at * len(self.seeds) : (at + 1) * len(self.seeds)]]
            for at, loss in enumerate(losses)
        }


def row(study: str, name: str, loss: str, top1: list[float], base: list[float]) -> dict[str, object]:
    spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
    differs = len(top1) > 1 and top1 != base
    return {
        "study": study,
        "name": name,
        "loss": loss,
        "top1": statistics.mean(top1),
        "sd": spread,
        "seeds": len(top1),
        "difference": statistics.mean(top1) - statistics.mean(base),
        "p": float(ttest_rel(top1, base).pvalue) if differs else None,
        "ratio": statistics.mean(top1) / statistics.mean(base),
    }


def by_codec(study: Study) -> list[dict[str, object]]:
    exact = study.exact(VIEWS)
    rows, base = [], {}
    for name, (codec, fidelity, k) in CODECS.items():
        path = exact
        if codec != "float32":

            def write(out: Path, codec: str = codec, fidelity: float = fidelity, k: int = k) -> object:
                return rewrite_logits(open_archive(exact), out, codec=codec, fidelity=fidelity, k=k)

            path = study.archive(name.replace(" ", "-"), write)
        top1_by_loss = study.train(
            f"codec-{name.replace(' ', '-')}", path, TRUNCATED if codec == "topk" else WHOLE_ROWS
        )
        base = base or top1_by_loss
        rows += [row("codec", name, loss, top1, base[loss]) for loss, top1 in top1_by_loss.items()]
        print(harness.table(rows[-len(top1_by_loss) :]), flush=True)
    return rows


def by_loss(study: Study) -> list[dict[str, object]]:
    exact = study.exact(VIEWS)
    misled = study.archive(
        "misled", lambda out: rewrite_logits(open_archive(exact), out, codec="float32", change=mislead(0.2))
    )
    rows = []
    for teacher, path in (("as it is", exact), ("misled", misled)):
        top1_by_loss = study.train(f"loss-{teacher.replace(' ', '-')}", path, [*LOSSES.values(), "ce"])
        base = top1_by_loss["kl?temperature=4"]
        named = {**{loss: name for name, loss in LOSSES.items()}, "ce": "labels only"}
        rows += [row(f"loss, teacher {teacher}", named[loss], loss, top1, base) for loss, top1 in top1_by_loss.items()]
        print(harness.table(rows[-len(top1_by_loss) :]), flush=True)
    return rows


def by_views(study: Study) -> list[dict[str, object]]:
    """The online baseline uses an archive with one view per epoch, so that it sees a new view in every epoch."""
    losses = ("kl?temperature=4", "power?temperature=4")
    rows, base = [], {}
    fresh = study.exact(study.epochs)
    runs = [("a new view every epoch, online", fresh, True)]
    runs += [(f"{views} views", study.exact(views), False) for views in (16, 4, 1)]
    for name, path, online in runs:
        top1_by_loss = study.train(f"views-{name.split(',')[0].replace(' ', '-')}", path, losses, online)
        base = base or top1_by_loss
        rows += [row("views", name, loss, top1, base[loss]) for loss, top1 in top1_by_loss.items()]
        print(harness.table(rows[-len(top1_by_loss) :]), flush=True)
    return rows


STUDIES = {"loss": by_loss, "codec": by_codec, "views": by_views}


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--work", type=Path, default=None, help="folder for archives and runs, to resume from")
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES), help="run only these studies")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are too small for more
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        study = Study(work, seeds=(0, 1) if args.quick else (0, 1, 2, 3), epochs=16 if args.quick else 48)
        rows = [row for name in args.study for row in STUDIES[name](study)]
    print()
    harness.report("accuracy", rows, args)


if __name__ == "__main__":
    main()
