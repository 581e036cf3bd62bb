"""Entry point of `redistill` and of `python -m redistill_cli` (the form torchrun starts)."""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130


def main() -> None:
    # Set before numpy is imported, which reads it. The encoder multiplies many small matrices while the teacher uses
    # the cores: more threads cost it more processor time than they save.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    python_handles_sigint = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if python_handles_sigint:  # Ctrl-C while modules are imported: exit without a traceback, as nothing has started
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from redistill_cli.streams import open_streams

    output = open_streams()
    from redistill_cache.addresses import redact
    from redistill_cache.errors import RedistillError, Refused
    from redistill_cache.wording import harmless

    from redistill_cli.app import app

    if python_handles_sigint:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()  # always ends with SystemExit or an error
    except RedistillError as error:
        print(f"redistill: {harmless(redact(str(error)))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("redistill: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        # The reader of our output (head, less) may have exited, which is not an error.
        if output is not None and output.error is not None and not isinstance(output.error, BrokenPipeError):
            print(f"redistill: standard output is incomplete: {output.error.strerror}", file=sys.stderr)
            sys.exit(end.code or Refused.exit_code)
        raise


if __name__ == "__main__":
    main()
