"""`redistill verify`: check the files of an archive, and the images it was made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from redistill_cache.errors import UsageError
from redistill_cache.wording import harmless, human_bytes

from redistill_cli.rendering import (
    ARCHIVE_HELP,
    PATH_OR_URL,
    Offline,
    ProgressBar,
    held_part,
    local_archive,
    print_json,
    set_offline,
)

if TYPE_CHECKING:
    from redistill_cache.verify import VerifyReport

UNFINISHED = 1
REFUSED = 3
DAMAGED = 4


def verify(
    archive: Annotated[str, typer.Argument(metavar=PATH_OR_URL, help=ARCHIVE_HELP)],
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Hash every file, including those verified on this machine before, and decode every row."
        ),
    ] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Move damaged blocks aside, so that cache-teacher recomputes them.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Also check that these images give the archive's views."),
    ] = None,
    signature: Annotated[
        bool, typer.Option("--signature", help="Also check the signature beside the manifest; needs --key.")
    ] = False,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="PEM", help="Public key of the author, for --signature.")
    ] = None,
    offline: Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check an archive for damage.

    Compares every file with its checksum; with --data, also renders sample
    views again and compares them with the archive's canaries.

    Exit codes: 0 ok, 1 unfinished or not signed by this key, 3 the images do not give the archive's views, 4 damaged.

    Examples:

    \b
      redistill verify teacher.redistill.zarr --full
      redistill verify teacher.redistill.zarr --data folder:imagenet/train
      redistill verify teacher.redistill.zarr --signature --key public.pem
    """
    if signature != (key is not None):
        raise UsageError("--signature and --key go together: the signature is checked with the author's public key")
    from redistill_cache import verify as verification

    set_offline(offline)
    path = local_archive(archive)
    with ProgressBar("verify", "file" if not full else "item") as bar:
        report = verification.verify(path, full=full, progress=bar.update)
    moved = verification.quarantine(path, report.damaged) if quarantine and report.damaged else []
    aligned = True
    if data is not None and not report.damaged and report.missing_blocks is None:
        alignment = _align(path, data, full=full)
        aligned = alignment["verdict"] in ("exact", "tolerance")
        report = replace(report, ok=aligned, alignment=alignment)
    signed: dict[str, str] = {}
    if key is not None and not report.damaged and report.missing_blocks is None:
        signed = {"signed_id": _signed_id(archive, path, key)}
    if as_json:
        print_json(report.to_json() | {"quarantined": moved} | signed)
    else:
        _show(path, report, moved)
        if signed:
            typer.echo(f"{harmless(path)}: {_signed_by(key, report)}")
    if report.damaged:
        raise typer.Exit(DAMAGED)
    if not aligned:
        raise typer.Exit(REFUSED)
    if report.missing_blocks is not None:
        raise typer.Exit(UNFINISHED)


def _signed_id(location: str, archive: Path, key: Path) -> str:
    """The id in the signature beside the archive at `location`, of which `archive` is the copy here."""
    from redistill.sharing.signing import check_signature, read_signature

    return check_signature(archive, read_signature(location), key)


def _signed_by(key: Path | None, report: VerifyReport) -> str:
    others = "; so are the hashes of the files that are not here" if report.is_partial_copy else ""
    return f"signed with the private key of {harmless(key)}{others}"


def _align(archive: Path, data: str, *, full: bool) -> dict[str, Any]:
    """Re-create the canaries of the archive from the images in `data`; with `full`, hash all of them anew."""
    from redistill_cache.reader import open_archive

    from redistill.views.aligned import aligned_views

    views = aligned_views(data, open_archive(archive), reuse=not full)
    message = f"{views.alignment.message}; images hashed now: {views.hashed:,}"
    return views.alignment.to_json() | {"message": message, "hashed_images": views.hashed}


def _show(archive: Path, report: VerifyReport, moved: list[str]) -> None:
    for item in report.damaged:
        typer.echo(f"damaged: {harmless(item)}", err=True)
    for block in moved:
        typer.echo(f"moved aside: {harmless(block)}", err=True)
    if report.damaged:
        advice = (
            "run the same cache-teacher command to recompute them" if moved else "use --quarantine to recompute them"
        )
        typer.echo(f"{harmless(archive)}: {len(report.damaged)} of {report.checked_files} files damaged; {advice}")
        return
    if report.missing_blocks is not None:
        typer.echo(
            f"{harmless(archive)}: unfinished, {report.missing_blocks:,} blocks are missing and it is not sealed; the "
            f"{report.checked_files} files it has are ok; run the command that writes it again"
        )
        return
    held = held_part(report.views or 0, report.sealed_views or 0, report.lacking)
    partial = f"; a copy that {held}" if report.is_partial_copy else ""
    typer.echo(
        f"{harmless(archive)}: {report.checked_files:,} files ok, {report.hashed_files:,} of them hashed now "
        f"({human_bytes(report.hashed_bytes)})"
        + partial
        + ("; it has a signature, which --signature --key checks" if report.has_signature else "; not signed")
        + ("" if report.canaries_per_view else "; it has no canaries, so no images can be compared with it")
    )
    if report.alignment is not None:
        typer.echo(harmless(report.alignment["message"]))
