"""Selectors: given one span's tensors and a count, which tokens stay.

Built in are three per-token scores with top-k (`released`, `rows`, `trace`) and one greedy set
selection (`set-entropy`). Others come through the hook `entropyprune_selectors`.
"""

from __future__ import annotations

from functools import partial

import torch

from ep_core import kernels
from ep_core.entropy import Normalize, cosine_gram, matrix_entropy
from ep_core.hookspecs import hookimpl
from ep_core.selection import Need, Selector, SpanInputs

__all__ = [
    "Need",
    "Selector",
    "SpanInputs",
    "entropyprune_selectors",
    "greedy_renyi2",
    "top_k",
]


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest scores, ties to the lowest index, ascending.

    `torch.topk` promises no order among ties, so this sorts stably.

    Args:
        scores: `[N]`, no NaN; `-inf` ranks last.
        k: 1 <= k <= N.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:k].sort().values


def greedy_renyi2(hidden: torch.Tensor, k: int) -> torch.Tensor:
    """The greedy maximiser of the set's Renyi-2 matrix entropy, `[k]` ascending indices.

    With G the cosine Gram matrix: start with the token whose summed squared cosine to all tokens
    is smallest, then add the token with the smallest summed squared cosine to the kept set. Each
    step maximises `-ln tr((G_S / |S|)^2)` over the sets that extend the one before. Ties go to
    the lowest index; tokens without a direction (zero, NaN, infinite) are picked last.

    Args:
        hidden: `[N, d]` hidden states.
        k: 1 <= k <= N.
    """
    return kernels.greedy_renyi2(cosine_gram(hidden), k)


def _top_entropy(inputs: SpanInputs, k: int, normalize: Normalize) -> torch.Tensor:
    assert inputs.queries is not None
    return top_k(matrix_entropy(inputs.queries, normalize), k)


def _set_entropy(inputs: SpanInputs, k: int) -> torch.Tensor:
    assert inputs.hidden is not None
    return greedy_renyi2(inputs.hidden, k)


@hookimpl
def entropyprune_selectors() -> list[Selector]:
    """The selectors that ship with the core."""
    queries: frozenset[Need] = frozenset({"queries"})
    return [
        Selector(
            "released",
            "matrix entropy of the queries, no normalisation: the paper's released code",
            queries,
            partial(_top_entropy, normalize="none"),
        ),
        Selector(
            "rows",
            "matrix entropy of row-normalised queries: the paper's text",
            queries,
            partial(_top_entropy, normalize="rows"),
        ),
        Selector(
            "trace",
            "matrix entropy of trace-normalised queries",
            queries,
            partial(_top_entropy, normalize="trace"),
        ),
        Selector(
            "set-entropy",
            "the subset with the largest Renyi-2 matrix entropy of hidden states, greedily",
            frozenset({"hidden"}),
            _set_entropy,
        ),
    ]
