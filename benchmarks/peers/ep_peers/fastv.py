"""FastV (arXiv 2403.06764): the tokens that the prompt's last token attends to most.

As its released code has it. Each picture is ranked by itself; the code ranks all of them together.
"""

import torch

from ep_core.selectors import Selector, SpanInputs, top_k


def select(inputs: SpanInputs, k: int) -> torch.Tensor:
    """Score: attention probability of the last prompt token in layer K-1, mean over the heads."""
    assert inputs.attention is not None
    return top_k(inputs.attention[:, -1].double().mean(dim=0), k)


SELECTOR = Selector(
    "fastv", "most attended to by the prompt's last token", frozenset({"attention"}), select
)
