"""The stored level-1 cases: made by their script, covering what they claim, catching defects."""

from collections.abc import Sequence

import pytest
import torch

from ep_conformance.selection_cases import make, stored_cases, stored_tensors, tf32_rounded
from ep_conformance.test_selection import test_kept_indices as check
from ep_core.plugins import registry
from ep_core.spans import VisualSpan

check.__test__ = False  # the suite's own test, called here by hand


def test_stored_cases_are_what_the_script_makes():
    tensors, cases = make()
    assert cases == stored_cases(), "run python -m ep_conformance.selection_cases"
    assert tensors.keys() == stored_tensors().keys()
    for name, tensor in tensors.items():
        stored = stored_tensors()[name]
        assert stored.dtype == tensor.dtype
        assert torch.equal(stored.nan_to_num(), tensor.nan_to_num()), f"{name} has drifted"


def test_cases_cover_what_they_should():
    tensors = stored_tensors().values()
    assert {t.dtype for t in tensors} == {torch.float32, torch.bfloat16, torch.float16}
    queries = [t for t in tensors if t.ndim == 3]
    assert {t.shape[1] for t in queries} >= {8, 9, 16, 28, 32, 40}
    assert {t.shape[2] for t in queries} >= {32, 64, 80, 128, 256}
    cases = stored_cases()
    assert {case.method for case in cases} == {"released", "rows", "trace", "set-entropy"}
    assert {1, 24} <= {k for case in cases for k in case.keep}
    assert any(len(case.spans) == 3 for case in cases)
    assert any(stop - start == 1 for case in cases for start, stop in case.spans)


class Broken:
    """The transformers backend with a planted defect in its selection."""

    def __init__(self, defect: str) -> None:
        self.defect = defect
        self.real = registry().backend("transformers").load()

    def select(
        self,
        method: str,
        spans: Sequence[VisualSpan],
        keep: Sequence[int],
        *,
        queries: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        device: str = "cpu",
    ) -> list[list[int]]:
        if self.defect == "ties to the highest index":
            flipped = []
            for span, k in zip(spans, keep, strict=True):
                window = slice(span.start, span.stop)
                q = None if queries is None else queries[window].flip(0)
                h = None if hidden is None else hidden[window].flip(0)
                whole = [VisualSpan(0, len(span))]
                (kept,) = self.real.select(method, whole, [k], queries=q, hidden=h)
                flipped.append(sorted(len(span) - 1 - i for i in kept))
            return flipped
        if self.defect == "off by one span":
            spans = [VisualSpan(max(0, s.start - 1), s.stop - 1) for s in spans]
        if self.defect == "one budget over all pictures":
            tokens = [t for s in spans for t in range(s.start, s.stop)]
            q = None if queries is None else queries[tokens]
            h = None if hidden is None else hidden[tokens]
            whole = [VisualSpan(0, len(tokens))]
            (kept,) = self.real.select(method, whole, [sum(keep)], queries=q, hidden=h)
            chosen = {tokens[i] for i in kept}
            return [[t - s.start for t in range(s.start, s.stop) if t in chosen] for s in spans]
        if self.defect == "TF32 score" and queries is not None:
            queries = tf32_rounded(queries)
        if self.defect == "not finite first":
            queries = None if queries is None else queries.nan_to_num(1e4, 1e4, -1e4)
            hidden = None if hidden is None else hidden.nan_to_num(1e4, 1e4, -1e4)
        return self.real.select(method, spans, keep, queries=queries, hidden=hidden)


@pytest.mark.parametrize(
    ("defect", "caught_by"),
    [
        ("ties to the highest index", "identical-patches-rows"),
        ("ties to the highest index", "set-all-alike-set-entropy"),
        ("off by one span", "heads32x128-bfloat16-released"),
        ("one budget over all pictures", "three-pictures-trace"),
        ("one budget over all pictures", "set-three-pictures-set-entropy"),
        ("TF32 score", "close-calls-rows"),
        ("not finite first", "non-finite-rows"),
        ("not finite first", "set-non-finite-set-entropy"),
    ],
)
def test_a_planted_defect_is_caught_by_the_case_meant_for_it(defect, caught_by):
    (case,) = [case for case in stored_cases() if case.name == caught_by]
    check(case, registry().backend("transformers").load(), "cpu")
    with pytest.raises(AssertionError, match="should keep"):
        check(case, Broken(defect), "cpu")
