"""The stored level-1 cases: made by their script, and covering what they claim."""

import torch

from ep_conformance.selection_cases import make, stored_cases, stored_tensors


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
