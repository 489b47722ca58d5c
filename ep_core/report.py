"""What was pruned: one record for each request, and running counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ep_core.plan import RequestPlan


@dataclass(frozen=True)
class SpanRecord:
    """One unit of a prompt: a picture.

    Attributes:
        start, stop: where it begins and ends in the prompt, padding not counted.
        kept: its tokens that layers >= K see, relative to `start`, ascending.
        grid: `(rows, columns)` of its tokens, row by row, where the engine knows it.
    """

    start: int
    stop: int
    kept: tuple[int, ...]
    grid: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object: what every engine knows."""
        return {"start": self.start, "stop": self.stop, "kept": list(self.kept)}


@dataclass(frozen=True)
class RequestRecord:
    """What happened to one request: its units, and why nothing was pruned if nothing was."""

    spans: tuple[SpanRecord, ...] = ()
    reason: str | None = None

    @classmethod
    def of(cls, plan: RequestPlan, kept: Iterable[Sequence[int]], first: int = 0) -> Self:
        """The record of a plan that was carried out.

        Args:
            plan: of the prompt.
            kept: of each unit that loses tokens, in order, the indices of those that stayed.
            first: prompt position of the plan's position 0; earlier turns of a conversation count.
        """
        chosen = iter(kept)
        spans = []
        for planned in plan.units:
            unit, stays = planned.unit, planned.unit.offsets
            if planned.dropped:
                stays = [stays[index] for index in next(chosen)]
            start, stop = first + unit.start, first + unit.stop
            spans.append(SpanRecord(start, stop, tuple(stays), unit.grid))
        return cls(tuple(spans), plan.why)


@dataclass
class PruneCounters:
    """Running totals since pruning was switched on; unpruned requests by the plan's reason."""

    visual_tokens_seen: int = 0
    visual_tokens_kept: int = 0
    requests_pruned: int = 0
    requests_unpruned: Counter[str] = field(default_factory=Counter)

    def add(self, plan: RequestPlan) -> None:
        """Count one request."""
        self.visual_tokens_seen += plan.visual_tokens
        self.visual_tokens_kept += plan.visual_tokens - plan.dropped
        if plan.reason is None:
            self.requests_pruned += 1
        else:
            self.requests_unpruned[plan.reason] += 1
