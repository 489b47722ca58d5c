"""Selectors: given one span's tensors and a count, which tokens stay.

Built in are three per-token scores with top-k (`released`, `rows`, `trace`) and one greedy set
selection (`set-entropy`). Others come through the hook `entropyprune_selectors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch

from ep_core import kernels
from ep_core.entropy import Normalize, cosine_gram, matrix_entropy
from ep_core.errors import EntropyPruneError, PluginError
from ep_core.hookspecs import hookimpl
from ep_core.policy import METHOD_NAME

Need = Literal["queries", "hidden", "attention"]


@dataclass(frozen=True)
class SpanInputs:
    """What a selector may read of one span of N tokens; only what it needs is set.

    Attributes:
        queries: `[N, H, D]` query states of layer K-1 at the projection, before RoPE.
        hidden: `[N, d]` hidden states entering layer K.
        attention: `[H, T, N]` attention probabilities in layer K-1 of the prompt's T tokens behind
            the span. Only engines that compute attention maps have them, and what depends on the
            tokens behind a picture cannot be cached with the picture.
    """

    queries: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    attention: torch.Tensor | None = None

    @property
    def tokens(self) -> int | None:
        """N, the smallest where the inputs differ; None where none is set."""
        sizes = [len(tensor) for tensor in (self.queries, self.hidden) if tensor is not None]
        if self.attention is not None:
            sizes.append(self.attention.shape[2])
        return min(sizes, default=None)


@dataclass(frozen=True)
class Selector:
    """A pruning method by name.

    Attributes:
        name: what `method=` says in a policy.
        summary: one line for `entropyprune list`.
        needs: the fields of `SpanInputs` that `select` reads.
        select: `(inputs of one span, k) -> [k]` int64 indices, ascending.
    """

    name: str
    summary: str
    needs: frozenset[Need]
    select: Callable[[SpanInputs, int], torch.Tensor]

    def __post_init__(self) -> None:
        if not METHOD_NAME.fullmatch(self.name):
            raise PluginError(f"selector name {self.name!r}: use letters, digits, '.', '-', '_'")
        if unknown := self.needs - set(get_args(Need)):
            raise PluginError(
                f"selector {self.name!r} needs {sorted(unknown)[0]!r}; there are "
                f"{', '.join(get_args(Need))}"
            )

    def __call__(self, inputs: SpanInputs, k: int) -> torch.Tensor:
        """Select, and check that the answer is k ascending indices of the span.

        The indices themselves are checked on the CPU only: elsewhere it would wait for the device.
        """
        for need in self.needs:
            if getattr(inputs, need) is None:
                raise EntropyPruneError(f"selector {self.name!r} needs {need}, none were given")
        n = k if inputs.tokens is None else inputs.tokens
        if not 1 <= k <= n:
            raise EntropyPruneError(f"cannot keep {k} of the {n} tokens of a span")
        kept = self.select(inputs, k)
        if kept.shape != (k,) or kept.dtype != torch.int64:
            raise EntropyPruneError(
                f"selector {self.name!r} returned {list(kept.shape)} {kept.dtype}, "
                f"expected [{k}] torch.int64"
            )
        if kept.device.type == "cpu" and not (
            kept[0] >= 0 and kept[-1] < n and bool((kept.diff() > 0).all())
        ):
            raise EntropyPruneError(
                f"selector {self.name!r} returned {kept.tolist()}, expected ascending indices "
                f"below {n}"
            )
        return kept


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
    gram = cosine_gram(hidden)
    kept = kernels.greedy_renyi2(gram, k)
    return greedy_renyi2_torch(gram, k) if kept is None else kept


def greedy_renyi2_torch(gram: torch.Tensor, k: int) -> torch.Tensor:
    """The same from the cosine Gram matrix `[N, N]`, NaN where there is no direction."""

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
