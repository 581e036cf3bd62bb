"""Fitting a codec to 21,841 classes, those of ImageNet-21k: python bench/wide_heads.py [--quick] [--json PATH]

The pilot has as many rows as stage 1 takes, and the head is known, as it is there; `--codec auto` chooses. Its logits
are h W' + b with random W: h is the direction of a class, and noise. Each number of features is a process of its own,
with one thread. `pilot_megabytes` are those of the logits; `peak_megabytes` include them, Python and its packages.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import harness
import numpy as np
import torch
from redistill_cache.codecs import CodecOptions, explain_codec

from redistill.caching.pilot import PILOT_ROWS, ROWS_PER_CLASS

CLASSES = 21_841
PIECE = 512


def measured(features: int, rows: int) -> dict[str, object]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    weight = rng.normal(0, features**-0.5, (CLASSES, features)).astype(np.float32)
    bias = rng.normal(0, 0.1, CLASSES).astype(np.float32)
    pilot = np.empty((rows, CLASSES), np.float32)
    for start in range(0, rows, PIECE):
        of = weight[rng.integers(CLASSES, size=min(PIECE, rows - start))]
        h = 12 * of + 1.5 * rng.normal(0, 1, of.shape).astype(np.float32)
        pilot[start : start + len(of)] = h @ weight.T + bias
    scored = pilot[:PIECE]
    start_cpu, start_wall = time.process_time(), time.monotonic()
    choice = explain_codec("auto", pilot, CodecOptions(head=(weight, bias)))
    fit = {"fit_cpu_seconds": time.process_time() - start_cpu, "fit_seconds": time.monotonic() - start_wall}
    peak = harness.peak_memory()
    codec = choice.best.codec
    codec.encode(scored[:64])
    start_cpu = time.process_time()
    encoded = codec.encode(scored)
    encode_seconds = time.process_time() - start_cpu
    return {
        "name": f"{CLASSES:,} classes, {features} features",
        "codec": codec.name,
        "rows": rows,
        "top_probability": float(torch.from_numpy(scored).softmax(1).amax(1).mean()),
        **fit,
        "goal_seconds": 60.0,
        "peak_megabytes": peak / 1e6,
        "goal_megabytes": 4000.0,
        "pilot_megabytes": pilot.nbytes / 1e6,
        "bytes_per_view": harness.written_bytes(codec, encoded),
        "max_kl": max(float(values.max()) for values in encoded.errors.values()),
        "encode_rows_per_second": PIECE / encode_seconds,
    }


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    least, most = PILOT_ROWS
    rows = least if args.quick else min(ROWS_PER_CLASS * CLASSES, most)
    table = []
    for features in (768, 1024):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            table.append(alone.submit(measured, features, rows).result())
    harness.report("wide_heads", table, args)


if __name__ == "__main__":
    main()
