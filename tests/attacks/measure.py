"""Open one hostile archive in a process of its own and say how that went: verdict, CPU seconds, megabytes.

python -m tests.attacks.measure PATH
"""

from __future__ import annotations

import json
import resource
import sys
import time

from redistill_cache.errors import RedistillError
from redistill_cache.reader import open_archive


def read_everything(path: str) -> str:
    try:
        archive = open_archive(path)
        for view in range(archive.num_views):
            archive.logits(view)
            archive.view_params(view)
            archive.canaries(view)
        list(archive.keys)
    except RedistillError as error:
        return f"{type(error).__name__}: {error}"
    return "believed"


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    before, start = megabytes(), time.process_time()
    verdict = read_everything(sys.argv[1])
    print(json.dumps({"verdict": verdict, "cpu": time.process_time() - start, "grown": megabytes() - before}))
