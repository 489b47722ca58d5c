"""Counters in SGLang's own metrics endpoint."""

from __future__ import annotations

from typing import Any

from ep_backends.sglang.requests import RequestPlan


class Metrics:
    """What was pruned since the server started, with the labels of SGLang's own series."""

    def __init__(self, labels: dict[str, Any]) -> None:
        """Create the counters; SGLang has told prometheus_client where to by now."""
        from prometheus_client import Counter

        self._labels = labels
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

    def count(self, plan: RequestPlan) -> None:
        """Count one admitted request."""
        self._seen.labels(**self._labels).inc(plan.info["visual_tokens"])
        self._kept.labels(**self._labels).inc(plan.info["kept"])
        if plan.reason is None:
            self._pruned.labels(**self._labels).inc()
        else:
            self._unpruned.labels(**self._labels, reason=plan.reason).inc()


def metrics_of(scheduler: Any) -> Metrics | None:
    """The scheduler's counters, or None where SGLang keeps none; made when first asked for."""
    if not scheduler.metrics_collector_context.current_scheduler_metrics_enabled:
        return None
    found = getattr(scheduler, "_entropyprune_metrics", None)
    if found is None:
        found = Metrics(dict(scheduler.metrics_collector.labels))
        scheduler._entropyprune_metrics = found
    return found
