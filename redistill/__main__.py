"""`python -m redistill`: the command line, which is a package of its own above this one."""

from __future__ import annotations

from redistill_cli.__main__ import main

if __name__ == "__main__":
    main()
