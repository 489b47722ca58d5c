"""The subset that spans the largest volume: a log-determinant in place of set-entropy's objective.

Greedy maximisation of `ln det(X_S X_S^T)` over hidden states as they are, which is a QR
factorisation with column pivoting; with a kernel of one's own it is the usual inference in
determinantal point processes (Chen et al., arXiv 1709.05135).
"""

import torch

from ep_core.selectors import Selector, SpanInputs


def select(inputs: SpanInputs, k: int) -> torch.Tensor:
    """Always add the token with the longest residual outside the span of those kept.

    Lengths are not scaled away: a long hidden state counts for more. Where no residual is left, and
    for tokens that are not finite, the lowest index comes first.
    """
    assert inputs.hidden is not None
    rows = inputs.hidden.double()
    rows = torch.where(rows.isfinite().all(dim=1, keepdim=True), rows, 0)
    residual = rows.square().sum(dim=1)
    basis = rows.new_zeros(k, rows.shape[1])
    kept = torch.empty(k, dtype=torch.int64, device=rows.device)
    for step in range(k):
        best = residual.argmax()
        kept[step] = best
        row = rows.index_select(0, best[None]).squeeze(0)  # rows[best] would make a GPU wait
        row = row - basis.mT @ (basis @ row)
        basis[step] = row / row.norm().clamp_min(torch.finfo(row.dtype).tiny)
        residual = (residual - (rows @ basis[step]).square()).clamp_min(0)
        residual = residual.index_fill(0, kept[: step + 1], -1)
    return kept.sort().values


SELECTOR = Selector(
    "max-volume",
    "hidden states that span the largest volume, greedily",
    frozenset({"hidden"}),
    select,
)
