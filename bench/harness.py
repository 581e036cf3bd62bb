"""Shared by all scripts in bench/: the options --quick and --json, the table, the JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from redistill_cache import ArchiveSpec, SignalSpec, TeacherSpec, layout
from redistill_cache.codecs import Codec, Encoded
from redistill_cache.shards import encode_shard

Row = Mapping[str, Any]
# Views that share the side data of a codec.
VIEWS_OF_SIDE = 1_000_000


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with `--quick` and `--json PATH`; scripts add their own and call parse_args()."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller measurement, to try it out")
    parser.add_argument("--json", type=Path, default=None, metavar="PATH", help="also write the rows as JSON")
    return parser


def machine() -> dict[str, Any]:
    packages = ("torch", "torchvision", "zarr", "numcodecs", "numpy", "pillow")
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "system": platform.system(),
        "packages": {name: version(name) for name in packages},
    }


def peak_memory() -> int:
    """Peak resident bytes of this process. Not ru_maxrss, which a child process inherits from its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def written_bytes(codec: Codec, encoded: Encoded, level: int | None = None) -> float:
    """Bytes per view of the shards of one block with these rows, and of a share of the side data.

    `level` is that of zstd, by default the codec's own for every array.
    """
    count = len(encoded)
    signal = SignalSpec.of("rows", codec)
    if level is not None:
        signal = replace(signal, arrays=tuple(replace(array, level=level) for array in signal.arrays))
    spec = ArchiveSpec(
        num_samples=count, num_views=1, num_classes=codec.width, block_rows=1 << math.ceil(math.log2(count))
    )
    teacher = TeacherSpec("t", (signal,)).resolved(spec.block_rows)
    arrays = layout.teacher_arrays(spec, teacher)
    total = sum(len(encode_shard(arrays[f"rows/{name}"], np.asarray(a))) for name, a in encoded.arrays.items())
    side = sum(
        len(encode_shard(array, codec.side()[name.partition("/")[2]]))
        for name, array in layout.side_arrays(teacher).items()
    )
    return total / count + side / VIEWS_OF_SIDE


def table(rows: Sequence[Row]) -> str:
    """The rows as an aligned text table; columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any) -> str:  # noqa: ANN401  any JSON value
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def report(name: str, rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Print the table, and write the JSON if `--json` is set."""
    print(table(rows))
    save(name, rows, args)


def save(name: str, rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Write the JSON if `--json` is set."""
    if args.json is None:
        return
    args.json.parent.mkdir(parents=True, exist_ok=True)
    body = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "quick": args.quick,
        "machine": machine(),
        "rows": list(rows),
    }
    args.json.write_text(json.dumps(body, indent=1) + "\n")
