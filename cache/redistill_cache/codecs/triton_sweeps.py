"""The sweeps of shaped rounding on CUDA, as two Triton kernels with one program for each row.

Triton comes with torch on Linux. Without it, `rounding.ArraySweeps` does the same in some thousand small kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from redistill_cache.codecs.rounding import CLASSES, ESCAPE_BITS, Curvature, ShapingConstants, Swept

__all__ = ["TritonSweeps"]

# Coefficients that one step of a sum over the triangle covers.
BLOCK = 128


class TritonSweeps:
    """`rounding.Sweeps` on a CUDA device."""

    def forward(self, constants: ShapingConstants, of: Curvature) -> Swept:
        shape = (len(of.chosen), constants.count)
        u, g = (of.sharp.new_empty((*shape, CLASSES)) for _ in range(2))
        free = of.sharp.new_empty(shape)
        grid = (len(of.chosen),)
        _forward[grid](
            constants.orthonormal, of.chosen.contiguous(), of.sharp, of.scale, u, g, free, constants.count, M=CLASSES
        )
        return u, g, free

    def backward(
        self, constants: ShapingConstants, swept: Swept, index: torch.Tensor, steps: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        k, errors = torch.empty_like(steps), torch.empty_like(steps)
        # By rows of the triangle, so that the loads of a sum are contiguous.
        triangle = constants.columns.t().contiguous()
        tables = constants.first_bit, constants.next_bit, constants.lowest, constants.highest
        _backward[(len(index),)](
            *swept, index, steps, level, triangle, *tables, k, errors, constants.count, constants.bit_price,
            M=CLASSES, BLOCK=BLOCK, ESCAPE=2.0 * ESCAPE_BITS,
        )  # fmt: skip
        return k


@triton.jit
def _forward(orthonormal, chosen, sharp, scale, u_all, g_all, free_all, count, M: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, M)
    classes = tl.load(chosen + row * M + m)
    probability, factor = tl.load(sharp + row * M + m), tl.load(scale + row * M + m)
    inverse = (m[:, None] == m[None, :]).to(tl.float64)
    for j in range(count):
        vector = tl.load(orthonormal + classes * count + j)
        u = (vector - tl.sum(vector * probability, 0)) * factor
        v = tl.sum(inverse * u[None, :], 1)
        free = 1.0 + tl.sum(u * v, 0)
        g = v / free
        at = (row * count + j) * M + m
        tl.store(u_all + at, u)
        tl.store(g_all + at, g)
        tl.store(free_all + row * count + j, free)
        inverse -= v[:, None] * g[None, :]


@triton.jit
def _backward(
    u_all, g_all, free_all, index, steps, levels, triangle, first_bit, next_bit, lowest, highest, k, errors, count,
    bit_price, M: tl.constexpr, BLOCK: tl.constexpr, ESCAPE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row, level = tl.load(index + at), tl.load(levels + at).to(tl.int64)
    m, b = tl.arange(0, M), tl.arange(0, BLOCK)
    s = tl.zeros((M,), tl.float64)
    for back in range(count):
        j = count - 1 - back
        place = (row * count + j) * M + m
        u, g = tl.load(u_all + place), tl.load(g_all + place)
        parts = tl.zeros((BLOCK,), tl.float64)
        for start in range(j + 1, count, BLOCK):
            i = start + b
            inside = i < count
            triangle_part = tl.load(triangle + j * count + i, mask=inside, other=0.0)
            parts += triangle_part * tl.load(errors + at * count + i, mask=inside, other=0.0)
        carried = tl.sum(parts, 0)
        scale, x = tl.load(triangle + j * count + j), tl.load(steps + at * count + j)
        target = x - (tl.sum(g * s, 0) + carried) / scale
        price = bit_price / (2.0 * tl.load(free_all + row * count + j) * scale * scale)
        size = tl.abs(target)
        saved = tl.minimum(tl.maximum(price * tl.load(next_bit + level * count + j), 0.0), 0.5)
        nearest = tl.floor(size + 0.5 - saved)
        nearest = tl.where(
            (nearest == 1.0) & (size < 0.5 + price * tl.load(first_bit + level * count + j)), 0.0, nearest
        )
        nearest = tl.where(target < 0, -nearest, nearest)
        low, high = tl.load(lowest + j), tl.load(highest + j)
        within = tl.minimum(tl.maximum(nearest, low), high)
        extra = (within - target) * (within - target) - (nearest - target) * (nearest - target)
        nearest = tl.where(extra < price * ESCAPE, within, nearest)
        error = nearest - x
        tl.store(k + at * count + j, nearest)
        tl.store(errors + at * count + j, error)
        tl.debug_barrier()  # the errors of this row are read again
        s += u * (scale * error + carried)
