"""Budgets: the published numbers, rounding, round trips, and errors that say what is possible."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ep_core.budget import (
    BUDGETS,
    DecoderShape,
    FlopsReduction,
    Keep,
    LayerAverage,
    layer_average,
)
from ep_core.errors import BudgetError

QWEN = DecoderShape(
    layers=28, hidden_size=3584, intermediate_size=18944, heads=28, kv_heads=4, head_dim=128
)
TINY = DecoderShape(
    layers=8, hidden_size=64, intermediate_size=96, heads=4, kv_heads=2, head_dim=16
)


def test_headline_of_the_paper(llava):
    assert LayerAverage(128).tokens([576], layer=2, shape=llava) == [98]
    reduction = llava.flops_reduction(576 + 86, 98 + 86, 2)
    assert abs(reduction - 0.682) <= 0.001, f"{reduction:.4f} is not 68.2 %"


@pytest.mark.parametrize("text", [0, 40, 86, 200])
def test_average_192_cannot_reach_the_headline(llava, text):
    kept = LayerAverage(192).tokens([576], layer=2, shape=llava)[0]
    assert llava.flops_reduction(576 + text, kept + text, 2) <= 0.672


@pytest.mark.parametrize(
    ("visual", "average", "kept"),
    [(576, 192, 166), (576, 128, 98), (576, 64, 29), (2880, 320, 149)],
)
def test_layer_averages_of_the_released_scripts_for_llava(llava, visual, average, kept):
    assert LayerAverage(average).tokens([visual], layer=2, shape=llava) == [kept]


@pytest.mark.parametrize(("average", "percent"), [(0.25, 22.22), (0.125, 9.26)])
def test_layer_averages_of_the_released_scripts_for_qwen(average, percent):
    kept = LayerAverage(average).tokens([100_000], layer=1, shape=QWEN)[0]
    assert round(kept / 1000, 2) == pytest.approx(percent, abs=0.011)
    assert abs(kept / 100_000 - (28 * average - 1) / 27) < 1e-5


@pytest.mark.parametrize("shape", [QWEN, TINY], ids=["qwen", "tiny"])
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_layer_flops_counts_each_matrix_product(shape, n):
    def product(rows, inner, columns):
        return 2 * rows * inner * columns

    d, m, q, kv = (
        shape.hidden_size,
        shape.intermediate_size,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    )
    projections = product(n, d, q) + 2 * product(n, d, kv) + product(n, q, d)
    attention = shape.heads * (product(n, shape.head_dim, n) + product(n, n, shape.head_dim))
    feed_forward = 2 * product(n, d, m) + product(n, m, d)
    assert shape.layer_flops(n) == projections + attention + feed_forward


def test_layer_flops_without_grouped_heads_is_the_released_formula(llava):
    n, d, m = 662, 4096, 11008
    assert llava.layer_flops(n) == 8 * n * d * d + 4 * n * n * d + 6 * n * d * m


def test_reduction_is_nothing_where_nothing_is_dropped(llava):
    assert llava.flops_reduction(500, 500, 2) == 0
    assert llava.prefill_flops(500, 100, 32) == llava.prefill_flops(500, 500, 0)


@pytest.mark.parametrize(
    ("share", "n", "kept"),
    [
        (0.25, 10, 3),  # 2.5 goes up
        (0.35, 10, 4),  # 3.5 goes up
        (0.45, 10, 5),  # 4.5 goes up: Python's round says 4
        (0.29, 50, 15),  # 14.5 as written; the nearest double lies below
        (0.145, 100, 15),
        (0.24, 10, 2),
        (1e-9, 576, 1),
        (0.5, 1, 1),
        (1.0, 576, 576),
    ],
)
def test_shares_round_half_up_and_keep_at_least_one(llava, share, n, kept):
    assert Keep(share).tokens([n], layer=2, shape=llava) == [kept]


@given(st.integers(1, 10_000), st.integers(1, 4000), st.integers(1, 4))
def test_shares_round_as_the_written_decimal_does(thousandths, n, decimals):
    text = f"{thousandths / 10_000:.{decimals}f}"
    assume(0 < float(text) <= 1)
    exact = math.floor(Fraction(text) * n + Fraction(1, 2))
    assert Keep(float(text)).tokens([n], layer=1, shape=TINY) == [max(1, exact)]


def test_each_span_has_its_own_budget(llava):
    def tokens(budget):
        return budget.tokens([576, 100, 7], layer=2, shape=llava)

    assert tokens(Keep(5)) == [5, 5, 5]
    assert tokens(Keep(0.25)) == [144, 25, 2]
    assert tokens(LayerAverage(0.25)) == [115, 20, 1]
    assert [budget.tokens([], layer=2, shape=llava) for budget in (Keep(5), LayerAverage(5))] == [
        [],
        [],
    ]
    assert FlopsReduction(0.5).tokens([], layer=2, shape=llava) == []


def test_a_numpy_share_is_a_share(llava):
    assert Keep(np.float64(0.25)).tokens([576], layer=2, shape=llava) == [144]


def test_one_token_and_the_whole_span_are_different_budgets():
    assert Keep(1) != Keep(1.0), "keep=1 keeps one token, keep=1.0 keeps all"
    assert LayerAverage(1) != LayerAverage(1.0)


@given(st.integers(1, 3000), st.data())
def test_an_average_is_the_mean_over_the_layers(n, data):
    layers = data.draw(st.integers(2, 40))
    layer = data.draw(st.integers(1, layers - 1))
    shape = DecoderShape(layers, 64, 96, 4, 2, 16)
    least = math.ceil(Fraction(layer * n + layers - layer, layers))
    average = data.draw(st.integers(min(least, n), n))
    kept = LayerAverage(average).tokens([n], layer=layer, shape=shape)[0]
    seen = [n] * layer + [kept] * (layers - layer)
    assert layer_average(n, kept, layer=layer, layers=layers) == pytest.approx(
        float(np.mean(seen)), rel=1e-12
    )
    assert sum(seen) <= layers * average, "the average is exceeded"
    assert kept == n or sum(seen) + layers - layer > layers * average, "one more would fit"


@given(st.integers(1, 3000), st.data())
def test_round_trip_from_kept_over_the_average(n, data):
    kept = data.draw(st.integers(1, n))
    layer = data.draw(st.integers(1, 7))
    average = layer_average(n, kept, layer=layer, layers=8)  # eighths: exact as a decimal
    budget = LayerAverage(int(average)) if average.is_integer() else None
    if budget is not None:
        assert budget.tokens([n], layer=layer, shape=TINY) == [kept]
    share = LayerAverage(average / n)  # a repeating decimal may lie just below
    assume(share.value * 8 * n >= layer * n + (8 - layer) * (1 + 1e-9))
    assert share.tokens([n], layer=layer, shape=TINY)[0] in (kept - 1, kept)


@given(st.integers(2, 3000), st.integers(0, 500), st.data())
def test_round_trip_from_kept_over_flops(n, text, data):
    kept = data.draw(st.integers(1, n - 1))
    layer = data.draw(st.integers(1, 7))
    reduction = TINY.flops_reduction(n + text, kept + text, layer)
    budget = FlopsReduction(reduction)
    assert budget.tokens([n], layer=layer, shape=TINY, other_tokens=text) == [kept]


@given(st.integers(1, 300), st.integers(0, 100), st.integers(1, 27), st.floats(0.001, 0.999))
def test_flops_keeps_the_most_that_reaches_the_target(n, text, layer, target):
    possible = [
        kept
        for kept in range(1, n + 1)
        if QWEN.flops_reduction(n + text, kept + text, layer) >= target
    ]
    budget = FlopsReduction(target)
    if possible:
        kept = budget.tokens([n], layer=layer, shape=QWEN, other_tokens=text)
        assert kept == [max(possible)]
    else:
        with pytest.raises(BudgetError):
            budget.tokens([n], layer=layer, shape=QWEN, other_tokens=text)


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=4),
    st.integers(0, 60),
    st.integers(1, 7),
    st.floats(0.01, 0.9),
)
def test_flops_keeps_the_same_share_of_each_span_the_largest_that_reaches_the_target(
    spans, text, layer, target
):
    def kept_of(share):
        return [max(1, math.floor(n * share)) for n in spans]

    def reduction(kept):
        return TINY.flops_reduction(sum(spans) + text, sum(kept) + text, layer)

    shares = {Fraction(j, n) for n in spans for j in range(n + 1)}  # where a count changes
    reaching = [share for share in shares if reduction(kept_of(share)) >= target]
    assume(reaching)
    got = FlopsReduction(target).tokens(spans, layer=layer, shape=TINY, other_tokens=text)
    assert reduction(got) >= target
    assert got == kept_of(max(reaching))


@pytest.mark.parametrize("spans", [[576], [576, 576], [300, 4, 21]])
def test_flops_over_spans_reaches_the_target(llava, spans):
    kept = FlopsReduction(0.4).tokens(spans, layer=2, shape=llava, other_tokens=50)
    total = sum(spans) + 50
    assert llava.flops_reduction(total, sum(kept) + 50, 2) >= 0.4
    assert llava.flops_reduction(total, sum(kept) + 50 + len(spans), 2) < 0.4, "too few kept"
    assert all(1 <= k <= n for k, n in zip(kept, spans, strict=True))


@pytest.mark.parametrize(
    ("budget", "value", "range_", "example"),
    [
        (Keep, 0, "at least 1", "keep=128"),
        (Keep, -3, "at least 1", "keep=128"),
        (Keep, 0.0, r"\(0, 1\]", "keep=0.25"),
        (Keep, 1.5, r"\(0, 1\]", "keep=0.25"),
        (Keep, -0.25, r"\(0, 1\]", "keep=0.25"),
        (Keep, math.nan, r"\(0, 1\]", "keep=0.25"),
        (Keep, math.inf, r"\(0, 1\]", "keep=0.25"),
        (Keep, "half", "no number", "keep=0.25"),
        (Keep, True, "no number", "keep=128"),
        (Keep, None, "no number", "keep=128"),
        (LayerAverage, 0, "at least 1", "average=128"),
        (LayerAverage, 1.01, r"\(0, 1\]", "average=0.25"),
        (FlopsReduction, 0.0, r"\(0, 1\)", "0.6"),
        (FlopsReduction, 1.0, r"\(0, 1\)", "0.6"),
        (FlopsReduction, -0.5, r"\(0, 1\)", "0.6"),
        (FlopsReduction, math.nan, r"\(0, 1\)", "0.6"),
        (FlopsReduction, 1, r"\(0, 1\)", "0.6"),
        (FlopsReduction, True, r"\(0, 1\)", "0.6"),
        (FlopsReduction, "0.5", r"\(0, 1\)", "0.6"),
    ],
)
def test_a_value_out_of_range_is_an_error_with_range_and_example(budget, value, range_, example):
    with pytest.raises(BudgetError, match=range_) as caught:
        budget(value)
    message = str(caught.value)
    assert message.startswith(f"{budget.key}={value!r}")
    assert example in message
    assert "\n" not in message


def suggestions(message):
    """What an error says is possible: every `key=value` in it but the one refused."""
    refused, _, rest = message.partition(" ")
    return [
        (key, float(number) if "." in number or "e" in number else int(number))
        for key, number in re.findall(r"\b(keep|average|flops|min_tokens)=([-\d.e]*\d)", rest)
        if f"{key}={number}" != refused
    ]


def check_suggestions(budget, spans, layer, shape, text=0):
    """A budget is refused, and each suggestion in the message is accepted for the same prompt."""
    with pytest.raises(BudgetError) as caught:
        budget.tokens(spans, layer=layer, shape=shape, other_tokens=text)
    message = str(caught.value)
    assert message.startswith(f"{budget.key}={budget.value}")
    assert "\n" not in message
    assert "min_tokens" not in message, "not everyone who reads this can set it"
    offered = suggestions(message)
    assert offered, f"nothing is offered in: {message}"
    for_policy = str(caught.value.for_policy())
    assert for_policy.startswith(f"{message}; min_tokens=")
    ways_out = suggestions(for_policy)
    assert ways_out[: len(offered)] == offered
    assert ways_out[len(offered) :] == [("min_tokens", caught.value.min_tokens)]
    for key, value in ways_out:
        try:
            if key == "min_tokens":
                large = [n for n in spans if n > value]
                other = text + sum(spans) - sum(large)
                budget.tokens(large, layer=layer, shape=shape, other_tokens=other)
            else:
                BUDGETS[key](value).tokens(spans, layer=layer, shape=shape, other_tokens=text)
        except BudgetError as error:
            pytest.fail(f"{key}={value} was offered and refused: {message!r} then {error!s}")
    return offered


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_keeping_more_than_the_span_has_offers_what_works(n, excess):
    assert ("keep", n) in check_suggestions(Keep(n + excess), [n], 2, TINY)


@given(st.integers(1, 3000), st.integers(1, 27), st.data())
def test_an_average_too_small_offers_the_least_that_works(n, layer, data):
    least = math.ceil(Fraction(layer * n + 28 - layer, 28))
    assume(least > 1)
    average = data.draw(st.integers(1, least - 1))
    offered = check_suggestions(LayerAverage(average), [n], layer, QWEN)
    assert offered == [("average", least), ("average", n)]


@given(st.integers(1, 3000), st.integers(1, 27), st.floats(1e-6, 1, exclude_max=True))
def test_an_average_share_too_small_offers_a_share_that_works_and_is_close(n, layer, part):
    least = Fraction(layer * n + 28 - layer, 28 * n)
    share = float(least) * part
    assume(Fraction(repr(share)) < least)
    [(key, value)] = check_suggestions(LayerAverage(share), [n], layer, QWEN)
    assert key == "average"
    assert 0 <= value - least <= 1e-4, f"{value} is far above the least, {float(least)}"


@pytest.mark.parametrize("layer", [2, 9, 20])
def test_an_average_above_the_span_offers_what_works(llava, layer):
    assert ("average", 576) in check_suggestions(LayerAverage(600), [576], layer, llava)


@given(st.integers(2, 3000), st.integers(0, 300), st.integers(1, 27), st.floats(0, 1))
def test_a_reduction_out_of_reach_offers_one_that_works_and_is_close(n, text, layer, part):
    best = QWEN.flops_reduction(n + text, 1 + text, layer)
    assume(best >= 0.001)
    target = best + (1 - best) * part
    assume(best < target < 1)
    [(key, value)] = check_suggestions(FlopsReduction(target), [n], layer, QWEN, text)
    assert key == "flops"
    assert 0 <= best - value <= 0.001


@pytest.mark.parametrize(
    ("spans", "text"), [([1], 0), ([1, 1], 30), ([2], 100_000)], ids=["one", "ones", "long text"]
)
def test_where_no_reduction_is_possible_none_of_zero_is_offered(llava, spans, text):
    offered = check_suggestions(FlopsReduction(0.5), spans, 2, llava, text)
    assert offered == [("keep", 1.0)]  # flops=0.0 is itself refused


@pytest.mark.parametrize(
    ("budget", "spans"),
    [
        (Keep(128), [576, 100, 64]),
        (Keep(128), [64, 100, 576]),
        (LayerAverage(0.01), [576, 16]),
        (LayerAverage(10), [16, 576]),
    ],
)
def test_what_is_offered_works_for_every_span_of_the_prompt(llava, budget, spans):
    check_suggestions(budget, spans, 2, llava)


@pytest.mark.parametrize(
    ("budget", "spans", "whole"),
    [
        (Keep(128), [576, 100, 64], 100),
        (LayerAverage(0.07), [576, 16, 300, 40], 40),  # below 125 tokens none would stay
        (LayerAverage(100), [576, 16, 300], 16),
        (FlopsReduction(0.99), [576, 16], 576),
    ],
)
def test_a_policy_has_to_leave_only_those_spans_whole_that_do_not_fit(llava, budget, spans, whole):
    with pytest.raises(BudgetError) as caught:
        budget.tokens(spans, layer=2, shape=llava)
    assert caught.value.min_tokens == whole


@pytest.mark.parametrize("value", [0, 1.5, "half"])
def test_a_value_that_fits_nothing_has_no_min_tokens(value):
    with pytest.raises(BudgetError) as caught:
        Keep(value)
    assert caught.value.for_policy() is caught.value
