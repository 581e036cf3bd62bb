"""Every benchmark, one after another, alone on the machine: python bench/run.py [--quick] [--only NAME ...]

Each writes bench/results/<name>.json, with the date and the machine. If an input is missing (a file of real logits, an
extra package), the table of the script shows it, and the measurement is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Short ones first, so that mistakes are seen early.
NAMES = (
    "sources",
    "views",
    "canaries",
    "archive",
    "job_array",
    "codecs",
    "wide_heads",
    "features",
    "peers",
    "losses",
    "memory",
    "remote",
    "buckets",
    "stage1",
    "steps",
    "stage2",
    "streamed_tars",
    "accuracy",
    "methods",
    "study",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller measurements, to try it out")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--logits", type=Path, default=None, help="an .npz of real logits, for codecs and peers")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON files")
    args = parser.parse_args()
    outcomes = [run(name, args) for name in args.only]
    print("\n".join(["", "benchmark   seconds  outcome", *outcomes]))
    sys.exit(any("failed" in outcome for outcome in outcomes))


def run(name: str, args: argparse.Namespace) -> str:
    """Run one script; one line with its time and outcome."""
    target = args.out / f"{name}.json"
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(target)]
    command += ["--quick"] if args.quick else []
    command += [str(args.logits)] if args.logits is not None and name == "codecs" else []
    command += ["--logits", str(args.logits)] if args.logits is not None and name == "peers" else []
    print(f"\n== {name} ==", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    outcome = f"failed with exit code {code}" if code else f"{len(json.loads(target.read_text())['rows'])} rows"
    return f"{name:<10} {time.monotonic() - start:>8.0f}  {outcome}"


if __name__ == "__main__":
    main()
