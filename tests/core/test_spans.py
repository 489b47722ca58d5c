"""Spans of a prompt, the plan of counts, and a selection that never mixes pictures."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_core.budget import FlopsReduction, Keep, LayerAverage
from ep_core.errors import BudgetError, EntropyPruneError
from ep_core.policy import PruningPolicy
from ep_core.selectors import entropyprune_selectors
from ep_core.spans import VisualSpan, plan, runs_of, select, staying

SELECTORS = {selector.name: selector for selector in entropyprune_selectors()}
IMAGE = 9


@given(st.lists(st.sampled_from([1, 2, IMAGE]), max_size=40))
def test_runs_are_exactly_the_image_tokens_and_do_not_touch(token_ids):
    runs = runs_of(token_ids, IMAGE)
    covered = [at for run in runs for at in range(run.start, run.stop)]
    assert covered == [at for at, token in enumerate(token_ids) if token == IMAGE]
    assert all(a.stop < b.start for a, b in pairwise(runs))


@pytest.mark.parametrize(
    ("token_ids", "runs"),
    [
        ([], []),
        ([1, 2], []),
        ([9], [(0, 1)]),
        ([9, 9, 1, 9], [(0, 2), (3, 4)]),
        ([1, 9, 9], [(1, 3)]),
        ((9, 9, 9), [(0, 3)]),
    ],
)
def test_runs_at_the_ends(token_ids, runs):
    assert runs_of(token_ids, IMAGE) == [VisualSpan(*run) for run in runs]


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (4, 3), (-1, 2)])
def test_a_span_holds_at_least_one_token(start, stop):
    with pytest.raises(EntropyPruneError, match="at least one token"):
        VisualSpan(start, stop)


def test_spans_know_their_length_and_order():
    assert len(VisualSpan(3, 10)) == 7
    assert sorted([VisualSpan(5, 6), VisualSpan(1, 9)])[0] == VisualSpan(1, 9)


def counts(policy, spans, shape, prompt_tokens, layer=2):
    return plan(policy, spans, layer=layer, shape=shape, prompt_tokens=prompt_tokens)


SPANS = [VisualSpan(2, 66), VisualSpan(70, 646), VisualSpan(646, 710)]  # 64, 576, 64


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [(0, (16, 144, 16)), (63, (16, 144, 16)), (64, (64, 144, 64)), (576, (64, 576, 64))],
)
def test_spans_of_at_most_min_tokens_are_left_whole(llava, min_tokens, expected):
    policy = PruningPolicy(2, Keep(0.25), min_tokens=min_tokens)
    assert counts(policy, SPANS, llava, 800) == expected


def test_min_tokens_is_the_way_out_for_spans_smaller_than_the_count(llava):
    with pytest.raises(BudgetError, match="keep=64"):
        counts(PruningPolicy(2, Keep(128)), SPANS, llava, 800)
    assert counts(PruningPolicy(2, Keep(128), min_tokens=64), SPANS, llava, 800) == (64, 128, 64)


def test_a_prompt_without_spans_plans_nothing(llava):
    for budget in (Keep(5), LayerAverage(0.5), FlopsReduction(0.5)):
        assert counts(PruningPolicy(2, budget), [], llava, 30) == ()


def test_all_spans_small_plan_nothing_away(llava):
    policy = PruningPolicy(2, FlopsReduction(0.5), min_tokens=10_000)
    assert counts(policy, SPANS, llava, 800) == (64, 576, 64)


def test_whole_spans_and_text_count_as_tokens_that_stay_for_flops(llava):
    policy = PruningPolicy(2, FlopsReduction(0.5), min_tokens=64)
    kept = counts(policy, SPANS, llava, 800)
    assert kept[0] == kept[2] == 64
    dropped = 704 - sum(kept)
    assert llava.flops_reduction(800, 800 - dropped, 2) >= 0.5
    assert llava.flops_reduction(800, 800 - dropped + 1, 2) < 0.5, "one more could stay"


def test_the_plan_uses_the_settled_layer(llava):
    policy = PruningPolicy("auto", LayerAverage(128))
    spans = [VisualSpan(0, 576)]
    assert counts(policy, spans, llava, 600, layer=2) == (98,)
    assert counts(policy, spans, llava, 600, layer=4) == (64,)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 80)), max_size=5), st.data())
def test_a_plan_keeps_one_to_all_of_each_span(llava, gaps_and_lengths, data):
    spans, at = [], 0
    for gap, length in gaps_and_lengths:
        spans.append(VisualSpan(at + gap, at + gap + length))
        at = spans[-1].stop
    policy = PruningPolicy(
        2, Keep(data.draw(st.floats(0.01, 1))), min_tokens=data.draw(st.integers(0, 40))
    )
    kept = counts(policy, spans, llava, at + 5)
    assert len(kept) == len(spans)
    for k, span in zip(kept, spans, strict=True):
        assert 1 <= k <= len(span)
        assert k == len(span) or len(span) > policy.min_tokens


def inputs(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "queries": torch.randn(tokens, 4, 8, generator=generator),
        "hidden": torch.randn(tokens, 32, generator=generator),
    }


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_span_is_selected_from_as_if_it_were_alone(name):
    spans, keep = [VisualSpan(3, 20), VisualSpan(20, 31), VisualSpan(35, 36)], [5, 4, 1]
    prompt = inputs(40, seed=0)
    chosen = select(SELECTORS[name], spans, keep, **prompt)
    assert [len(c) for c in chosen] == keep
    for span, k, indices in zip(spans, keep, chosen, strict=True):
        elsewhere = inputs(60, seed=1)  # other neighbours, another position
        for key, tensor in elsewhere.items():
            tensor[40 : 40 + len(span)] = prompt[key][span.start : span.stop]
        [moved] = select(SELECTORS[name], [VisualSpan(40, 40 + len(span))], [k], **elsewhere)
        assert moved.tolist() == indices.tolist()


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_the_order_in_which_spans_are_given_is_the_order_of_the_answer(name):
    spans, keep = [VisualSpan(0, 9), VisualSpan(9, 30)], [2, 6]
    prompt = inputs(30, seed=2)
    forward = select(SELECTORS[name], spans, keep, **prompt)
    backward = select(SELECTORS[name], spans[::-1], keep[::-1], **prompt)
    assert [c.tolist() for c in forward] == [c.tolist() for c in backward[::-1]]


def test_a_plan_of_another_length_than_the_spans_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        select(SELECTORS["rows"], [VisualSpan(0, 4), VisualSpan(4, 8)], [2], **inputs(8, 0))


def test_a_span_behind_the_inputs_is_refused():
    with pytest.raises(EntropyPruneError):
        select(SELECTORS["set-entropy"], [VisualSpan(4, 12)], [4], **inputs(8, 0))


def test_text_and_kept_tokens_stay():
    kept = [torch.tensor([1]), torch.tensor([0, 1])]
    stays = staying(8, [VisualSpan(1, 4), VisualSpan(5, 7)], kept)
    assert stays.tolist() == [True, False, True, False, True, True, True, True]
    assert staying(2, [], []).all()
