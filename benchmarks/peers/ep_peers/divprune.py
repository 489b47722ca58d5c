"""DivPrune (arXiv 2503.02175): the subset whose closest pair is farthest apart, greedily.

The paper prunes in front of the decoder; here the rows are the hidden states entering layer K.
"""

import torch

from ep_core.entropy import cosine_gram
from ep_core.selectors import Selector, SpanInputs


def select(inputs: SpanInputs, k: int) -> torch.Tensor:
    """Start with the token farthest from its nearest neighbour, then always add the token farthest
    from the nearest one kept; the distance is one minus the cosine.
    """
    assert inputs.hidden is not None
    distance = 1 - cosine_gram(inputs.hidden).nan_to_num(1.0)
    others = distance.clone().fill_diagonal_(torch.inf)
    kept = others.min(dim=1).values.argmax()[None]
    nearest = distance.index_select(0, kept).squeeze(0)  # by a 0-dim index a GPU waits
    for _ in range(k - 1):
        best = nearest.index_fill(0, kept, -torch.inf).argmax()[None]
        nearest = torch.minimum(nearest, distance.index_select(0, best).squeeze(0))
        kept = torch.cat((kept, best))
    return kept.sort().values


SELECTOR = Selector(
    "divprune", "greedily the largest smallest distance", frozenset({"hidden"}), select
)
