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
    """

    start: int
    stop: int
    kept: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
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
            spans.append(SpanRecord(first + unit.start, first + unit.stop, tuple(stays)))
        return cls(tuple(spans), plan.why)


@dataclass
class PruneCounters:
    """Running totals since pruning was switched on."""

    visual_tokens_seen: int = 0
    visual_tokens_kept: int = 0
    requests_pruned: int = 0
    requests_unpruned: Counter[str] = field(default_factory=Counter)

    def add(self, seen: int, dropped: int, reason: str | None) -> None:
        """Count one request: its visual tokens, those dropped, and why none were."""
        self.visual_tokens_seen += seen
        self.visual_tokens_kept += seen - dropped
        if reason is None:
            self.requests_pruned += 1
        else:
            self.requests_unpruned[reason] += 1
