"""Fitting the linear codec: a basis and a step from a pilot, the first rows a teacher said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from redistill_cache.codecs.basis import Basis, head_basis, principal_basis, quantize
from redistill_cache.codecs.checks import MAX_RANK
from redistill_cache.codecs.linear import LinearCodec
from redistill_cache.codecs.linear_encode import Policy
from redistill_cache.codecs.measure import Measure
from redistill_cache.codecs.packing import Packing
from redistill_cache.codecs.space import Space
from redistill_cache.codecs.synthesis import LEVELS_PER_OCTAVE, Synthesis

__all__ = ["fit_linear"]

# A row starts two octaves below the coarsest step, so that there is room both ways.
START_LEVEL = 2 * LEVELS_PER_OCTAVE
# The basis may add this share of the noise that rounding adds.
BASIS_NOISE = 0.01
# Rows on which the step is chosen.
STEP_ROWS = 512
STEP_ROUNDS = 6
# A coefficient outgrows its digits in this share of the rows at most; it costs an escape then.
ESCAPE_SHARE = 1e-4


def fit_linear(
    rows: np.ndarray,
    *,
    fidelity: float,
    metric: str,
    certified: bool,
    keep_shift: bool,
    rounding: str,
    head: tuple[np.ndarray, np.ndarray] | None,
    max_rank: int = 2048,
) -> LinearCodec:
    """A codec for rows like these (float32 [n, width], finite)."""
    policy: Any = Policy(metric, fidelity, certified, START_LEVEL, keep_shift, rounding)  # type: ignore[arg-type]
    seen, held = _split(rows)
    basis = _basis(seen, metric, head, min(max_rank, MAX_RANK))
    step = _first_step(held, basis, policy)
    for _ in range(STEP_ROUNDS):
        codec = _codec(basis, step, policy, held, "svd" if head is None else "head")
        change = _change(codec, held)
        step *= change
        if abs(np.log2(change)) < 0.02:
            break
    return _codec(basis, step, policy, held, codec.source)


def _split(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows for the basis, and rows it has not seen for the step; the same ones where there are too few."""
    count = len(rows)
    cut = count - count // 4
    seen, held = (rows[:cut], rows[cut:]) if count >= 16 else (rows, rows)
    return seen, held


def _basis(rows: np.ndarray, metric: str, head: tuple[np.ndarray, np.ndarray] | None, max_rank: int) -> Basis:
    shift_free = metric == "kl"
    centred = rows.astype(np.float64)
    if shift_free:
        centred -= centred.mean(1, keepdims=True)
    if head is not None:
        basis = head_basis(*head, centred, shift_free=shift_free)
    else:
        basis = principal_basis(centred, shift_free=shift_free, max_rank=max_rank)
    if len(basis.rows):
        return basis
    # One class, or a teacher that always says the same: a direction that is never used.
    return Basis(np.full((1, rows.shape[1]), rows.shape[1] ** -0.5), basis.offset, np.zeros(1))


def _first_step(held: np.ndarray, basis: Basis, policy: Policy) -> float:
    """The step at which uniform noise would use up the bound, to start from."""
    width = held.shape[1]
    if policy.metric == "kl":
        noise = 2.0 * policy.fidelity * width / 0.5
    else:
        noise = policy.fidelity**2 * float((held.astype(np.float64) ** 2).sum(1).mean())
    step = float(np.sqrt(12.0 * max(noise, 1e-300) / len(basis.rows)))
    return float(np.clip(step, 1e-20, 1e20))


def _codec(basis: Basis, step: float, policy: Policy, held: np.ndarray, source: str) -> LinearCodec:
    """The codec of a basis whose rows start at this step."""
    rank = len(basis.rows)
    integers, scale = quantize(basis, BASIS_NOISE**0.5 * step * (rank / 12.0) ** 0.5)
    steps = np.full(rank, step * 2.0 ** (START_LEVEL / LEVELS_PER_OCTAVE), np.float32)
    open_ended = Packing((1,) * rank, (1,) * rank)
    synthesis = Synthesis(integers, scale, steps, basis.offset.astype(np.float32), open_ended)
    measure = Measure(synthesis, policy.metric, policy.keep_shift, policy.rounding, Space())
    largest = np.abs(np.rint(measure.project(held) * 2.0 ** (START_LEVEL / LEVELS_PER_OCTAVE)))
    reach = np.quantile(largest, 1.0 - ESCAPE_SHARE, axis=0, method="higher")
    packing = Packing.covering(np.minimum(reach, 30000).astype(np.int64))
    return LinearCodec(replace(synthesis, packing=packing, _constants={}), policy, source)


def _change(codec: LinearCodec, held: np.ndarray) -> float:
    """By what factor the step should change for the mean error to meet the bound."""
    index = np.linspace(0, len(held) - 1, min(len(held), STEP_ROWS)).astype(np.int64)
    policy = codec.policy
    measure = Measure(codec.synthesis, policy.metric, policy.keep_shift, policy.rounding, Space())
    x = measure.project(held[index])
    attempt = measure.attempt(held[index], x, np.full(len(index), policy.level), np.arange(len(index)))
    mean = max(float(np.mean(np.minimum(e, 100 * policy.fidelity))) for e in attempt.errors.values())
    return float(np.clip((policy.fidelity / max(mean, 1e-30)) ** 0.5, 0.05, 20.0))
