"""Passes: what layers >= K compute, against a prompt that is pruned whole by a few plain loops."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_core import kernels
from ep_core.compaction import HIDDEN, QUERIES, Pass
from ep_core.errors import EntropyPruneError
from ep_core.plan import PlannedUnit, RequestPlan, Run, Unit
from ep_core.selectors import Selector, entropyprune_selectors, top_k

from ..host_sync import KERNELS, NoWaiting  # noqa: TID252 # tests are no installed package

SELECTORS = {selector.name: selector for selector in entropyprune_selectors()}
# a method whose choice can be read off the tensors: the largest first entries
LARGEST = Selector(
    "largest", "for tests", frozenset({"hidden"}), lambda inputs, k: top_k(inputs.hidden[:, 0], k)
)


def unit(*runs):
    return Unit(tuple(Run(*run) for run in runs))


def plan_of(tokens, *units):
    return RequestPlan.of([PlannedUnit(*pair) for pair in units], tokens)


def expected_positions(plan, hidden):
    """Prompt positions that survive: text, separators, and the largest of each unit."""
    gone = set()
    for planned in plan.units:
        own = [at for run in planned.unit.runs for at in range(run.start, run.stop)]
        best = sorted(own, key=lambda at: (-float(hidden[at, 0]), at))[: planned.keep]
        gone |= set(own) - set(best)
    return [at for at in range(plan.prompt_tokens) if at not in gone]


@st.composite
def prompts(draw):
    """A plan with random units, of one or several runs, text around and between them."""
    at, units = draw(st.integers(0, 3)), []
    for _ in range(draw(st.integers(0, 3))):
        runs = []
        for _ in range(draw(st.integers(1, 3))):
            length = draw(st.integers(1, 6))
            runs.append((at, at + length))
            at += length + draw(st.integers(1, 2))
        at += draw(st.integers(-1, 3))  # -1: the next picture touches this one
        units.append((unit(*runs), draw(st.integers(1, sum(b - a for a, b in runs)))))
    return plan_of(at + draw(st.integers(1, 4)), *units)


def embed(tokens, seed):
    """`[T, 3]` hidden states: a value to rank by, the seed, the prompt position."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randperm(tokens, generator=generator).float()
    return torch.stack([values, torch.full_like(values, seed), torch.arange(tokens).float()], 1)


@given(st.lists(prompts(), min_size=1, max_size=3), st.data())
def test_passes_over_chunks_of_several_requests_give_what_a_whole_prompt_gives(plans, data):
    """Random chunks, batches and waiting parts; every tensor is taken along; outputs spread."""
    prompts_hidden = [embed(plan.prompt_tokens, seed) for seed, plan in enumerate(plans)]
    done = [0] * len(plans)
    waiting = [None] * len(plans)
    computed = [[] for _ in plans]  # prompt positions, as layers >= K get them
    while any(at < plan.prompt_tokens for at, plan in zip(done, plans, strict=True)):
        current, batch, numbers = Pass(), [], []
        for i, plan in enumerate(plans):
            left = plan.prompt_tokens - done[i]
            new = data.draw(st.integers(0, left))
            if not new and not (i == len(plans) - 1 and not batch and left):
                continue
            new = new or left
            held = current.add(plan, new, prefix=done[i], waiting=waiting[i])
            assert held.prefix == len(computed[i]), "tokens that layers >= K hold before"
            waiting[i] = held.waiting
            batch.append(prompts_hidden[i][done[i] : done[i] + new])
            numbers.append(i)
            done[i] += new
        if not batch:
            continue
        hidden = torch.cat(batch)
        current.choose(LARGEST, hidden)
        rows = current.take(hidden, HIDDEN)
        positions = current.take(hidden[:, 2].expand(3, -1), "positions", dim=-1)
        assert positions.tolist() == [rows[:, 2].tolist()] * 3
        assert len(rows) == sum(current.lengths)
        for i, request, own in zip(
            numbers, current.requests, rows.split(current.lengths), strict=True
        ):
            assert set(own[:, 1].tolist()) == {i}, "rows of another request"
            if not request.stands_in:
                computed[i] += own[:, 2].int().tolist()
            assert request.held == len(computed[i])
            assert request.held == plans[i].kept_length(done[i])
        spread = current.spread(rows, -1.0)
        assert len(spread) == len(hidden)
        answered = spread[:, 0] >= 0
        assert torch.equal(spread[answered], hidden[answered]), "an output went to another row"
    for plan, hidden, positions in zip(plans, prompts_hidden, computed, strict=True):
        assert positions == expected_positions(plan, hidden)


def test_a_pass_without_pictures_changes_nothing():
    current = Pass()
    current.add(None, 4)
    current.add(plan_of(9, (unit((2, 5)), 3)), 3, prefix=6)
    assert not current.shortens
    assert (current.lengths, current.prefixes, current.tokens) == ([4, 3], [0, 6], 7)


def test_a_request_whose_tokens_all_wait_computes_one_that_stands_in():
    current = Pass()
    plan = plan_of(20, (unit((0, 10)), 2))
    first, other = current.add(plan, 4), current.add(None, 3)
    assert (first.length, first.held, first.stop, first.stands_in) == (1, 0, 0, True)
    assert (other.length, other.held, other.stands_in) == (3, 3, False)
    hidden = embed(7, seed=1)
    current.choose(LARGEST, hidden)
    assert current.index.tolist() == [0, 4, 5, 6]
    assert current.take(hidden, HIDDEN)[:, 2].tolist() == [0, 4, 5, 6]
    assert torch.equal(first.waiting.rows[HIDDEN], hidden[:4])


def test_rows_may_lie_apart_in_a_padded_batch():
    """Two prompts of 5 and 3 tokens, padded on the left to 5 columns."""
    current = Pass(tokens=10)
    current.add(plan_of(5, (unit((1, 4)), 1)), 5, first=0)
    current.add(plan_of(3, (unit((0, 2)), 1)), 3, first=7)
    hidden = embed(10, seed=2)
    current.choose(LARGEST, hidden)
    best = [max(own, key=lambda row: float(hidden[row, 0])) for own in ([1, 2, 3], [7, 8])]
    assert current.index.tolist() == [0, best[0], 4, best[1], 9]
    assert current.lengths == [3, 2]


def test_what_is_dropped_is_the_rest_of_the_unit():
    current = Pass()
    current.add(plan_of(12, (unit((1, 4), (5, 8)), 2)), 12)
    hidden = embed(12, seed=3)
    current.choose(LARGEST, hidden)
    [ranked] = current.units
    kept = ranked.offsets(ranked.kept).tolist()
    assert sorted(kept + ranked.gone.tolist()) == [0, 1, 2, 4, 5, 6]
    assert ranked.stay().tolist() == sorted([*kept, 3])


@pytest.mark.parametrize("waiting", [None, "another position"])
def test_a_prefix_that_ends_inside_a_unit_needs_its_first_part(waiting):
    plan = plan_of(20, (unit((2, 12)), 3))
    part = None
    if waiting:
        part = Pass().add(plan, 4).waiting
    with pytest.raises(EntropyPruneError, match=r"a prefix of 6 tokens ends inside .*\[2, 12\)"):
        Pass().add(plan, 10, prefix=6, waiting=part)


def test_a_request_that_starts_again_forgets_what_waited():
    plan = plan_of(20, (unit((2, 12)), 3))
    stale = Pass().add(plan, 4).waiting
    current = Pass()
    current.add(plan, 20, waiting=stale)
    assert current.units[0].waited is None


def test_tensors_that_wait_are_copies():
    plan = plan_of(20, (unit((0, 10)), 3))
    first = Pass()
    request = first.add(plan, 6)
    hidden = embed(6, seed=4)
    before = hidden.clone()
    first.choose(LARGEST, hidden)
    first.take(hidden, HIDDEN)
    hidden.zero_()  # an engine reuses its buffers
    assert torch.equal(request.waiting.rows[HIDDEN], before)


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("cuts", [(), (7,), (3, 7, 12)])
def test_a_unit_is_ranked_alone_whatever_stands_around_it(name, cuts):
    """Alone, behind other tokens, beside another picture, and in chunks: the same tokens."""
    generator = torch.Generator().manual_seed(5)
    queries, hidden = (
        torch.randn(24, 4, 8, generator=generator),
        torch.randn(24, 32, generator=generator),
    )
    alone = Pass()
    alone.add(plan_of(17, (unit((0, 16)), 5)), 17)
    alone.choose(SELECTORS[name], hidden[4:21], queries[4:21])
    plan = plan_of(24, (unit((1, 4)), 2), (unit((4, 20)), 5))
    waiting, kept = None, []
    for start, stop in itertools.pairwise([0, *cuts, 24]):
        current = Pass()
        waiting = current.add(plan, stop - start, prefix=start, waiting=waiting).waiting
        current.choose(SELECTORS[name], hidden[start:stop], queries[start:stop])
        current.take(hidden[start:stop], HIDDEN)
        kept += [one.kept.tolist() for one in current.units if one.unit.start == 4]
    assert kept == [alone.units[0].kept.tolist()]


@pytest.mark.parametrize("told", [None, [0, 1, 2]])
def test_ranks_see_all_heads_and_take_the_first_ranks_choice(told):
    """The first rank gathers both halves of the heads and chooses; another one is told."""
    queries = torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(6))
    plan = plan_of(9, (unit((0, 8)), 3))
    whole = Pass()
    whole.add(plan, 9)
    padded = torch.cat([queries, queries[:1]])
    whole.choose(SELECTORS["rows"], padded.flatten(1), padded)

    class Ranks:
        def all_gather(self, tensor, dim):
            assert tensor.shape == (8, 3, 4)
            return queries

        def broadcast(self, tensor):
            if told is not None:
                tensor.copy_(torch.tensor(told))

    split = Pass()
    split.add(plan, 9)
    split.choose(SELECTORS["rows"], padded.flatten(1), padded[:, :3], ranks=Ranks())
    by_all_heads = whole.units[0].kept.tolist()
    half = Pass()
    half.add(plan, 9)
    half.choose(SELECTORS["rows"], padded.flatten(1), padded[:, :3])
    assert half.units[0].kept.tolist() != by_all_heads, "half of the heads would do: shows nothing"
    assert split.units[0].kept.tolist() == (told or by_all_heads)
    assert split.index.tolist() == [*(told or by_all_heads), 8]


def test_queries_of_a_part_wait_under_their_name():
    plan = plan_of(20, (unit((2, 12)), 3))
    current = Pass()
    request = current.add(plan, 5)
    queries = torch.randn(5, 2, 4)
    current.choose(SELECTORS["rows"], torch.randn(5, 8), queries)
    assert torch.equal(request.waiting.rows[QUERIES], queries[2:])


@pytest.mark.parametrize("cut", [5, 9, 24])
def test_copied_queries_may_be_overwritten(cut):
    """RoPE rotates them in place before layer K is reached."""
    generator = torch.Generator().manual_seed(8)
    queries, hidden = (
        torch.randn(24, 4, 8, generator=generator),
        torch.randn(24, 32, generator=generator),
    )
    plan = plan_of(24, (unit((1, 4)), 2), (unit((4, 12), (13, 20)), 5))
    whole = Pass()
    whole.add(plan, 24)
    whole.choose(SELECTORS["released"], hidden, queries)
    found, waiting = [], None
    for start, stop in itertools.pairwise(sorted({0, cut, 24})):
        current = Pass()
        waiting = current.add(plan, stop - start, prefix=start, waiting=waiting).waiting
        own = queries[start:stop].clone()
        current.copy_queries(own)
        own.zero_()
        current.choose(SELECTORS["released"], hidden[start:stop])
        current.take(hidden[start:stop], HIDDEN)
        found += [ranked.kept.tolist() for ranked in current.units]
        assert not any(ranked.queries is not None for ranked in current.units), "held for longer"
    assert found == [ranked.kept.tolist() for ranked in whole.units]


def test_attention_maps_are_asked_for_by_unit():
    seen = []

    def attention(ranked):
        seen.append((ranked.request, ranked.unit.start))
        return torch.rand(2, 3, len(ranked.unit))

    method = Selector(
        "map", "for tests", frozenset({"attention"}), lambda inputs, k: torch.arange(k)
    )
    current = Pass()
    current.add(plan_of(9, (unit((1, 5)), 2)), 9)
    current.add(plan_of(9, (unit((2, 6)), 2)), 9)
    current.choose(method, torch.zeros(18, 4), attention=attention)
    assert seen == [(0, 1), (1, 2)]


def test_nothing_is_taken_before_the_tokens_are_chosen():
    current = Pass()
    current.add(plan_of(9, (unit((1, 5)), 2)), 9)
    with pytest.raises(EntropyPruneError, match="not chosen"):
        current.take(torch.zeros(9, 2))
    with pytest.raises(EntropyPruneError, match="not chosen"):
        current.units[0].gone  # noqa: B018 # the property is what raises


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_nothing_waits_for_the_device(monkeypatch, name):
    """A prompt in two chunks, the first of which ends inside the second picture."""
    monkeypatch.setitem(kernels._found, "meta", KERNELS)
    with NoWaiting():
        take_on_meta(SELECTORS[name])


def take_on_meta(selector):
    current = Pass()
    plan = plan_of(40, (unit((2, 12), (13, 20)), 3), (unit((22, 34)), 4))
    part = current.add(plan, 26).waiting
    hidden, queries = torch.empty(26, 16, device="meta"), torch.empty(26, 4, 8, device="meta")
    current.choose(selector, hidden, queries)
    current.take(hidden, HIDDEN)
    current.take(torch.empty(26, device="meta"), "positions")
    rest = Pass()
    rest.add(plan, 14, prefix=26, waiting=part)
    rest.choose(selector, hidden[:14], queries[:14])
    assert rest.spread(rest.take(hidden[:14], HIDDEN), 0.0).shape == (14, 16)
    assert rest.take(torch.empty(14, device="meta"), "positions").shape == (10,)
    assert rest.units[0].gone.shape == (8,)
