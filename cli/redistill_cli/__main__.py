"""Entry point of `redistill` and of `python -m redistill_cli` (the form torchrun starts)."""

from __future__ import annotations

import os
import signal
import sys

from redistill_cache.errors import RedistillError

INTERRUPTED = 130


def main() -> None:
    from redistill_cli.app import app

    try:
        app()
    except RedistillError as error:
        print(f"redistill: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("redistill: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output (head, less) went away: not an error, but stdout must not be flushed again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


if __name__ == "__main__":
    main()
