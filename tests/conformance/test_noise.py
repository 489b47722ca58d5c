"""The margin of level 2, measured on another implementation, and what lies beyond it."""

import numpy as np
import pytest
import torch

from ep_backends.shared.processor import encode
from ep_backends.transformers.backend import TransformersBackend
from ep_conformance.comparison import NOISE_CAP, NOISE_MARGIN, Expected, Pruned, expect
from ep_conformance.oracle import OracleResult, token_score
from ep_conformance.test_engine import CASES, contents
from ep_core import demo
from ep_core.backend import Answer, Request
from ep_core.report import SpanRecord

SCORED = [case for case in CASES if case.method != "set-entropy" and any(case.pictures)]


def noise(case, workshop):
    """For each picture: noise of transformers' scores, of the oracle's, and the range of scores."""
    model = demo.MODEL if case.checkpoint == "demo" else workshop.checkpoint(case.checkpoint)
    with TransformersBackend().open(model, None, dtype="float32") as session:
        layer = session.model.get_decoder().layers[case.layer - 1]
        queries = []
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: queries.append(out))
        for seed, pictures in enumerate(case.pictures):
            request = Request(contents(case.checkpoint, pictures, seed, workshop), 1)
            right = expect(model, request, case.pruned)
            exact = right._run(1, torch.float64).scores
            with torch.inference_mode():
                session.model(**encode(session.processor, [request.content]))
            heads = queries.pop()[0].unflatten(1, (-1, layer.self_attn.head_dim)).double().numpy()
            for i, (start, stop) in enumerate(right.result.spans):
                theirs = [token_score(heads[t], case.method) for t in range(start, stop)]
                span = np.array(exact[i])
                yield (
                    np.abs(theirs - span).max(),
                    np.abs(np.array(right.result.scores[i]) - span).max(),
                    np.ptp(span),
                )


def test_the_margin_covers_another_implementation_and_the_cap_is_above_it(workshop):
    measured = [each for case in SCORED for each in noise(case, workshop)]
    assert len(measured) > 15
    ratio = max(theirs / own for theirs, own, _ in measured)
    share = max(NOISE_MARGIN * own / spread for _, own, spread in measured)
    print(
        f"\nnoise is up to {ratio:.2f} times the oracle's; the margin is {share:.1e} of the range"
    )
    assert ratio < NOISE_MARGIN
    assert share < NOISE_CAP


def test_the_picture_that_differs_is_blamed(monkeypatch):
    same, other = tuple(range(20)), (*range(19), 20)
    spans = [(0, 40), (40, 80)]
    oracle = OracleResult([], spans, [list(same)] * 2, None, [], torch.empty(0), (80, 40))
    monkeypatch.setattr(Expected, "_run", lambda *_: oracle)
    right = Expected(demo.MODEL, Request(()), Pruned(2, 20, "set-entropy"))
    kept = zip(spans, (same, other), strict=True)
    records = tuple(SpanRecord(*span, own) for span, own in kept)
    with pytest.raises(AssertionError, match=r"^picture 1: kept .*a set selection in float32"):
        right.check(Answer((), "", 80, records, None, None))


def answered(right, chosen, *, tokens=0, logits=0.0):
    """The answer of an engine that kept `chosen` of the one picture, and made these mistakes."""
    result = right._run(4, torch.float32, [chosen])
    ids = [token + tokens for token in result.output_ids]
    record = SpanRecord(*result.spans[0], tuple(chosen))
    return Answer(
        tuple(ids), "", len(result.input_ids), (record,), None, None, result.logits + logits
    )


@pytest.mark.parametrize(
    ("mistake", "message"),
    [({}, None), ({"tokens": 1}, "greedy tokens"), ({"logits": 2e-4}, "logits differ")],
)
def test_behind_a_choice_that_noise_explains_all_is_compared(monkeypatch, mistake, message):
    """The kept tokens differ within the noise; tokens and logits are those of that choice."""
    monkeypatch.setattr("ep_conformance.comparison.NOISE_MARGIN", 1e9)
    monkeypatch.setattr("ep_conformance.comparison.NOISE_CAP", 1.0)
    picture = demo.PICTURES / "sample_00.png"
    right = expect(demo.MODEL, Request((picture, "what is it?"), 4), Pruned(1, 48, "rows"))
    kept = right.result.kept[0]
    other = sorted([*kept[:-1], next(i for i in range(144) if i not in kept)])
    answer = answered(right, other, **mistake)
    worst = float((answer.logits - right.result.logits).abs().max())
    assert worst > 1e-4, "the other choice gives the same logits: nothing would be shown"
    if message is None:
        right.check(answer)
    else:
        with pytest.raises(AssertionError, match=message):
            right.check(answer)
