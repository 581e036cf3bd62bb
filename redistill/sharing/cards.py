"""The card of an archive: README.md, croissant.json, CITATION.cff and a preview, for people and search engines.

All of it follows from the archive, so writing it again gives the same bytes; no reader uses it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from redistill_cache import Archive, limits, open_archive, packed
from redistill_cache.copies import refuse_partial_copy
from redistill_cache.errors import Refused
from redistill_cache.fetching import fetch_archive, fetched_description
from redistill_cache.inspect import describe, described_recipe
from redistill_cache.journal import FileEntry, sha256
from redistill_cache.layout import MANIFEST
from redistill_cache.locks import remove_partials
from redistill_cache.spec import LOGITS
from redistill_cache.storage import LOCAL, disk_trouble, read_small
from redistill_cache.wording import human_bytes

from redistill.sharing.croissant import croissant
from redistill.sharing.escaping import Plain, csv_text, markdown, yaml_text
from redistill.sharing.terms import data_source, spdx

__all__ = ["README", "card_files", "write_cards"]

README, CROISSANT, CITATION, PREVIEW = "README.md", "croissant.json", "CITATION.cff", "preview.csv"
MARKER = b"written from the archive by `redistill archive card`"
PREVIEW_ROWS, TOP = 20, 5
# Of an archive that is not packed, a card lists every file.
MOST_FILES = 10_000
PIECE = 1 << 20
NOT_STATED = "not stated"
# Sizes as the Hugging Face Hub names them.
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
# Of the licences that the hub knows, those that data sets have; it refuses a card with any other name.
HUB_LICENCES = re.compile(
    r"apache-2\.0|bsd-[23]-clause|cc0-1\.0|cc-by-2\.[05]|cc-by(-nc|-sa|-nc-nd|-nc-sa)?-[34]\.0|cc-by-nd-4\.0|"
    r"cdla-permissive-[12]\.0|cdla-sharing-1\.0|gpl-[23]\.0|mit|mpl-2\.0|unlicense"
)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card says, as text of which some is the archive's own and must be escaped."""

    id: str
    title: str
    teachers: tuple[str, ...]
    samples: str
    views: str
    classes: str
    source: str
    excluded: str
    seed: int
    recipe: str
    canaries: str
    size: str
    bytes_per_view: str
    signals: tuple[tuple[str, ...], ...]
    """A row for each: teacher, network, digest of its weights, signal, width, views, codec, bytes per view."""
    certificates: tuple[str, ...]
    licence: str
    data_licence: str
    teacher_licence: str
    citation: str
    fetch_command: Plain
    train_command: Plain


def write_cards(
    archive: Path, folder: Path, *, address: str = "ADDRESS", progress: Progress = lambda _done, _total: None
) -> list[Path]:
    """Write the card of a finished archive, packed or not, to `folder`; returns its files.

    Where `archive` or `folder` holds the packed form, the card lists the files of that form, else those of the archive.
    """
    refuse_folder(folder.absolute())
    location = next((path for path in (folder, archive) if packed.is_packed(path)), None)
    with opened(archive) as (described, readable):
        files = files_of_tree(described) if location is None else files_of_packed(location, described, progress)
        documents = card_files(described, preview(readable), files, address)
    with disk_trouble("write", folder):
        LOCAL.make_directories(folder.absolute())
        for name, data in documents.items():
            remove_partials(folder / name)
            LOCAL.publish(folder / name, data)
    return [folder / name for name in documents]


@contextmanager
def opened(archive: Path) -> Iterator[tuple[Archive, Archive]]:
    """The archive as it is described, and its first view to read; of a packed archive no more is unpacked."""
    if packed.is_packed(archive):
        with fetched_description(str(archive)) as state, TemporaryDirectory(prefix="redistill-") as folder:
            yield Archive(state), open_archive(fetch_archive(str(archive), Path(folder) / "view", views=1))
        return
    whole = open_archive(archive)
    refuse_partial_copy(archive, "writing its card")
    yield whole, whole


def refuse_folder(folder: Path) -> None:
    """Refuse a folder of an archive, which holds its own files only, and one with such files that are no card."""
    if any((path / "zarr.json").exists() for path in (folder, *folder.parents)):
        raise Refused(f"{folder} is in an archive, which holds its own files only; write the card to another folder")
    with disk_trouble("read", folder):
        present = [name for name in (README, CROISSANT, CITATION, PREVIEW) if (folder / name).exists()]
        if present and not (README in present and MARKER in (folder / README).read_bytes()):
            raise Refused(
                f"{folder / present[0]} exists and is not from a card; choose another folder, or move it away"
            )


def files_of_tree(archive: Archive) -> dict[str, FileEntry]:
    if len(archive.state.files) >= MOST_FILES:
        raise Refused(
            f"{archive.path} has {len(archive.state.files):,} files, and a card lists at most {MOST_FILES:,}; pack it "
            "with 'redistill archive pack' and write the card of its packed form"
        )
    return {MANIFEST: FileEntry((archive.path / MANIFEST).stat().st_size, str(archive.id)), **archive.state.files}


def files_of_packed(folder: Path, archive: Archive, progress: Progress) -> dict[str, FileEntry]:
    """The files of the packed form, which are hashed."""
    with disk_trouble("read", folder):
        manifest = read_small(folder / packed.MANIFEST, limits.MAX_MANIFEST_BYTES)
        if sha256(manifest) != archive.id:
            raise Refused(f"{folder} is the packed form of another archive, with the id {sha256(manifest)[:12]}...")
        tars = packed.contents(archive.state.files, archive.num_views)
        sizes = {name: packed.tar_size(archive.state.files, members) for name, members in tars.items()}
        files = {packed.MANIFEST: FileEntry(len(manifest), sha256(manifest))}
        done = 0
        for name, size in sizes.items():
            found, digest = (folder / name).stat().st_size, hashlib.sha256()
            if found != size:
                raise Refused(f"{folder / name} has {found} bytes, expected {size}; pack the archive again")
            with (folder / name).open("rb") as file:
                while piece := file.read(PIECE):
                    digest.update(piece)
                    done += len(piece)
                    progress(done, sum(sizes.values()))
            files[name] = FileEntry(size, digest.hexdigest())
    return files


def card_files(
    archive: Archive, columns: Mapping[str, Sequence[Any]], files: Mapping[str, FileEntry], address: str
) -> dict[str, bytes]:
    """The files of a card by name; README.md first, by which the card of an interrupted command is known as one."""
    card = make_card(archive, address)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([list(columns), *zip(*columns.values(), strict=True)])
    data = table.getvalue().encode()
    listed = {**files, PREVIEW: FileEntry(len(data), sha256(data))}
    described = croissant(
        title=card.title,
        description=f"{card.title}. Archive {card.id} of redistill, with {card.samples} images.",
        spec=archive.spec,
        teachers=archive.teachers,
        files=listed,
        columns=list(columns),
        preview=PREVIEW,
    )
    return {
        README: readme(card, archive).encode(),
        CROISSANT: (json.dumps(described, indent=1, ensure_ascii=False) + "\n").encode(),
        CITATION: citation_file(card, archive).encode(),
        PREVIEW: data,
    }


def make_card(archive: Archive, address: str) -> Card:
    info, spec = describe(archive), archive.spec
    source = data_source(spec) or "images of a source that is not stated"
    location = shlex.quote(f"{address}#sha256={archive.id}")
    return Card(
        id=str(archive.id),
        title=f"Outputs of {', '.join(archive.teachers)} for {archive.num_views:,} views of {source}",
        teachers=tuple(archive.teachers),
        samples=f"{archive.num_samples:,}",
        views=f"{archive.num_views:,}",
        classes=f"{archive.num_classes:,}",
        source=source,
        excluded=f"{len(spec.excluded):,}",
        seed=spec.seed,
        recipe=described_recipe(spec.recipe),
        canaries=f"{spec.canaries_per_view:,}",
        size=human_bytes(info["total_bytes"]),
        bytes_per_view=f"{info['bytes_per_view']:.1f}",
        signals=tuple(
            (
                teacher,
                str(info["models"][teacher].get("spec", NOT_STATED)),
                str(info["models"][teacher].get("weights_digest") or NOT_STATED),
                name,
                f"{signal['width']:,}",
                f"{signal['views']:,}",
                signal["codec"],
                f"{signal['bytes_per_view']:.1f}",
            )
            for teacher, signals in info["teachers"].items()
            for name, signal in signals.items()
        ),
        certificates=tuple(
            f"{teacher}, {name}: {certificate(signal['fidelity'])}"
            for teacher, signals in info["teachers"].items()
            for name, signal in signals.items()
        ),
        licence=spec.licence or NOT_STATED,
        data_licence=spec.data_licence or NOT_STATED,
        teacher_licence=spec.teacher_licence or NOT_STATED,
        citation=spec.citation or NOT_STATED,
        fetch_command=Plain(f"redistill archive fetch {location} teacher.redistill.zarr"),
        train_command=Plain(
            f"redistill train folder:IMAGES --archive {location} --student torchvision:resnet18 --out runs/student"
        ),
    )


# What the bound of a signal is about, by its metric.
BOUNDS = {
    "kl": "the softmax of every stored row differs from the teacher's by KL(teacher || stored) <= {bound:.2g}, at "
    "temperature 1 and at temperature 4",
    "centred": "the error of every stored row is at most {bound:.2g} of the row's distance from the mean row (of a "
    "tenth of the median distance, where that is more)",
    "relative": "the error of every stored row is at most {bound:.2g} of the row's length",
}
ERRORS = {"kl_t1": "KL at T = 1", "kl_t4": "KL at T = 4", "centred": "error", "relative": "error"}


def certificate(fidelity: Mapping[str, Any] | None) -> str:
    """What is certified of the rows of a signal, in words."""
    if fidelity is None:
        return "the errors of its rows were not measured"
    bound, metric = fidelity["bound"], fidelity["metric"]
    known = isinstance(metric, str) and metric in BOUNDS and isinstance(bound, int | float)
    promised = BOUNDS[metric].format(bound=bound) if known else "no bound is stated"
    measured = [
        f"{name}: mean {fidelity[f'mean_{key}']:.1e}, largest {fidelity[f'max_{key}']:.1e}"
        for key, name in ERRORS.items()
        if fidelity.get(f"mean_{key}") is not None and fidelity.get(f"max_{key}") is not None
    ]
    return promised + (f"; measured {'; '.join(measured)}" if measured else "")


# -- README.md --------------------------------------------------------------------------------------------------------


def readme(card: Card, archive: Archive) -> str:
    environment = Environment(
        loader=PackageLoader("redistill.sharing"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is not HTML: `finalize` escapes every value for Markdown
        finalize=markdown,
    )
    return environment.get_template(README).render(card=card, front_matter=front_matter(card, archive))


def front_matter(card: Card, archive: Archive) -> list[tuple[Plain, Plain]]:
    """The metadata that the Hugging Face Hub reads: every value one line of YAML."""
    licence = (spdx(archive.spec.licence) or "").lower()
    values: dict[str, object] = {
        "pretty_name": card.title,
        "license": licence if HUB_LICENCES.fullmatch(licence) else "other",
    }
    if values["license"] == "other":
        values["license_name"] = archive.spec.licence or NOT_STATED
    if source := data_source(archive.spec):
        values["source_datasets"] = [source]
    values |= {
        "task_categories": ["image-classification"],
        "size_categories": [SIZES[max(0, min(len(str(archive.num_samples)) - 3, len(SIZES) - 1))]],
        "tags": ["knowledge-distillation", "teacher-logits", "redistill", "zarr"],
    }
    lines = {
        name: f"[{', '.join(map(yaml_text, value))}]" if isinstance(value, list) else yaml_text(value)
        for name, value in values.items()
    }
    lines["viewer"] = "false"  # the preview is no data set of its own
    return [(Plain(name), Plain(line)) for name, line in lines.items()]


# -- CITATION.cff -----------------------------------------------------------------------------------------------------


def citation_file(card: Card, archive: Archive) -> str:
    """A citation file of format 1.2, which requires authors: an archive has a citation as one text."""
    cited = archive.spec.citation
    message = f"Cite this archive as: {cited}" if cited else "The archive states no citation."
    lines = [
        "cff-version: 1.2.0",
        "type: dataset",
        f"message: {yaml_text(message)}",
        f"title: {yaml_text(card.title)}",
        "authors:",
        f"  - name: {yaml_text('The authors that the message names' if cited else 'not stated')}",
        "identifiers:",
        "  - type: other",
        f"    value: {yaml_text(f'sha256:{archive.id}')}",
        '    description: "The id of the archive: the SHA-256 of its manifest"',
    ]
    licence = spdx(archive.spec.licence) or ""
    if HUB_LICENCES.fullmatch(licence.lower()):  # the format has a list of licences as well, of which these are part
        lines.append(f"license: {yaml_text(licence)}")
    return "\n".join(lines) + "\n"


# -- preview.csv ------------------------------------------------------------------------------------------------------


def preview(archive: Archive) -> dict[str, list[Any]]:
    """Columns of some rows, spread over the archive: key, label, and the classes a teacher predicts for view 0."""
    rows = np.unique(np.linspace(0, archive.num_samples - 1, PREVIEW_ROWS).round().astype(np.int64))
    columns: dict[str, list[Any]] = {
        "key": [csv_text(archive.keys[row]) for row in rows.tolist()],
        "label": archive.labels[rows].tolist(),
    }
    teacher = next((name for name in archive.teachers if LOGITS in archive.signals_of(name)), None)
    if teacher is None:
        return columns
    logits = archive.logits(0, rows, teacher).astype(np.float64)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = weights / weights.sum(1, keepdims=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    names = archive.class_names
    for place in range(order.shape[1]):
        classes = order[:, place].tolist()
        columns[f"class_{place + 1}"] = [csv_text(c if names is None else names[c]) for c in classes]
        columns[f"probability_{place + 1}"] = [f"{probabilities[i, c]:.4f}" for i, c in enumerate(classes)]
    return columns
