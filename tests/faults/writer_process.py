"""A process that writes the archive of scenario.py: something real to kill.

python -m tests.faults.writer_process PATH      prints a line before it starts, after every commit, and at the end
"""

from __future__ import annotations

import sys
from pathlib import Path

from redistill_cache.layout import Block

from tests.faults.scenario import write_archive


def say(word: object) -> None:
    print(word, flush=True)


def committed(block: Block) -> None:
    say(f"committed {block.record_path}")


if __name__ == "__main__":
    path = Path(sys.argv[1])
    say("ready")
    say(f"sealed {write_archive(path, committed=committed)}")
