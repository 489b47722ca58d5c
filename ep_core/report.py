"""What was pruned: one record for each request, and running counters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SpanRecord:
    """One picture of a prompt.

    Attributes:
        start, stop: the span `[start, stop)` in the prompt, padding not counted.
        kept: tokens that layers >= K see, relative to `start`, ascending.
    """

    start: int
    stop: int
    kept: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {"start": self.start, "stop": self.stop, "kept": list(self.kept)}


@dataclass(frozen=True)
class RequestRecord:
    """What happened to one request: its pictures, and why nothing was pruned if nothing was."""

    spans: tuple[SpanRecord, ...] = ()
    reason: str | None = None


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
