"""Matrix entropy in Triton, one program a token.

Compiled for GPUs and run by Triton's interpreter (tests/triton), never yet run on a GPU:
`ep_core.kernels.cuda` compares it with torch on a device before it is used there.

The steps are those of csrc/scorer.cpp (docs/kernels.md) but for centring: heads are centred and
scaled in float64, which on a GPU costs little beside the reduction and needs no second path for
numbers that float32 cannot hold. The Gram product is float32 in IEEE arithmetic, never TF32.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ep_core.kernels import rational

NORMALIZE = {"none": 0, "rows": 1, "trace": 2}


def matrix_entropy(q: torch.Tensor, normalize: str) -> torch.Tensor:
    """`[N, H <= 64, D <= 256]` queries with any strides to `[N]` float32 scores; no host sync."""
    tokens, heads, width = q.shape
    scores = torch.empty(tokens, dtype=torch.float32, device=q.device)
    if tokens:
        with torch.cuda.device_of(q):  # where Triton launches
            _score[(tokens,)](
                q,
                scores,
                _coefficients(q.device),
                *q.stride(),
                HEADS=heads,
                WIDTH=width,
                ROWS=max(16, triton.next_power_of_2(heads)),
                SLICE=32,
                POLES=len(rational.POLES),
                NORMALIZE=NORMALIZE[normalize],
                num_warps=1 if heads <= 32 else 4,
            )
    return scores


@cache
def _coefficients(device: torch.device) -> torch.Tensor:
    """Of ep_core/kernels/rational.py; in memory, because a float argument would become float32."""
    values = [*rational.POLES, *rational.WEIGHTS, rational.LINEAR, rational.SQUARE]
    return torch.tensor(values, dtype=torch.float64, device=device)


@triton.jit
def _centred(
    start, token_stride, head_stride, width_stride, column, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr
):  # fmt: skip # a line for each argument is a page
    """Columns [column, column + SLICE) of a token's heads, centred, float64; zeros outside."""
    row = tl.arange(0, ROWS)[:, None]
    col = column + tl.arange(0, SLICE)[None, :]
    there = (row < HEADS) & (col < WIDTH)
    x = tl.load(start + row * head_stride + col * width_stride, mask=there, other=0.0)
    x = x.to(tl.float64)
    return tl.where(there, x - tl.sum(x, 0)[None, :] / HEADS, 0.0)


@triton.jit
def _score(
    q, scores, coefficients, token_stride, head_stride, width_stride, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr, POLES: tl.constexpr,
    NORMALIZE: tl.constexpr
):  # fmt: skip # a line for each argument is a page
    token = tl.program_id(0).to(tl.int64)
    start = q + token * token_stride
    row = tl.arange(0, ROWS)
    column = tl.arange(0, ROWS)
    same = row[:, None] == column[None, :]

    norms = tl.zeros([ROWS], tl.float64)  # squared
    for first in range(0, WIDTH, SLICE):
        x = _centred(
            start, token_stride, head_stride, width_stride, first, HEADS, WIDTH, ROWS, SLICE
        )
        norms += tl.sum(x * x, 1)
    divisor = tl.full([ROWS], 1.0, tl.float64)  # of the squares of each row
    if NORMALIZE == 1:
        divisor = tl.where(norms == 0, 1.0, norms)  # a NaN stays one
        norms /= divisor
    total = tl.sum(norms, 0)
    usable = (total > 0) & (total < float("inf"))
    scale = 1 / tl.sqrt(divisor * tl.where(usable, total, 1.0))

    a = tl.zeros([ROWS, ROWS], tl.float32)  # the Gram matrix at unit trace
    for first in range(0, WIDTH, SLICE):
        x = _centred(
            start, token_stride, head_stride, width_stride, first, HEADS, WIDTH, ROWS, SLICE
        )
        x = tl.where(usable, x * scale[:, None], 0.0).to(tl.float32)
        a += tl.dot(x, tl.trans(x), input_precision="ieee")

    # Householder, from the last row up; see tridiagonalise in csrc/scorer.cpp
    diagonal = tl.zeros([ROWS], tl.float32)
    beside = tl.zeros([ROWS], tl.float32)  # squared; [i] couples i and i + 1
    for step in range(0, HEADS - 1):
        m = HEADS - 1 - step
        last = tl.sum(tl.where(column[None, :] == m, a, 0.0), 1)
        corner = tl.sum(tl.where(row == m, last, 0.0), 0)
        alpha = tl.sum(tl.where(row == m - 1, last, 0.0), 0)
        squares = tl.sum(tl.where(row < m - 1, last * last, 0.0), 0)
        turn = squares > 1e-30
        norm = tl.sqrt(alpha * alpha + squares)
        beta = tl.where(alpha > 0, -norm, norm)
        length = tl.where(turn, norm * (norm + tl.abs(alpha)), 1.0)
        tau = tl.where(turn, 1.0 / length, 0.0)
        v = tl.where(row == m - 1, alpha - beta, tl.where(row < m - 1, last, 0.0))
        # the same numbers laid out along the other axis: a second reading of a, whose halves
        # rounding has made different, would let the difference grow
        v_across = tl.sum(tl.where(same, v[:, None], 0.0), 0)
        p = tl.where(row < m, tau * tl.sum(a * v_across[None, :], 1), 0.0)
        w = p - 0.5 * tau * tl.sum(p * v, 0) * v
        w_across = tl.sum(tl.where(same, w[:, None], 0.0), 0)
        a -= v[:, None] * w_across[None, :] + w[:, None] * v_across[None, :]
        diagonal = tl.where(row == m, corner, diagonal)
        beside = tl.where(row == m - 1, alpha * alpha + squares, beside)
    corner = tl.sum(tl.sum(tl.where(same & (row[:, None] == 0), a, 0.0), 1), 0)
    diagonal = tl.where(row == 0, corner, diagonal)

    # see entropy in csrc/scorer.cpp; here the poles lie side by side
    d = diagonal.to(tl.float64)
    b = beside.to(tl.float64)
    linear = tl.load(coefficients + 2 * POLES)
    square = tl.load(coefficients + 2 * POLES + 1)
    entropy = linear * tl.sum(d, 0) + square * (tl.sum(d * d, 0) + 2 * tl.sum(b, 0))
    pole = tl.load(coefficients + tl.arange(0, POLES))
    weight = tl.load(coefficients + POLES + tl.arange(0, POLES))
    inverse = tl.zeros([POLES], tl.float64)
    slope = tl.zeros([POLES], tl.float64)
    resolvent = tl.zeros([POLES], tl.float64)
    for i in range(0, HEADS):
        here = tl.sum(tl.where(row == i, d, 0.0), 0)
        ratio = tl.sum(tl.where(row == i - 1, b, 0.0), 0) * inverse
        inverse = 1 / tl.maximum(here + pole - ratio, pole)
        slope = tl.minimum((1 + ratio * slope) * inverse, 1 / pole)
        resolvent += slope
    entropy = -(entropy + tl.sum(weight * (HEADS - pole * resolvent), 0))

    trace = total / HEADS
    if NORMALIZE != 2:
        entropy = trace * (entropy - tl.log(tl.where(usable, trace, 1.0)))
    top = tl.log(tl.full([], HEADS, tl.float64))
    score = tl.where(usable, entropy / top, 0.0)
    score = tl.where(total < float("inf"), score, -float("inf"))  # NaN too
    tl.store(scores + token, score.to(tl.float32))
