"""`redistill index`: the index of an image set, made once for many machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from redistill_cache.wording import harmless

from redistill.sources import DEFAULT_STREAM_CACHE, STREAM_CACHE_HELP
from redistill_cli.rendering import TerminalProgress, print_json


def index(
    *,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Images: folder:PATH, wds:PATTERN, or a path.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write, such as train.npz.")],
    workers: Annotated[
        int | None, typer.Option(help="Processes that read images. [default: one per CPU core]", min=0)
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image, as --on-bad-image exclude does later.")
    ] = False,
    stream_cache: Annotated[
        float, typer.Option(help=f"{STREAM_CACHE_HELP} [default: 20]", min=0.001, show_default=False)
    ] = DEFAULT_STREAM_CACHE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Hash every image once, and write the index to a file.

    The tasks of a job array, and training on several machines, would
    otherwise each read all images: use the file with DATA?index=FILE in any
    command, such as redistill cache-teacher 'folder:train?index=train.npz'.
    An image with another size or modification time is read again.

    Examples:

    \b
      redistill index folder:imagenet/train --out train.npz
    """
    from functools import partial

    from redistill.interrupts import raise_on_signals
    from redistill.sources.index import index_source
    from redistill.sources.open_source import open_source

    with TerminalProgress() as progress, raise_on_signals():
        made = index_source(
            open_source(data, stream_cache=stream_cache),
            workers=workers,
            progress=partial(progress.advance, "index"),
            on_bad_image="exclude" if decode else "fail",
            save_to=out,
        )
    if as_json:
        print_json({"images": len(made), "bad": len(made.excluded), "reused": made.reused, "path": str(out)})
        return
    bad = f", {len(made.excluded):,} bad ones" if made.excluded else ""
    typer.echo(f"{harmless(out)}: {len(made):,} images{bad}; use it with {harmless(data)}?index={harmless(out)}")
