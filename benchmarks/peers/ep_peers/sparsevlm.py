"""SparseVLM (arXiv 2410.04417): the tokens that the text which looks at the picture attends to.

Only the ranking. The paper picks its raters by the similarity of text and visual embeddings in
front of the decoder; here they are picked by attention in layer K-1, which a selector can see,
among all tokens behind the picture. Ranks per layer, token recycling and merging are left out.
"""

import torch

from ep_core.selectors import Selector, SpanInputs, top_k


def select(inputs: SpanInputs, k: int) -> torch.Tensor:
    """Raters are tokens behind the picture that attend to it at least as much as their mean does.

    Score: attention probability of the raters in layer K-1, mean over raters and heads.
    """
    assert inputs.attention is not None
    attention = inputs.attention.double().mean(dim=0)  # [T, N]
    relevance = attention.sum(dim=1)
    # as a product: picking rows would make a GPU wait for their number
    return top_k((relevance >= relevance.mean()).double() @ attention, k)


SELECTOR = Selector(
    "sparsevlm-style",
    "most attended to by the text that looks at the picture",
    frozenset({"attention"}),
    select,
)
