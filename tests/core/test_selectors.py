"""Top-k and its tie rule, the greedy set entropy against its definition, the Selector checks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ep_core.entropy import cosine_gram, matrix_entropy, renyi2_entropy
from ep_core.errors import EntropyPruneError
from ep_core.selectors import (
    Selector,
    SpanInputs,
    entropyprune_selectors,
    greedy_renyi2,
    top_k,
)

SELECTORS = {selector.name: selector for selector in entropyprune_selectors()}
FEW_SCORES = st.sampled_from([-math.inf, -2.5, -0.0, 0.0, 1.0, 1.0000001, 3.0])  # many ties


@given(st.lists(FEW_SCORES, min_size=1, max_size=40), st.data())
def test_top_k_is_score_descending_then_index_ascending(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    values = torch.tensor(scores, dtype=torch.float32)
    ranked = sorted(range(len(scores)), key=lambda n: (-float(values[n]), n))
    assert top_k(values, k).tolist() == sorted(ranked[:k])


@pytest.mark.parametrize("n", [17, 576, 5000])
def test_top_k_of_equal_scores_keeps_the_first(n):
    assert top_k(torch.zeros(n), n // 2).tolist() == list(range(n // 2))


def gram_of(rows):
    """Squared cosines by the definition, in python; None for a row without direction."""
    norms = [math.sqrt(math.fsum(v * v for v in row)) for row in rows]
    usable = [math.isfinite(norm) and norm > 0 for norm in norms]
    unit = [
        [v / n for v in row] if u else None for row, n, u in zip(rows, norms, usable, strict=True)
    ]
    return [
        [
            0.0
            if a is None or b is None
            else float(np.float32(math.fsum(x * y for x, y in zip(a, b, strict=True)))) ** 2
            for b in unit
        ]
        for a in unit
    ], usable


def naive_greedy(squares, usable, k):
    """The definition: smallest total first, then smallest sum to the kept; exact sums, all O(n)."""
    kept = []
    while len(kept) < k:
        against = kept or range(len(squares))
        costs = [math.fsum(row[j] for j in against) for row in squares]
        left = [n for n in range(len(squares)) if n not in kept]
        kept.append(min(left, key=lambda n: (not usable[n], costs[n] if usable[n] else 0, n)))
    return sorted(kept)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("n", "width"), [(3, 2), (12, 5), (25, 64)])
def test_set_entropy_is_the_greedy_of_its_definition(n, width, seed):
    hidden = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).double()
    squares, usable = gram_of(hidden.tolist())
    for k in range(1, n + 1):
        assert greedy_renyi2(hidden, k).tolist() == naive_greedy(squares, usable, k), f"k={k}"


# all cosines are 0, 1/2 or 1: every sum is exact, every tie is a tie
SIGNS = st.tuples(*[st.sampled_from([-1.0, 1.0])] * 4)
AXES = st.sampled_from([tuple(2.0 * (i == j) for j in range(4)) for i in range(4)])
ZERO = st.just((0.0,) * 4)
BROKEN = st.sampled_from([(math.nan, 0.0, 0.0, 0.0), (math.inf, 1.0, 1.0, 1.0)])


@given(st.lists(st.one_of(SIGNS, AXES, ZERO, BROKEN), min_size=1, max_size=14), st.data())
def test_set_entropy_with_duplicates_zeros_and_nan_follows_the_tie_rule(rows, data):
    k = data.draw(st.integers(1, len(rows)))
    squares, usable = gram_of(rows)
    assert greedy_renyi2(torch.tensor(rows), k).tolist() == naive_greedy(squares, usable, k)


# on these, sums of the same squares in another order differ in the last bit
TIED = [
    [-1, 1, 3, 3, 0, -1],
    [0, -2, -1, 3, 3, 0],
    [1, -2, -3, 1, -2, 3],
    [-3, 2, 3, -1, 2, -3],
    [3, -1, 2, -2, -2, 2],
    [0, 0, 1, 3, 0, -2],
    [1, 3, 0, 0, 2, 0],
    [0, -1, -3, -1, -2, -3],
    [2, -2, -2, 3, 1, 1],
]
SMALL_ROWS = st.integers(2, 6).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(-3, 3), min_size=width, max_size=width).filter(any),
        min_size=1,
        max_size=12,
    )
)


@example(TIED, 4)
@given(SMALL_ROWS, st.integers(1, 12))
def test_no_order_of_summation_decides_a_tie(rows, k):
    hidden = torch.tensor(rows, dtype=torch.float32)
    k = min(k, len(rows))
    squares = cosine_gram(hidden).double().square().tolist()  # given: ties are those of the Gram
    assert greedy_renyi2(hidden, k).tolist() == naive_greedy(squares, [True] * len(rows), k)


def test_set_entropy_first_pick_is_the_token_least_like_all_others():
    hidden = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [0, 0.2, 1], [1, 0, 0.3]])
    assert greedy_renyi2(hidden, 1).tolist() == [2]


def test_set_entropy_leaves_duplicates_for_last():
    distinct = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    hidden = distinct.repeat_interleave(3, dim=0)
    kept = greedy_renyi2(hidden, 5)
    assert sorted((kept // 3).tolist()) == [0, 1, 2, 3, 4], f"two copies kept: {kept.tolist()}"
    assert (kept % 3 == 0).all(), "of equal tokens the first stays"


def test_set_entropy_is_scale_free_and_keeps_its_picks_as_k_grows():
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(40, 16, generator=generator)
    scaled = hidden * torch.rand(40, 1, generator=generator).mul(100).add(0.01)
    before: set[int] = set()
    for k in range(1, 41):
        kept = set(greedy_renyi2(hidden, k).tolist())
        assert before < kept, f"k={k} gives up {before - kept}"
        assert kept == set(greedy_renyi2(scaled, k).tolist())
        before = kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [8, 24, 48])
def test_set_entropy_is_at_least_as_large_as_of_random_subsets(seed, k):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 48, generator=generator)
    of = torch.randint(0, 6, (96,), generator=generator)
    hidden = centres[of] + 0.5 * torch.randn(96, 48, generator=generator)

    def entropy(index):
        return renyi2_entropy(cosine_gram(hidden[index]))

    best = max(entropy(torch.randperm(96, generator=generator)[:k]) for _ in range(200))
    assert entropy(greedy_renyi2(hidden, k)) >= best


@pytest.mark.parametrize("name", ["released", "rows", "trace", "set-entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 5, 12])
def test_each_built_in_selector_keeps_k_ascending(name, dtype, k):
    generator = torch.Generator().manual_seed(0)
    inputs = SpanInputs(
        queries=torch.randn(12, 8, 16, generator=generator).to(dtype),
        hidden=torch.randn(12, 128, generator=generator).to(dtype),
    )
    kept = SELECTORS[name](inputs, k).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == k
    assert 0 <= kept[0] <= kept[-1] < 12


@pytest.mark.parametrize(
    ("name", "normalize"), [("released", "none"), ("rows", "rows"), ("trace", "trace")]
)
def test_score_selectors_keep_the_largest_scores(name, normalize):
    queries = torch.randn(30, 8, 16, generator=torch.Generator().manual_seed(1))
    scores = matrix_entropy(queries, normalize).tolist()
    best = sorted(range(30), key=lambda n: -scores[n])[:7]
    assert SELECTORS[name](SpanInputs(queries=queries), 7).tolist() == sorted(best)


@pytest.mark.parametrize("name", ["released", "rows", "trace", "set-entropy"])
def test_a_broken_token_is_the_last_to_be_kept(name):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(9, 8, 16, generator=generator)
    hidden = torch.randn(9, 32, generator=generator)
    queries[4, 2, 3] = math.nan
    hidden[4, 7] = math.inf
    inputs = SpanInputs(queries=queries, hidden=hidden)
    assert SELECTORS[name](inputs, 8).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert SELECTORS[name](inputs, 9).tolist() == list(range(9))


def selector(answer, needs=("hidden",)):
    return Selector("mine", "a test", frozenset(needs), lambda inputs, k: answer)


@pytest.mark.parametrize("need", ["queries", "hidden"])
def test_a_selector_without_its_input_says_which(need):
    with pytest.raises(EntropyPruneError, match=f"'mine' needs {need}, none were given"):
        selector(torch.tensor([0]), [need])(SpanInputs(), 1)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (torch.tensor([0, 1]), "too few"),
        (torch.tensor([0, 1, 2, 3]), "too many"),
        (torch.tensor([[0, 1, 2]]), "two dimensions"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), "int32"),
        (torch.tensor([0.0, 1.0, 2.0]), "float"),
        (torch.tensor([True, True, True]), "a mask"),
    ],
)
def test_a_selector_that_answers_the_wrong_shape_or_type_is_refused(answer, why):
    with pytest.raises(EntropyPruneError, match=r"'mine' returned .*expected \[3\] torch.int64"):
        selector(answer)(SpanInputs(hidden=torch.zeros(6, 4)), 3)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ([2, 1, 0], "not ascending"),
        ([0, 1, 1], "one token twice"),
        ([0, 1, 6], "behind the span"),
        ([-1, 0, 1], "before the span"),
    ],
)
def test_a_selector_that_answers_other_than_ascending_indices_is_refused(answer, why):
    with pytest.raises(EntropyPruneError, match="'mine' returned"):
        selector(torch.tensor(answer))(SpanInputs(hidden=torch.zeros(6, 4)), 3)


@pytest.mark.parametrize("name", ["released", "rows", "trace", "set-entropy"])
def test_more_tokens_than_the_span_has_are_refused(name):
    generator = torch.Generator().manual_seed(0)
    inputs = SpanInputs(
        queries=torch.randn(6, 4, 8, generator=generator),
        hidden=torch.randn(6, 32, generator=generator),
    )
    with pytest.raises(EntropyPruneError):
        SELECTORS[name](inputs, 7)


def test_a_good_answer_passes_through():
    kept = torch.tensor([0, 2, 5])
    assert selector(kept)(SpanInputs(hidden=torch.zeros(6, 4)), 3) is kept
