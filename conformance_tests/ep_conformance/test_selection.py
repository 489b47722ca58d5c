"""Level 1: stored tensors through the backend's own selection path, exact indices expected."""

from __future__ import annotations

import pytest

from ep_conformance.selection_cases import SelectionCase, stored_cases, stored_tensors
from ep_core.backend import Backend
from ep_core.spans import VisualSpan


@pytest.mark.parametrize("case", stored_cases(), ids=lambda case: case.name)
def test_kept_indices(case: SelectionCase, backend: Backend, device: str) -> None:
    """The backend keeps exactly the stored tokens of every span."""
    tensor = stored_tensors()[case.tensor]
    kept = backend.select(
        case.method,
        [VisualSpan(*span) for span in case.spans],
        case.keep,
        queries=tensor if tensor.ndim == 3 else None,
        hidden=tensor if tensor.ndim == 2 else None,
        device=device,
    )
    assert len(kept) == len(case.spans), f"{len(kept)} spans answered, {len(case.spans)} asked"
    for span, expected, actual in zip(case.spans, case.kept, kept, strict=True):
        missing, extra = set(expected) - set(actual), set(actual) - set(expected)
        assert list(actual) == list(expected), (
            f"{case.name}: span {span} should keep {list(expected)}, kept {list(actual)}: "
            f"missing {sorted(missing)}, extra {sorted(extra)}"
        )
