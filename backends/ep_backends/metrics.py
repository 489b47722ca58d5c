"""Counters for the metrics endpoint of an engine's server."""

from __future__ import annotations

from collections.abc import Mapping


class Metrics:
    """What was pruned since the server started, with the labels of the engine's own series."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        """Create the counters in prometheus_client's registry.

        Args:
            labels: names and values.
        """
        from prometheus_client import Counter

        self._labels = dict(labels)
        names = tuple(labels)
        self._seen = Counter(
            "entropyprune:visual_tokens_seen", "Visual tokens of admitted requests.", names
        )
        self._kept = Counter(
            "entropyprune:visual_tokens_kept", "Those of them that layers >= K see.", names
        )
        self._pruned = Counter(
            "entropyprune:requests_pruned", "Requests that lost visual tokens.", names
        )
        self._unpruned = Counter(
            "entropyprune:requests_unpruned",
            "Requests with pictures that lost none, by reason.",
            (*names, "reason"),
        )

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
