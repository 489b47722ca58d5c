"""The greedy set in Triton.

Compiled for GPUs and run by Triton's interpreter (tests/triton), never yet run on a GPU:
`ep_core.kernels.cuda` compares it with torch on a device before it is used there.

All k steps of a span run in one program, without the host. Arithmetic as in csrc/greedy.cpp:
squared cosines as integers in units of 2^-40, held in float64, so the picks are the torch code's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def greedy_renyi2(gram: torch.Tensor, k: int) -> torch.Tensor:
    """`[N <= 2^13, N]` float32 cosines, symmetric, to `[k]` ascending indices; no host sync."""
    n = len(gram)  # a program holds all costs in registers
    totals = torch.empty(n, dtype=torch.float64, device=gram.device)
    kept = torch.empty(k, dtype=torch.int64, device=gram.device)
    block = max(16, triton.next_power_of_2(n))
    with torch.cuda.device_of(gram):  # where Triton launches
        _totals[(n,)](gram, totals, *gram.stride(), n, BLOCK=block)
        # one program holds every token: more warps, or its registers do not last
        warps = min(32, max(8, block // 256))
        _pick[(1,)](gram, totals, kept, *gram.stride(), n, k, BLOCK=block, num_warps=warps)
    return kept.sort().values


@triton.jit
def _similarity(cosines):
    """Squares in units of 2^-40, rounded to even; 0 for NaN, of a token without direction."""
    cosines = cosines.to(tl.float64)
    squares = cosines * cosines * 1099511627776.0
    whole = (squares + 4503599627370496.0) - 4503599627370496.0
    return tl.where(cosines == cosines, whole, 0.0)


@triton.jit(do_not_specialize=["row_stride", "n"])
def _totals(gram, totals, row_stride, column_stride, n, BLOCK: tl.constexpr):
    """Each token's similarity to all; the largest float64 where it has no direction."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    row = tl.load(gram + i * row_stride + j * column_stride, mask=j < n, other=0.0)
    own = tl.load(gram + i * (row_stride + column_stride))
    last = tl.full([], 1.7976931348623157e308, tl.float64)
    tl.store(totals + i, tl.where(own == own, tl.sum(_similarity(row), 0), last))


@triton.jit(do_not_specialize=["row_stride", "n", "k"])
def _pick(gram, totals, kept, row_stride, column_stride, n, k, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    last = tl.full([BLOCK], 1.7976931348623157e308, tl.float64)
    cost = tl.load(totals + j, mask=j < n, other=float("inf"))
    start = tl.where(cost < last, 0.0, cost)  # once a token is kept: sums over what is kept
    picked = j >= n
    for step in range(0, k):
        cost = tl.where(picked, float("inf"), cost)
        best = tl.min(tl.where(cost == tl.min(cost, 0), j, BLOCK), 0)  # the lowest index
        tl.store(kept + step, best.to(tl.int64))
        picked = picked | (j == best)
        row = gram + best.to(tl.int64) * row_stride
        joined = _similarity(tl.load(row + j * column_stride, mask=j < n, other=0.0))
        cost = tl.where(step == 0, start, cost) + joined
