"""Selecting one picture's tokens inside an engine, on one rank or on several together."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ep_core.plan import RequestPlan, Unit
from ep_core.plugins import registry
from ep_core.selectors import Selector, SpanInputs


class Ranks(Protocol):
    """Tensor-parallel ranks, each with some of the query heads."""

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' tensors, joined along `dim` in the order of the ranks."""

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """Overwrite the tensor with that of the first rank."""


def choose(
    selector: Selector,
    keep: int,
    *,
    queries: torch.Tensor | None,
    hidden: torch.Tensor | None,
    ranks: Ranks | None = None,
) -> torch.Tensor:
    """Kept tokens of a picture, `[keep]` ascending, given its N tokens alone.

    Args:
        selector: a registered selector.
        keep: tokens that stay.
        queries: `[N, H, D]` of this rank's heads, where the selector needs them.
        hidden: `[N, d]`, where the selector needs them.
        ranks: those that decide together, or None for one alone.
    """
    if ranks is not None and queries is not None:
        queries = ranks.all_gather(queries.contiguous(), dim=1)
    kept = selector(SpanInputs(queries=queries, hidden=hidden), keep)
    if ranks is not None:
        # equal inputs on equal devices give equal answers; nothing may depend on that
        ranks.broadcast(kept)
    return kept


def select(
    method: str,
    plan: RequestPlan,
    *,
    queries: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    device: str = "cpu",
) -> list[list[int]]:
    """`Backend.select` of an engine that uses `choose`: each picture apart, one after the other."""

    def cut(tensor: torch.Tensor | None, unit: Unit) -> torch.Tensor | None:
        return None if tensor is None else tensor[unit.start : unit.stop].to(device)

    selector = registry().selector(method)
    return [
        choose(
            selector,
            planned.keep,
            queries=cut(queries, planned.unit),
            hidden=cut(hidden, planned.unit),
        ).tolist()
        for planned in plan.pruned
    ]
