"""Visual spans of a prompt: where they are, how many tokens each keeps, and which ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ep_core.budget import DecoderShape
from ep_core.errors import EntropyPruneError
from ep_core.policy import PruningPolicy
from ep_core.selection import Selector, SpanInputs


@dataclass(frozen=True, order=True)
class VisualSpan:
    """The tokens `[start, stop)` of one picture in a prompt."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise EntropyPruneError(
                f"span [{self.start}, {self.stop}): a span holds at least one token"
            )

    def __len__(self) -> int:
        return self.stop - self.start


def plan(
    policy: PruningPolicy,
    spans: Sequence[VisualSpan],
    *,
    layer: int,
    shape: DecoderShape,
    prompt_tokens: int,
) -> tuple[int, ...]:
    """How many tokens each span keeps: host integers only, before anything is computed.

    Args:
        policy: budget and `min_tokens`.
        spans: the prompt's visual spans.
        layer: first layer that sees the kept tokens only (the policy's, once resolved).
        shape: the decoder, for budgets that are stated per layer or in FLOPs.
        prompt_tokens: length of the prompt, text included.

    Raises:
        BudgetError: the budget is impossible for a span, with what is possible.
    """
    large = [span for span in spans if len(span) > policy.min_tokens]
    small = sum(len(span) for span in spans) - sum(len(span) for span in large)
    counts = policy.budget.tokens(
        [len(span) for span in large],
        layer=layer,
        shape=shape,
        other_tokens=prompt_tokens - sum(len(span) for span in spans) + small,
    )
    kept = dict(zip(large, counts, strict=True))
    return tuple(kept.get(span, len(span)) for span in spans)


def select(
    selector: Selector,
    spans: Sequence[VisualSpan],
    keep: Sequence[int],
    *,
    queries: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    attention: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Which tokens each span keeps; never one budget over several spans.

    Args:
        selector: a registered selector.
        spans: spans that index dimension 0 of the inputs.
        keep: tokens kept per span, from `plan`.
        queries: `[T, H, D]` query states of layer K-1, where the selector needs them.
        hidden: `[T, d]` hidden states entering layer K, where the selector needs them.
        attention: `[H, T, T]` attention probabilities of layer K-1, where the selector needs them;
            rows may end before T, where padding begins.

    Returns:
        For each span `[keep]` int64 indices relative to its start, ascending.
    """
    tokens = SpanInputs(queries, hidden, attention).tokens
    if outside := [span for span in spans if tokens is not None and span.stop > tokens]:
        raise EntropyPruneError(f"{outside[0]} lies outside the prompt's {tokens} tokens")
    chosen = []
    for span, k in zip(spans, keep, strict=True):
        window = slice(span.start, span.stop)
        inputs = SpanInputs(
            queries=None if queries is None else queries[window],
            hidden=None if hidden is None else hidden[window],
            attention=None if attention is None else attention[:, span.stop :, window],
        )
        chosen.append(selector(inputs, k))
    return chosen


def staying(tokens: int, spans: Sequence[VisualSpan], kept: Sequence[torch.Tensor]) -> torch.Tensor:
    """Which tokens layers >= K see: `[tokens]` bool, true for text and for kept tokens.

    Args:
        tokens: length of the prompt.
        spans: its pictures.
        kept: indices of each relative to its start, from `select`.
    """
    stays = torch.ones(tokens, dtype=torch.bool, device=kept[0].device if kept else None)
    for span, own in zip(spans, kept, strict=True):
        stays[span.start : span.stop] = False
        stays.index_fill_(0, span.start + own, True)  # assigning a number would wait for the device
    return stays
