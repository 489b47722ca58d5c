"""DART (arXiv 2502.11494): a few pivots, and the tokens that repeat them least.

The paper takes pivots by the norm of their keys, among visual and text tokens, and reports that the
choice matters little; here they are visual tokens by the norm of their queries.
"""

import torch

from ep_core.entropy import cosine_gram
from ep_core.selectors import Selector, SpanInputs, top_k

PIVOTS = 8


def select(inputs: SpanInputs, k: int) -> torch.Tensor:
    """Keep the pivots; then each pivot in turn takes an equal share of what is left to keep: the
    tokens that are not taken yet and have the smallest cosine with it.
    """
    assert inputs.queries is not None
    assert inputs.hidden is not None
    pivots = min(PIVOTS, k)
    taken = top_k(inputs.queries.double().flatten(1).abs().sum(dim=1), pivots)
    cosine = cosine_gram(inputs.hidden).nan_to_num(1.0)  # no direction: a repetition of everything
    for i, row in enumerate(cosine[taken]):
        share = (k - pivots) * (i + 1) // pivots - (k - pivots) * i // pivots
        novelty = (-row).index_fill(0, taken, -torch.inf)
        taken = torch.cat((taken, top_k(novelty, share)))
    return taken.sort().values


SELECTOR = Selector(
    "dart", "pivots, and what repeats them least", frozenset({"queries", "hidden"}), select
)
