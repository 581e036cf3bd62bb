"""Commands of `redistill archive` for other formats: import and export."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from redistill_cache.wording import counted, harmless, human_bytes

from redistill.interchange.options import ExportOptions, ImportOptions
from redistill_cli.options import collect, takes
from redistill_cli.rendering import TerminalProgress, key_values, local_archive, note, print_json

if TYPE_CHECKING:
    from redistill.interchange.exporting import ExportResult
    from redistill.interchange.importing import ImportResult

__all__ = ["export", "import_source"]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, and say what would be written; write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@takes(ImportOptions)
def import_source(*, dry_run: DryRun = False, as_json: AsJson = False, **values: object) -> None:
    """Make an archive of logits that another program cached.

    Every record is read and checked before anything is written, and joined
    with its image by name. What the source has lost, or does not say, is
    printed as an audit and stored in the archive. No file runs code: pickles
    are read by a reader that knows arrays and tensors only. An interrupted
    import is continued by the same command.

    Examples:

    \b
      redistill archive import logits.npz --from table \\
        --data folder:imagenet/train --recipe 'center?size=224' \\
        --out vit.redistill.zarr

    \b
      redistill archive import FKD_soft_label_500_crops --from fkd \\
        --data folder:imagenet/train \\
        --recipe 'rrc?size=475&interpolation=bicubic' \\
        --out fkd.redistill.zarr --dry-run
    """
    options = ImportOptions(**collect(ImportOptions, values))
    from redistill.interchange.importing import import_archive

    with TerminalProgress() as progress:
        result = import_archive(options, progress, dry_run=dry_run)
    print_json(result.to_json()) if as_json else show_import(result)


def show_import(result: ImportResult) -> None:
    size = human_bytes(result.bytes_per_view * result.samples * result.views)
    key_values(
        [
            ("archive", result.path),
            ("id", result.id or "not written: a dry run"),
            ("views", f"{result.views:,} per sample, {counted(result.samples, 'sample')}, {result.classes:,} classes"),
            ("teacher", result.teacher),
            ("logits", f"codec {result.codec}, about {result.bytes_per_view:.1f} bytes per view, {size}"),
            *[("audit", harmless(sentence)) for sentence in result.audit],
        ]
    )


@takes(ExportOptions)
def export(*, dry_run: DryRun = False, as_json: AsJson = False, **values: object) -> None:
    """Write rows of an archive as files for other training loops.

    npz: one file per view, for numpy.load. webdataset: tars with a sample per
    image, with the image files if --images is given. Values are decoded. The
    files do not depend on when or how often the command runs; an interrupted
    one is continued by the same command.

    Examples:

    \b
      redistill archive export teacher.redistill.zarr rows --to npz --views 0

    \b
      redistill archive export teacher.redistill.zarr tars --to webdataset \\
        --dtype float16 --images folder:imagenet/train
    """
    options = ExportOptions(**collect(ExportOptions, values))
    from redistill.interchange.exporting import export_archive

    options = replace(options, archive=str(local_archive(options.archive)))
    with TerminalProgress() as progress:
        result = export_archive(options, progress, dry_run=dry_run, notify=note)
    print_json(result.to_json()) if as_json else show_export(result, dry_run=dry_run)


def show_export(result: ExportResult, *, dry_run: bool) -> None:
    files = f"{counted(result.files, 'file')}, {human_bytes(result.total_bytes)}"
    if dry_run:
        files = f"a dry run: {counted(result.files, 'file')}, rows of {human_bytes(result.total_bytes)}"
    elif result.kept:
        files += f", {result.kept:,} of them {'was' if result.kept == 1 else 'were'} there"
    key_values(
        [
            ("export", f"{result.path}: {files}"),
            ("archive", result.archive),
            ("views", f"{', '.join(map(str, result.views))} of {counted(result.samples, 'sample')}"),
        ]
    )
