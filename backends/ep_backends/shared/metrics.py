"""Counters for the metrics endpoint of an engine's server."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any


class Metrics:
    """What was pruned since the server started, with the labels of the engine's own series."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        """Use the counters in prometheus_client's registry.

        Args:
            labels: names and values.
        """
        self._labels = dict(labels)
        self._seen, self._kept, self._pruned, self._unpruned = _counters(tuple(labels))

    def count(self, seen: int, kept: int, reason: str | None) -> None:
        """Count one admitted request.

        Args:
            seen: its visual tokens.
            kept: those that stay.
            reason: why it loses none, or None.
        """
        self._seen.labels(**self._labels).inc(seen)
        self._kept.labels(**self._labels).inc(kept)
        if reason is None:
            self._pruned.labels(**self._labels).inc()
        else:
            self._unpruned.labels(**self._labels, reason=reason).inc()


@cache
def _counters(names: tuple[str, ...]) -> tuple[Any, ...]:
    """The counters of a process, made when first asked for: the registry takes a name once."""
    from prometheus_client import Counter

    return (
        Counter("entropyprune:visual_tokens_seen", "Visual tokens of admitted requests.", names),
        Counter("entropyprune:visual_tokens_kept", "Those of them that layers >= K see.", names),
        Counter("entropyprune:requests_pruned", "Requests that lost visual tokens.", names),
        Counter(
            "entropyprune:requests_unpruned",
            "Requests with pictures that lost none, by reason.",
            (*names, "reason"),
        ),
    )
