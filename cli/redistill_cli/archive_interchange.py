"""Commands of `redistill archive` for other formats: import and export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from redistill_cache.wording import harmless, human_bytes

from redistill.interchange.options import ImportOptions
from redistill_cli.options import collect, takes
from redistill_cli.rendering import TerminalProgress, key_values, print_json

if TYPE_CHECKING:
    from redistill.interchange.importing import ImportResult

__all__ = ["import_source"]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Read and check everything; write nothing.")]
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
            ("views", f"{result.views:,} per sample, {result.samples:,} samples, {result.classes:,} classes"),
            ("teacher", result.teacher),
            ("logits", f"codec {result.codec}, about {result.bytes_per_view:.1f} bytes per view, {size}"),
            *[("audit", harmless(sentence)) for sentence in result.audit],
        ]
    )
