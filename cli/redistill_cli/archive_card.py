"""Commands of `redistill archive` that prepare archives for others: card and sign."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from redistill_cache.wording import harmless

from redistill_cli.options import ArchivePath
from redistill_cli.rendering import ProgressBar

__all__ = ["card", "sign"]


def card(
    path: ArchivePath,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]", help="Folder. [default: that of a packed archive itself, else name.card beside it]"
        ),
    ] = None,
) -> None:
    """Write README.md, croissant.json, CITATION.cff and a preview of an archive.

    They are for people and search engines, all from the archive itself. The
    command writes the same files again, and over changes of them: set what
    they say with 'redistill archive edit'. Of a packed archive the card lists
    the tars, which are hashed for it.

    Examples:

    \b
      redistill archive card teacher.redistill
      redistill archive card teacher.redistill.zarr card
    """
    from redistill_cache.packed import is_packed

    from redistill.sharing.cards import write_cards
    from redistill.sharing.terms import missing_for_publishing, publishing_advice

    if out is None:
        out = path if is_packed(path) else path.with_name(f"{path.name.split('.')[0]}.card")
    with ProgressBar(f"card {path}", "B") as bar:
        files = write_cards(path, out, progress=bar.update)
    typer.echo(f"{harmless(out)}: {', '.join(file.name for file in files)}")
    if missing := missing_for_publishing(path):
        typer.echo(harmless(publishing_advice(path, missing)))


def sign(
    path: ArchivePath,
    key: Annotated[Path, typer.Option("--key", metavar="PEM", help="Private key of P-256, P-384 or P-521.")],
) -> None:
    """Sign a finished archive with a private key.

    The signature is of the manifest, which has the hash of every other file.
    It lies beside the manifest, in manifest.json.sig. Others check it with
    'redistill verify --signature'. Changes of the archive need another one.

    OpenSSL makes keys:

    \b
      openssl ecparam -name prime256v1 -genkey -noout -out private.pem
      openssl ec -in private.pem -pubout -out public.pem

    Examples:

    \b
      redistill archive sign teacher.redistill.zarr --key private.pem
    """
    from redistill.sharing.signing import sign as write_signature

    typer.echo(f"signed: {harmless(write_signature(path, key))}")
