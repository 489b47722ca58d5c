"""The scores and the greedy set in torch: what the fused kernels must equal, for any device.

Matrix products run in float64, which no TF32 or bfloat16 matmul switch reaches: the same input
gives the same ranking whatever the host has set.
"""

from __future__ import annotations

import math

import torch

RELEASED_EIGENVALUE_FLOOR = 1e-10
BLOCK = 2**22  # numbers in one float64 tensor of the scorer, 32 MiB: a video has many tokens
ALIGNED = 16  # tokens: an eigenvalue's last bit depends on where in a cache line its matrix begins


def matrix_entropy(
    q: torch.Tensor,
    normalize: str,
    *,
    released: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`[N, H, D]` queries to `[N]` float32 scores, a block of tokens at a time.

    Args:
        q: checked queries, any floating dtype.
        normalize: see `ep_core.entropy.matrix_entropy`, which has the formula too.
        released: the arithmetic of the released code.
        dtype: of the eigenvalues.
    """
    _, heads, head_dim = q.shape
    block = max(ALIGNED, BLOCK // (heads * max(heads, head_dim)) // ALIGNED * ALIGNED)
    return torch.cat([_scores(part, normalize, released, dtype) for part in torch.split(q, block)])


def _scores(q: torch.Tensor, normalize: str, released: bool, dtype: torch.dtype) -> torch.Tensor:
    heads = q.shape[1]
    if released:
        x = (q - q.mean(dim=1, keepdim=True)).double()
    else:
        x = q.double()
        # not mean(): CUDA multiplies by a rounded 1/H, which leaves noise where heads are alike
        x = x - x.sum(dim=1, keepdim=True) / heads
    if normalize == "rows":
        x = unit_rows(x)
    gram = x @ x.mT / heads  # [N, H, H]
    finite = gram.diagonal(dim1=1, dim2=2).sum(dim=1).isfinite()
    # eigvalsh fails for the whole batch on one NaN
    gram = torch.where(finite[:, None, None], gram, 0.0)
    if released:
        spectrum = torch.linalg.eigvalsh(gram).clamp_min(RELEASED_EIGENVALUE_FLOOR)
        entropy = -(spectrum * spectrum.log()).sum(dim=1)
    else:
        entropy = gram_entropy(gram, unit_trace=normalize == "trace", dtype=dtype)
    score = entropy / math.log(heads)
    return torch.where(finite, score, -math.inf).float()


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit L2 norm; a zero row stays zero, a NaN stays one."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, x / norm)


def gram_entropy(gram: torch.Tensor, *, unit_trace: bool, dtype: torch.dtype) -> torch.Tensor:
    """`-sum(l ln l)` of each `[N, n, n]` float64 Gram matrix, `[N]` float64.

    The spectrum is taken at unit trace, where float32 eigenvalues are accurate, and scaled back
    by `S(T A) = T S(A) - T ln T`.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    scale = torch.where(trace > 0, trace, 1.0)
    spectrum = torch.linalg.eigvalsh((gram / scale[:, None, None]).to(dtype))
    spectrum = spectrum.double().clamp_min(0)  # rounding can leave a zero slightly negative
    entropy: torch.Tensor = -torch.special.xlogy(spectrum, spectrum).sum(dim=-1)
    if not unit_trace:
        entropy = trace * entropy - torch.special.xlogy(trace, trace)
    return entropy


def greedy_renyi2(gram: torch.Tensor, k: int) -> torch.Tensor:
    """The greedy set of `ep_core.selectors.greedy_renyi2` from the tokens' cosines.

    Args:
        gram: `[N, N]` float32 cosine Gram matrix, NaN where a token has no direction.
        k: 1 <= k <= N.

    Returns:
        `[k]` ascending int64 indices.
    """

    def similarity(rows: torch.Tensor) -> torch.Tensor:
        # In units of 2^-40 sums of up to 2^13 terms are exact in float64: their order, which
        # differs between devices, cannot move a pick.
        return (rows.double().square() * 2**40).round().nan_to_num()

    n = gram.shape[0]
    index = torch.arange(n, device=gram.device)
    unusable = gram.diagonal().isnan()
    # picked ranks behind everything, unusable behind every usable token; a few rows at a time,
    # for all of them in float64 are a lot of memory
    sums = torch.cat([similarity(rows).sum(dim=1) for rows in torch.split(gram, 1024)])
    cost = torch.where(unusable, torch.finfo(torch.float64).max, sums)
    kept = torch.empty(k, dtype=torch.int64, device=gram.device)
    picked = torch.zeros(n, dtype=torch.bool, device=gram.device)
    for step in range(k):
        cost = cost.masked_fill(picked, math.inf)
        best = torch.where(cost == cost.min(), index, n).min()  # lowest index, no host sync
        kept[step] = best
        picked = picked | (index == best)
        joined = similarity(gram.index_select(0, best[None]).squeeze(0))
        cost = torch.where(unusable, cost, joined if step == 0 else cost + joined)
    return kept.sort().values
