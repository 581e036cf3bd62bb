"""Codecs compared: bytes per view on disk, divergence from the teacher, error of gradients, speed.

    python bench/codecs.py [LOGITS.npz] [--classes 2,3,5,8] [--quick] [--json PATH]

LOGITS.npz holds sets of real logits: NAME_z [images, views, classes], or NAME_h [images, views, d] with NAME_W and
NAME_b where the logits are h W' + b. The demo's teacher on synthetic images is always measured
as well. A codec is fitted to the views of two thirds of the images and scored on those of the others.

With `--classes`, sets of few classes are made from these, and only the bytes of the certified codecs are measured.

Bytes are those of the shards of an archive, and of the side data shared by a million views. Gradients are those of
the power divergence with respect to a student of logits 0.7 z + noise; the error is relative, in the Euclidean norm,
averaged over rows. A truncated codec decodes the classes outside of the top k as one value. Seconds are CPU seconds of
one thread. Rows "zstd level N" have all arrays of the archive at that level (cache-teacher --zstd-level).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
import torch
from redistill_cache.codecs import Codec, Encoded, fit_codec, join_encoded, kl_rows
from redistill_cache.codecs.linear import LinearCodec

from redistill.devices import pick_device
from redistill.losses import power_divergence
from redistill.models import open_model
from redistill.teachers import Teacher

PIECE = 512
ZSTD_LEVELS = (1, 3, 9, 15, 17, 19)
# Goals in bytes per view at fidelity 1e-3, by set and certified.
GOALS = {("A", False): 28, ("B", False): 125, ("C", False): 165, ("A", True): 32, ("B", True): 150}


@dataclass(frozen=True)
class Logits:
    """Rows to fit on and rows to score, float32 [n, C]."""

    name: str
    pilot: np.ndarray
    scored: np.ndarray
    head: tuple[np.ndarray, np.ndarray] | None = None


def sets_of(path: Path, quick: bool) -> Iterator[Logits]:
    with np.load(path, allow_pickle=False) as arrays:
        for name in sorted({key.split("_")[0] for key in arrays}):
            head = None
            if f"{name}_h" in arrays:
                head = (arrays[f"{name}_W"].astype(np.float32), arrays[f"{name}_b"].astype(np.float32))
                values, project = arrays[f"{name}_h"], head
            else:
                values, project = arrays[f"{name}_z"], None
            split = len(values) * 2 // 3
            parts = []
            for part in (values[:split], values[split:]):
                rows = part.reshape(-1, part.shape[-1]).astype(np.float32)
                parts.append(rows if project is None else rows @ project[0].T + project[1])
            scored = parts[1][: 256 if quick else 4096]
            yield Logits(name, parts[0], scored, head)


def demo_logits(quick: bool) -> Logits:
    """The demo's teacher on synthetic images that it was not trained on."""
    from redistill.demo.run import TEACHER_NETWORK, TEACHER_WEIGHTS, VAL_DATA
    from redistill.sources.open_source import open_source

    source = open_source(VAL_DATA)
    count = 600 if quick else 2000
    pixels = np.stack([np.asarray(source.sample(i).payload) for i in range(count)]).transpose(0, 3, 1, 2)
    model = open_model(f"{TEACHER_NETWORK}&weights={TEACHER_WEIGHTS}")
    rows = Teacher(model, device=pick_device("cpu"))(torch.from_numpy(np.ascontiguousarray(pixels)))["logits"].numpy()
    split = count * 2 // 3
    return Logits("demo", rows[:split], rows[split:])


def few_classes(rows: Logits, count: int, seed: int) -> Iterator[Logits]:
    """Sets of `count` classes made from real logits: a subset of the classes, groups of classes, a trained classifier.

    The logit of a group is the log-sum-exp of its classes, which is what an exact coarse classifier outputs. The
    trained classifier is a linear softmax model on the real logits; its targets are the groups of the top classes.
    Each as it is and at twice the logits, for more confident teachers. A third is the pilot, the rest is scored.
    """
    rng = np.random.default_rng(seed)
    real = np.concatenate([rows.pilot, rows.scored])
    group = rng.permutation(real.shape[1]) % count
    made = {
        "subset": real[:, rng.permutation(real.shape[1])[:count]],
        "groups": np.stack([np.logaddexp.reduce(real[:, group == g], axis=1) for g in range(count)], axis=1),
        "trained": trained_logits(real, group[real.argmax(1)], count, seed),
    }
    for kind, values in made.items():
        for scale in (1, 2):
            scaled = (scale * values).astype(np.float32)[rng.permutation(len(values))]
            split = len(values) // 3
            yield Logits(f"{rows.name}, {kind}, x{scale}", scaled[:split], scaled[split:])


def trained_logits(real: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Logits of a linear softmax model after 300 steps of Adam."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(real.shape[1], count)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        batch = torch.randint(len(real), (256,)).numpy()
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(real[batch])), torch.tensor(labels[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.asarray(model(torch.tensor(real)).detach().numpy())


def score_few(rows: Logits, seed: int) -> dict[str, object]:
    """Bytes per view of the certified codecs at fidelity 1e-3, and their largest error; speeds are not measured."""
    logits = torch.from_numpy(rows.scored)
    result: dict[str, object] = {"set": rows.name, "classes": logits.shape[1], "seed": seed, "rows": len(logits)}
    for t in (1, 4):
        result[f"mean_top_probability_t{t}"] = float((logits / t).softmax(1).amax(1).mean())
    for name in ("float16", "compander", "linear"):
        codec = fit_codec(name, rows.pilot)
        encoded = codec.encode(rows.scored)
        result[f"{name}_bytes"] = harness.written_bytes(codec, encoded)
        result[f"{name}_max_kl"] = max(float(values.max()) for values in encoded.errors.values())
    return result


def small_classes(sets: Sequence[Logits], counts: Sequence[int], seeds: int) -> Iterator[dict[str, object]]:
    """Rows of `--classes`."""
    for rows, count, seed in itertools.product(sets, counts, range(seeds)):
        if count <= rows.pilot.shape[1]:
            for made in few_classes(rows, count, seed):
                yield score_few(made, seed)


def zstd_trade(name: str, codec: Codec, encoded: Encoded) -> Iterator[dict[str, object]]:
    """Bytes per view, and microseconds of one thread to compress a row, by level of zstd."""
    for level in ZSTD_LEVELS:
        start = time.process_time()
        size = harness.written_bytes(codec, encoded, level)
        microseconds = 1e6 * (time.process_time() - start) / len(encoded)
        shared = {"set": name, "codec": f"linear, zstd level {level}", "fidelity": 1e-3, "certified": True}
        yield {**shared, "bytes_per_view": size, "zstd_us_per_row": microseconds}


def gradient_error(exact: np.ndarray, stored: np.ndarray, temperature: float) -> float:
    """Mean over rows of |gradient with stored logits - gradient with exact logits| / |gradient with exact logits|."""
    noise = np.random.default_rng(0).normal(0, 1, exact.shape)
    gradients = []
    for rows in (exact, stored):
        student = torch.tensor(0.7 * exact + noise, dtype=torch.float64, requires_grad=True)
        teacher = torch.tensor(rows, dtype=torch.float64)
        power_divergence(student, teacher, temperature=temperature, reduction="none").sum().backward()
        assert student.grad is not None
        gradients.append(student.grad)
    true, approximate = gradients
    return float(((approximate - true).norm(dim=1) / true.norm(dim=1).clamp_min(1e-30)).mean())


def decode_and_bare_product(codec: Codec, encoded: Encoded, batch: int) -> tuple[float, float]:
    """CPU seconds per row to decode a batch, and for a float32 product of its shape: in turns, the least of each."""
    rank = codec.decoder.rank if isinstance(codec, LinearCodec) else 1
    left, right = np.ones((batch, rank), np.float32), np.ones((rank, codec.width), np.float32)
    arrays = {name: np.ascontiguousarray(array[:batch]) for name, array in encoded.arrays.items()}
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(20):
        for times, work in zip(seconds, (lambda: codec.decode(arrays), lambda: left @ right), strict=True):
            start = time.process_time()
            work()
            times.append((time.process_time() - start) / batch)
    return min(seconds[0]), min(seconds[1])


def in_pieces(codec: Codec, rows: Logits) -> Encoded:
    starts = range(0, len(rows.scored), PIECE)
    return join_encoded([codec.encode(rows.scored[at : at + PIECE]) for at in starts])


def score(rows: Logits, name: str, fidelity: float | None, certified: bool, codec: Codec) -> dict[str, object]:
    codec.encode(rows.scored[:64])  # constants of the encoder, compiled loops
    start = time.process_time()
    encoded = in_pieces(codec, rows)
    encode_seconds = time.process_time() - start
    stored = np.asarray(codec.decode(encoded.arrays))
    decode_seconds, bare_seconds = decode_and_bare_product(codec, encoded, min(PIECE, len(rows.scored)))
    one, four = (kl_rows(rows.scored, stored, t) for t in (1.0, 4.0))
    first = slice(0, 512)
    return {
        "set": rows.name,
        "codec": name,
        "fidelity": fidelity,
        "certified": certified,
        "bytes_per_view": harness.written_bytes(codec, encoded),
        "goal": GOALS.get((rows.name, certified)) if name == "linear" and fidelity == 1e-3 else None,
        "mean_kl_t1": float(np.mean(one)),
        "mean_kl_t4": float(np.mean(four)),
        "p99_kl_t1": float(np.quantile(one, 0.99)),
        "max_kl_t1": float(np.max(one)),
        "max_kl_t4": float(np.max(four)),
        "top1": float((stored.argmax(1) == rows.scored.argmax(1)).mean()),
        "grad_error_t1": gradient_error(rows.scored[first], stored[first], 1.0),
        "grad_error_t4": gradient_error(rows.scored[first], stored[first], 4.0),
        "encode_rows_per_second": len(rows.scored) / encode_seconds,
        "decode_rows_per_second": 1 / decode_seconds,
        "bare_product_over_decode": bare_seconds / decode_seconds if isinstance(codec, LinearCodec) else None,
    }


def candidates(rows: Logits, quick: bool) -> Iterator[tuple[str, float | None, bool, Codec]]:
    """(name, fidelity, certified, codec). The fidelity 7e-5 keeps the gradient error at T = 4 below 0.02."""
    width = rows.pilot.shape[1]
    yield "float16", None, True, fit_codec("float16", rows.pilot)
    for k in (10, 100):
        if k < width:
            yield f"top-{k}", None, False, fit_codec("topk", rows.pilot, k=k)
    if width <= 256:
        yield "compander", 1e-3, True, fit_codec("compander", rows.pilot)
    for fidelity in (1e-3,) if quick else (1e-2, 1e-3, 1e-4, 7e-5):
        for certified in (False, True):
            yield "linear", fidelity, certified, fit_codec("linear", rows.pilot, fidelity=fidelity, certified=certified)
    if not quick:
        plain = fit_codec("linear", rows.pilot, rounding="plain")
        yield "linear, plain rounding", 1e-3, True, plain
        if rows.head is not None:
            for certified in (False, True):
                codec = fit_codec("linear", rows.pilot, certified=certified, head=rows.head)
                yield "linear, axes of the head", 1e-3, certified, codec


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("logits", type=Path, nargs="?", default=None, help="sets of real logits (.npz)")
    parser.add_argument("--classes", metavar="N,N", help="measure bytes only, on sets with these numbers of classes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sets = [demo_logits(args.quick), *(sets_of(args.logits, args.quick) if args.logits is not None else ())]
    if args.classes is not None:
        counts = [int(text) for text in args.classes.split(",")]
        harness.report("small_classes", list(small_classes(sets, counts, 1 if args.quick else 2)), args)
        return
    rows = []
    for one in sets:
        start = time.process_time()
        for name, fidelity, certified, codec in candidates(one, args.quick):
            fit_seconds = time.process_time() - start
            rows.append(score(one, name, fidelity, certified, codec) | {"fit_seconds": fit_seconds})
            print(harness.table(rows[-1:]).splitlines()[-1], flush=True)
            if (name, fidelity, certified) == ("linear", 1e-3, True):
                rows.extend(zstd_trade(one.name, codec, in_pieces(codec, one)))
            start = time.process_time()
    print()
    harness.report("codecs", rows, args)


if __name__ == "__main__":
    main()
