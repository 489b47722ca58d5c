"""Given tensors go through the hooks of requests: a defect of theirs is seen at level 1."""

import numpy as np
import pytest
import torch

from ep_backends.lmdeploy.backend import LMDeployBackend
from ep_backends.lmdeploy.prefill import Pruner
from ep_conformance.oracle import keep_best, keep_set, token_score
from ep_core.errors import EntropyPruneError
from ep_core.plan import PlannedUnit, RequestPlan, Run, Unit

SPANS, KEEP, TOKENS = [(2, 14), (14, 20)], [5, 2], 23
PLAN = RequestPlan.of(
    [PlannedUnit(Unit((Run(*span),), i), KEEP[i]) for i, span in enumerate(SPANS)], TOKENS
)
QUERIES = torch.randn(TOKENS, 6, 16, generator=torch.Generator().manual_seed(1))
HIDDEN = torch.randn(TOKENS, 48, generator=torch.Generator().manual_seed(2))


def select(method):
    given = {"hidden": HIDDEN} if method == "set-entropy" else {"queries": QUERIES}
    return LMDeployBackend().select(method, PLAN, **given)


def wanted(method):
    if method == "set-entropy":
        states = HIDDEN.double().numpy()
        return [keep_set(states[a:b], keep) for (a, b), keep in zip(SPANS, KEEP, strict=True)]
    scores = np.array([token_score(each, method) for each in QUERIES.double().numpy()])
    return [keep_best(scores[a:b], keep) for (a, b), keep in zip(SPANS, KEEP, strict=True)]


@pytest.mark.parametrize("method", ["released", "rows", "trace", "set-entropy"])
def test_the_hooks_choose_as_the_oracle(method):
    assert select(method) == wanted(method)


def test_queries_are_read_by_the_hook_of_the_projection(monkeypatch):
    read = Pruner._after_projection
    monkeypatch.setattr(
        Pruner,
        "_after_projection",
        lambda self, module, args, output: read(self, module, args, output.roll(1, 1)),
    )
    assert select("released") != wanted("released")


def test_what_is_ranked_is_cut_by_the_hook_of_layer_k(monkeypatch):
    monkeypatch.setattr(Pruner, "_cut", lambda self, step, given: given)
    with pytest.raises(EntropyPruneError, match="not chosen"):
        select("set-entropy")


def test_hidden_states_are_the_sum_that_enters_layer_k(monkeypatch):
    cut = Pruner._cut
    monkeypatch.setattr(
        Pruner,
        "_cut",
        lambda self, step, given: cut(
            self, step, given | {"residual": given["hidden_states"] ** 2}
        ),
    )
    assert select("set-entropy") != wanted("set-entropy")
