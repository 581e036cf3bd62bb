"""Tasks of bench/study.py that need no download, and teachers that the study trains itself.

    glyphs10   the task of the demo: ten classes of drawn glyphs
    glyphs100  the same at a hundred classes
    fonts      forty characters in the TrueType fonts that matplotlib brings; validation is on a family of fonts,
               Computer Modern, that neither teachers nor students have seen
    digits     the handwritten digits of scikit-learn (pip install 'redistill[bench]'), 8 x 8 pixels, drawn at 16 x 16

No image is in two of the three parts of a task: for teachers, for students, for validation. Every file is made at its
first use, below the folder of the study.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from redistill_cache import open_archive

from redistill.caching import CacheOptions, cache_teacher
from redistill.demo.rewriting import mislead, rewrite_logits
from redistill.demo.run import TEACHER_WEIGHTS
from redistill.optim import OptimConfig
from redistill.sources.base import Sample, Source
from redistill.sources.open_source import open_source
from redistill.training import TrainOptions, train

__all__ = ["TASKS", "Lab", "NoisyLabels", "Task", "glyph_in_font"]

PARTS = ("teacher", "student", "val")
VAL_PER_CLASS = {"glyphs10": 200, "glyphs100": 20, "fonts": 50, "digits": 60}
EXACT = "exact"
SIGNALS = ("logits", "layer1", "layer2", "penultimate")
TEACHER_NETWORK = "demo:large"
LABEL_VIEWS = 4  # of the images of a teacher, which is trained on their labels

Images = Iterator[tuple[int, Image.Image]]
"""(class, image) of the first images of every class."""


@dataclass(frozen=True)
class Task:
    name: str
    classes: int
    per_class: int
    """Images a class of a student, at the centre of the study."""
    epochs: int
    """Of a student on as many images, so that one with labels alone has converged. Others train for as many steps."""
    teacher_per_class: int
    teacher_epochs: int
    size: int = 32
    padding: int = 3
    sound: Path | None = None
    """The weights of a sound teacher that is there; the study trains all others."""
    draw: Callable[[str, int], Images] | None = None
    """(part, images a class) -> images; None for the glyphs that the synthetic source draws."""
    glyphs: str = "noise=0.3&clutter=0.2&similarity=0"
    """Options of the synthetic source."""

    @property
    def recipe(self) -> str:
        return f"cifar?size={self.size}&hflip=0&padding={self.padding}&padding_mode=reflect"

    @property
    def val_per_class(self) -> int:
        return VAL_PER_CLASS[self.name]


# -- characters in fonts ----------------------------------------------------------------------------------------------

CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789abdefghr"
SEEN_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
UNSEEN_FONTS = ("cmr10", "cmss10", "cmtt10", "cmb10", "cmti10")


@lru_cache(maxsize=64)
def font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), 40)


def glyph_in_font(name: str, character: str, rng: np.random.Generator, size: int = 24) -> Image.Image:
    """A character turned, scaled, slanted and shifted, darker than its paper, with noise."""
    large = Image.new("L", (80, 80))
    ImageDraw.Draw(large).text((40, 40), character, fill=255, font=font(name), anchor="mm")
    angle, slant = rng.uniform(-0.2, 0.2, 2)
    scale_x, scale_y = rng.uniform(1.3, 1.9, 2) * 32 / size  # pixels of `large` in one of the image
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[scale_x, slant * scale_x], [0, scale_y]])
    shift = np.array([40, 40]) - matrix @ (size / 2 + rng.uniform(-0.08, 0.08, 2) * size)
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    placed = large.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    ink = np.asarray(placed, np.float32)[..., None] / 255
    paper = rng.uniform(120, 220, 3)
    darker = rng.uniform(70, 120) + rng.uniform(-30, 30, 3)
    pixels = paper - ink * darker + rng.normal(0, rng.uniform(5, 15), (size, size, 3))
    return Image.fromarray((pixels.clip(0, 255) + 0.5).astype(np.uint8))


def draw_fonts(part: str, per_class: int) -> Images:
    fonts = UNSEEN_FONTS if part == "val" else SEEN_FONTS
    for label, character in enumerate(CHARACTERS):
        for i in range(per_class):
            rng = np.random.default_rng((PARTS.index(part), label, i))
            yield label, glyph_in_font(str(rng.choice(fonts)), character, rng)


# -- handwriting ------------------------------------------------------------------------------------------------------

DIGITS_OF_PART = {"val": slice(0, 60), "student": slice(60, 110), "teacher": slice(110, None)}
"""Of the 174 to 183 images of a digit."""


def draw_digits(part: str, per_class: int) -> Images:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for label in range(10):
        of_part = images[labels == label][DIGITS_OF_PART[part]][:per_class]
        for row in of_part:
            pixels = (row.reshape(8, 8) * (255 / 16)).astype(np.uint8)
            yield label, Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC).convert("RGB")


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "digits",
            classes=10,
            per_class=5,
            epochs=192,
            teacher_per_class=60,
            teacher_epochs=48,
            size=16,
            padding=2,
            draw=draw_digits,
        ),
        Task(
            "glyphs10",
            classes=10,
            per_class=50,
            epochs=192,
            teacher_per_class=600,
            teacher_epochs=12,
            sound=TEACHER_WEIGHTS,
        ),
        Task(
            "fonts",
            classes=40,
            per_class=12,
            epochs=160,
            teacher_per_class=150,
            teacher_epochs=8,
            size=24,
            padding=2,
            draw=draw_fonts,
        ),
        Task(
            "glyphs100",
            classes=100,
            per_class=20,
            epochs=64,
            teacher_per_class=100,
            teacher_epochs=12,
            glyphs="noise=0.1&clutter=0&similarity=0",
        ),
    )
}

# -- teachers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How a teacher is trained, relative to a sound one."""

    epochs: float = 1.0
    weight_decay: float = 5e-4
    wrong_labels: float = 0.0


TEACHERS = {
    "sound": Training(),
    "over-confident": Training(epochs=4.0, weight_decay=0.0),
    "under-trained": Training(epochs=1 / 6),
    "noisy-20": Training(wrong_labels=0.2),
    "noisy-40": Training(wrong_labels=0.4),
}
MISLED = "misled-"
"""Before the percentage of rows in which a sound teacher is made confidently wrong."""


class NoisyLabels:
    """A source in which a share of the labels is wrong; which ones is drawn for each image."""

    def __init__(self, source: Source, classes: int, share: float) -> None:
        self.source, self.classes, self.share = source, classes, share
        self.spec, self.class_names = f"{source.spec} with {share:.0%} wrong labels", source.class_names
        self.description: Mapping[str, Any] = {**source.description, "wrong_labels": share}

    def __str__(self) -> str:
        return self.spec

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, i: int) -> Sample:
        sample, rng = self.source.sample(i), np.random.default_rng((1, i))
        if rng.random() >= self.share:
            return sample
        return replace(sample, label=(sample.label + 1 + int(rng.integers(self.classes - 1))) % self.classes)


def teacher_spec(task: Task, weights: Path) -> str:
    return f"{TEACHER_NETWORK}?num_classes={task.classes}&weights={weights}"


@contextmanager
def missing(path: Path) -> Iterator[bool]:
    """Whether this process must make `path`; others that need it wait until it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not path.exists()


@dataclass(frozen=True)
class Lab:
    """The folder of images, teachers and archives; `scale` shortens the training of students for a trial."""

    work: Path
    scale: float = 1.0

    def scaled(self, number: float) -> int:
        return max(2, round(number * self.scale))

    def scaled_for_teachers(self, number: float) -> int:
        """A teacher that has learnt nothing would not even be a trial."""
        return max(2, round(number * max(self.scale, 0.25)))

    def data(self, task: Task, part: str, per_class: int) -> str:
        """The spec of a part of a task's images."""
        if task.draw is None:
            split = {"teacher": "&seed=1", "student": "", "val": "&split=val"}[part]
            return f"synthetic?classes={task.classes}&{task.glyphs}&n={per_class * task.classes}{split}"
        folder = self.work / "images" / f"{task.name}-{part}-{per_class}"
        with missing(folder) as to_make:
            if to_make:
                partial = folder.with_name(f".{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                for count, (label, image) in enumerate(task.draw(part, per_class)):
                    path = partial / f"{label:02}" / f"{count:06}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path)
                partial.rename(folder)
        return f"folder:{folder}"

    def val_data(self, task: Task) -> str:
        return self.data(task, "val", task.val_per_class)

    def teacher(self, task: Task, name: str) -> str:
        """The spec of a trained teacher."""
        if name == "sound" and task.sound is not None:
            return teacher_spec(task, task.sound)
        training = TEACHERS[name]
        out = self.work / "teachers" / f"{task.name}-{name}"
        weights = out / "student.safetensors"
        with missing(out.with_name(f"{out.name}.done")) as to_make:
            if to_make:
                data: str | NoisyLabels = self.data(task, "teacher", self.scaled_for_teachers(task.teacher_per_class))
                if training.wrong_labels:
                    data = NoisyLabels(open_source(data), task.classes, training.wrong_labels)
                epochs = self.scaled_for_teachers(task.teacher_epochs * training.epochs)
                optim = OptimConfig(lr=0.1, weight_decay=training.weight_decay, epochs=epochs, warmup_epochs=0.5)
                archive = self.labels_archive(task, data, training.wrong_labels)
                train(
                    TrainOptions(
                        data=data,
                        archive=archive,
                        students=(TEACHER_NETWORK,),
                        out=out,
                        losses=("ce",),
                        seeds=(100,),
                        batch_size=64 if task.size > 16 else 32,
                        optim=optim,
                        device="cpu",
                        workers=0,
                        log=("csv",),
                    )
                )
                out.with_name(f"{out.name}.done").touch()
        return teacher_spec(task, weights)

    def labels_archive(self, task: Task, data: str | NoisyLabels, wrong_labels: float) -> Path:
        """The views of a teacher's images; its logits, of a random network, are not used."""
        path = self.work / "archives" / f"labels-{task.name}-{wrong_labels:g}.redistill.zarr"
        network = f"demo:tiny?num_classes={task.classes}&weights=random"
        self.cache(path, data=data, teacher=network, views=LABEL_VIEWS, recipe=task.recipe, codec="float16")
        return path

    def archive(self, task: Task, teacher: str, per_class: int, views: int, fidelity: str) -> Path:
        """Logits of a teacher for the students' images."""
        name = f"{task.name}-{teacher}-{per_class}-{views}-{fidelity}"
        if fidelity == EXACT and not teacher.startswith(MISLED):
            path = self.work / "archives" / f"{name}.redistill.zarr"
            data = self.data(task, "student", per_class)
            spec = self.teacher(task, teacher)
            signals = SIGNALS if teacher == "sound" and views == 8 else SIGNALS[:1]
            self.cache(path, data=data, teacher=spec, views=views, recipe=task.recipe, codec="float32", signals=signals)
            return path
        base = self.archive(task, "sound" if teacher.startswith(MISLED) else teacher, per_class, views, EXACT)
        path = self.work / "archives" / f"{name}.redistill.zarr"
        with missing(path) as to_make:
            if to_make:
                partial = path.with_name(f"partial-{path.name}")
                shutil.rmtree(partial, ignore_errors=True)
                share = int(teacher.removeprefix(MISLED)) / 100 if teacher.startswith(MISLED) else 0.0
                rewrite_logits(
                    open_archive(base),
                    partial,
                    codec="float32" if fidelity == EXACT else "linear",
                    fidelity=1e-3 if fidelity == EXACT else float(fidelity),
                    change=mislead(share) if share else None,
                    changed_how=f"misled {share}" if share else "",
                )
                partial.rename(path)
        return path

    def cache(self, path: Path, **options: Any) -> None:  # noqa: ANN401  of CacheOptions
        with missing(path.with_name(f"{path.name}.done")) as to_make:
            if to_make:
                cache_teacher(CacheOptions(out=path, device="cpu", workers=0, **options))
                path.with_name(f"{path.name}.done").touch()
