"""VisionZip (arXiv 2412.04467): the tokens that the vision tower attends to most.

Only its dominant tokens; it also merges the others. A tower with a [CLS] token would be read there;
Qwen2.5-VL's has none, and the paper then takes what a token receives from all others. Selectors see
the language model only, so the caller reads the tower and says which picture answers are about:

    received = ep_peers.tower.received_attention(model, pixel_values, grid)
    with looking_at(received):
        model.generate(...)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ep_core.errors import EntropyPruneError
from ep_core.selectors import Selector, SpanInputs, top_k

_seen: list[torch.Tensor] = []


@contextmanager
def looking_at(received: torch.Tensor) -> Iterator[None]:
    """Answers inside are about this picture: `[N]` from `ep_peers.tower`."""
    _seen.append(received)
    try:
        yield
    finally:
        _seen.pop()


def select(inputs: SpanInputs, k: int) -> torch.Tensor:
    """Score: attention received in the vision tower."""
    assert inputs.hidden is not None
    if not _seen or len(_seen[-1]) != len(inputs.hidden):
        raise EntropyPruneError("visionzip-style: say which picture with visionzip.looking_at")
    return top_k(_seen[-1], k).to(inputs.hidden.device)


SELECTOR = Selector(
    "visionzip-style",
    "most attended to in the vision tower (needs ep_peers.visionzip.looking_at)",
    frozenset({"hidden"}),
    select,
)
