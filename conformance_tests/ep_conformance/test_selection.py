"""Level 1: stored tensors through the backend's own selection path, exact indices expected."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ep_conformance.comparison import shorten
from ep_conformance.selection_cases import SelectionCase, scores, stored_cases, stored_tensors
from ep_core.backend import Backend
from ep_core.plan import PlannedUnit, RequestPlan, Run, Unit
from ep_core.report import RequestRecord, SpanRecord

CASES = [
    pytest.param(case, id=case.name, marks=pytest.mark.row(f"selection: {case.method}"))
    for case in stored_cases()
]


@pytest.mark.parametrize("case", CASES)
def test_kept_indices(
    case: SelectionCase,
    backend: Backend,
    device: str,
    record_property: Callable[[str, object], None],
) -> None:
    """The backend keeps exactly the stored tokens of every span."""
    tensor = stored_tensors()[case.tensor]
    units = [
        PlannedUnit(Unit((Run(*span),)), keep)
        for span, keep in zip(case.spans, case.keep, strict=True)
    ]
    plan = RequestPlan.of(units, len(tensor))
    chosen = backend.select(
        case.method,
        plan,
        queries=tensor if tensor.ndim == 3 else None,
        hidden=tensor if tensor.ndim == 2 else None,
        device=device,
    )
    pruned = sum(1 for _ in plan.pruned)
    assert len(chosen) == pruned, f"{len(chosen)} units answered, {pruned} asked"
    kept = [list(span.kept) for span in RequestRecord.of(plan, chosen).spans]
    spans = [
        SpanRecord(*span, tuple(actual)).to_json()
        for span, actual in zip(case.spans, kept, strict=True)
    ]
    own = shorten(scores(tensor, case.method, case.spans))
    record_property("answers", [{"spans": spans, "scores": own}])
    for span, expected, actual in zip(case.spans, case.kept, kept, strict=True):
        missing, extra = set(expected) - set(actual), set(actual) - set(expected)
        assert list(actual) == list(expected), (
            f"{case.name}: span {span} should keep {list(expected)}, kept {list(actual)}: "
            f"missing {sorted(missing)}, extra {sorted(extra)}"
        )
