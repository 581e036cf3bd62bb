"""Fitting the linear codec to a pilot, the first rows a teacher said: a basis, then a step, then digits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from redistill_cache.codecs.basis import Basis, head_basis, principal_basis, quantize
from redistill_cache.codecs.linear import LinearCodec
from redistill_cache.codecs.linear_encode import search_coefficients
from redistill_cache.codecs.measure import LARGEST_VALUE, Measure
from redistill_cache.codecs.packing import Packing
from redistill_cache.codecs.packing_fit import fit_packing
from redistill_cache.codecs.policy import Policy
from redistill_cache.codecs.space import Space
from redistill_cache.codecs.synthesis import LEVELS_PER_OCTAVE, Synthesis

__all__ = ["fit_linear"]

# A row starts two octaves below the coarsest step, so that there is room both ways.
START_LEVEL = 2 * LEVELS_PER_OCTAVE
# The basis may add this share of the noise that rounding adds.
BASIS_NOISE = 0.01
# Rows on which the step is chosen, and on which digits are.
STEP_ROWS, DIGIT_ROWS = 384, 1536
STEP_ROUNDS = 7
DIGIT_ROUNDS = 2
# Where the mean error of the pilot is put, so that other rows meet the bound in the mean too.
AIM_OF_MEAN, AIM_OF_CERTIFIED = 0.93, 0.8
MAX_RANK = 2048
# Of errors at T = 1 against errors at T = 4, in what the encoder decides.
LEAST_WEIGHT, MOST_WEIGHT, CERTIFIED_WEIGHT = 0.15, 4.0, 0.4


def fit_linear(rows: np.ndarray, policy: Policy, head: tuple[np.ndarray, np.ndarray] | None) -> LinearCodec:
    """A codec for rows like these (float32 [n, width], finite). `policy.level` is chosen here."""
    # What is beyond these is stored exactly whatever the basis.
    sane = rows[np.abs(rows).max(1) <= LARGEST_VALUE / 4]
    rows = sane if len(sane) else np.zeros((1, rows.shape[1]), np.float32)
    weight = CERTIFIED_WEIGHT if policy.certified else LEAST_WEIGHT
    policy = replace(policy, level=START_LEVEL, weight=weight)
    if policy.metric == "relative":
        size = float(np.mean(rows.astype(np.float64) ** 2) * rows.shape[1])
        policy = replace(policy, reference=float(np.clip(1.0 / max(size, 1e-70), 1e-70, 1e30)))
    # Steps and digits are chosen on rows the basis has not seen, where there are enough.
    held_out = len(rows) // 4 if len(rows) >= 16 and head is None else 0
    seen, held = rows[: len(rows) - held_out], rows[len(rows) - held_out :] if held_out else rows
    basis = _basis(seen, policy, head)
    probe = _spaced(held, STEP_ROWS)
    step = _first_step(probe, basis, policy)
    for _ in range(STEP_ROUNDS):
        means = _mean_errors(_synthesis(basis, step, policy, probe), policy, probe)
        change = _change(means, policy)
        step *= change
        policy = _balanced(means, policy)
        if abs(np.log2(change)) < 0.02:
            break
    synthesis = _synthesis(basis, step, policy, held)
    k = search_coefficients(synthesis, policy, _spaced(held, DIGIT_ROWS))
    synthesis = replace(synthesis, packing=fit_packing(k), _constants={})
    for _ in range(DIGIT_ROUNDS):
        # Digits are narrow, and keeping within them costs a little.
        synthesis = _rescaled(synthesis, _change(_mean_errors(synthesis, policy, probe), policy))
    return LinearCodec(synthesis, policy, "svd" if head is None else "head")


def _rescaled(synthesis: Synthesis, factor: float) -> Synthesis:
    step = (synthesis.step * factor).astype(np.float32)
    return replace(synthesis, step=step, spread=(synthesis.spread / factor).astype(np.float32), _constants={})


def _spaced(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(np.int64)]


def _basis(rows: np.ndarray, policy: Policy, head: tuple[np.ndarray, np.ndarray] | None) -> Basis:
    shift_free = policy.metric == "kl"
    centred = rows.astype(np.float64)
    if shift_free:
        centred -= centred.mean(1, keepdims=True)
    if head is not None:
        basis = head_basis(*head, centred, shift_free=shift_free)
    else:
        basis = principal_basis(centred, shift_free=shift_free, max_rank=MAX_RANK)
    if len(basis.rows):
        return basis
    # One class, or a teacher that always says the same: a direction that is never used.
    return Basis(np.full((1, rows.shape[1]), rows.shape[1] ** -0.5), basis.offset, np.zeros(1))


def _first_step(probe: np.ndarray, basis: Basis, policy: Policy) -> float:
    """The step at which white noise would use up the bound."""
    if policy.metric == "kl":
        noise = 4.0 * policy.fidelity * probe.shape[1]
    else:
        noise = policy.fidelity**2 * float((probe.astype(np.float64) ** 2).sum(1).mean())
    return float(np.clip(np.sqrt(12.0 * noise / len(basis.rows)), 1e-20, 1e20))


def _synthesis(basis: Basis, step: float, policy: Policy, held: np.ndarray) -> Synthesis:
    """Without digits yet: every coefficient escapes."""
    rank = len(basis.rows)
    integers, scale = quantize(basis, step * (BASIS_NOISE * rank / 12.0) ** 0.5)
    steps = np.full(rank, step * 2.0 ** (START_LEVEL / LEVELS_PER_OCTAVE), np.float32)
    offset = basis.offset.astype(np.float32)
    bare = Synthesis(integers, scale, steps, offset, np.ones(rank, np.float32), Packing.empty(rank))
    x, _ = Measure(bare, policy, Space()).project(held)
    return replace(bare, spread=np.abs(x).mean(0).astype(np.float32), _constants={})


def _mean_errors(synthesis: Synthesis, policy: Policy, probe: np.ndarray) -> dict[str, float]:
    """Of the pilot at its starting levels; a row that is far off does not decide."""
    measure = Measure(synthesis, policy, Space())
    x, _ = measure.project(probe)
    attempt = measure.attempt(probe, x, measure.start_levels(probe), np.arange(len(probe)))
    return {name: float(np.minimum(e, 100 * policy.fidelity).mean()) for name, e in attempt.errors.items()}


def _change(means: dict[str, float], policy: Policy) -> float:
    """By what factor the step should change for the errors to be where they are wanted."""
    aim = AIM_OF_CERTIFIED if policy.certified else AIM_OF_MEAN
    power = 0.5 if policy.metric == "kl" else 1.0
    return float(np.clip((aim * policy.fidelity / max(*means.values(), 1e-30)) ** power, 0.05, 20.0))


def _balanced(means: dict[str, float], policy: Policy) -> Policy:
    """Errors at T = 1 weigh more where it is they that use up the bound."""
    if policy.metric != "kl" or policy.certified:
        return policy
    excess = np.clip(means["kl_t1"] / max(means["kl_t4"], 1e-30), 0.25, 4.0) ** 0.7
    return replace(policy, weight=float(np.clip(policy.weight * excess, LEAST_WEIGHT, MOST_WEIGHT)))
