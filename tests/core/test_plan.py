"""Units of a prompt, what a plan keeps of them, and the plan that settings make."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_core.budget import FlopsReduction, Keep, LayerAverage
from ep_core.errors import BudgetError, EntropyPruneError, PolicyError, UnsupportedError
from ep_core.family import Decoder
from ep_core.plan import PlannedUnit, Reason, RequestPlan, Run, Unit, Unprunable, runs_of
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy
from ep_core.settings import Settings

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
    assert runs_of(token_ids, IMAGE) == [Run(*run) for run in runs]


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (4, 3), (-1, 2)])
def test_a_run_holds_at_least_one_token(start, stop):
    with pytest.raises(EntropyPruneError, match="at least one token"):
        Run(start, stop)


def unit(*runs, **facts):
    return Unit(tuple(Run(*run) for run in runs), **facts)


def test_a_unit_of_several_runs_knows_its_tokens_and_its_separators():
    rows = unit((4, 7), (8, 11), (13, 14), grid=(1, 7))
    assert (rows.start, rows.stop, len(rows)) == (4, 14, 7)
    assert rows.offsets == [0, 1, 2, 4, 5, 6, 9]
    assert rows.separators == [3, 7, 8]


@pytest.mark.parametrize(
    ("runs", "facts", "message"),
    [
        ([], {}, "at least one run"),
        ([(1, 3), (3, 5)], {}, "touch or cross"),
        ([(4, 6), (1, 3)], {}, "touch or cross"),
        ([(0, 6)], {"grid": (2, 4)}, "2 x 4 does not hold 6"),
    ],
)
def test_an_impossible_unit_is_refused(runs, facts, message):
    with pytest.raises(EntropyPruneError, match=message):
        unit(*runs, **facts)


@pytest.mark.parametrize("keep", [0, 7])
def test_a_unit_keeps_one_to_all_of_its_tokens(keep):
    with pytest.raises(EntropyPruneError, match=f"cannot keep {keep} of the 6 tokens"):
        PlannedUnit(unit((2, 8)), keep)


def a_plan(*units, tokens=100):
    return RequestPlan(tuple(PlannedUnit(*pair) for pair in units), tokens)


PLAN = a_plan(
    (unit((2, 12)), 4),  # loses 6
    (unit((12, 22)), 10),  # whole
    (unit((30, 34), (36, 40)), 3),  # loses 5; two separators
    tokens=50,
)


def test_a_plan_counts_what_it_drops():
    assert (PLAN.visual_tokens, PLAN.dropped, PLAN.why) == (28, 11, None)
    assert [planned.unit.start for planned in PLAN.pruned] == [2, 30]


@pytest.mark.parametrize(
    ("position", "dropped", "cut", "kept"),
    [
        (0, 0, None, 0),
        (2, 0, None, 2),
        (3, 0, 2, 2),  # the first picture waits
        (11, 0, 2, 2),
        (12, 6, None, 6),
        (17, 6, None, 11),  # inside a picture that stays whole
        (30, 6, None, 24),
        (35, 6, 30, 24),  # between two runs: the separator waits too
        (40, 11, None, 29),
        (50, 11, None, 39),
    ],
)
def test_what_layers_from_k_on_hold_at_a_position(position, dropped, cut, kept):
    assert PLAN.dropped_before(position) == dropped
    found = PLAN.unit_at(position)
    assert (found and found.unit.start) == cut
    assert PLAN.kept_length(position) == kept


def test_a_plan_drops_tokens_or_says_why_not():
    whole = RequestPlan.whole([unit((1, 5))], 9, Reason.OFF)
    assert (whole.dropped, whole.kept_length(9), whole.why) == (0, 9, "switched off by the request")
    with pytest.raises(EntropyPruneError, match="or says why not"):
        a_plan((unit((1, 5)), 4))
    with pytest.raises(EntropyPruneError, match="or says why not"):
        replace(PLAN, reason=Reason.OFF)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([(2, 12), (8, 20)], "cross, or are not in order"),
        ([(30, 40), (2, 12)], "cross, or are not in order"),
        ([(2, 12), (90, 101)], "ends behind a prompt of 100"),
    ],
)
def test_units_of_a_plan_stand_one_behind_the_other_inside_the_prompt(units, message):
    with pytest.raises(EntropyPruneError, match=message):
        a_plan(*[(unit(run), 3) for run in units])


def test_an_unprunable_prompt_has_a_reason_that_is_counted_and_a_detail_that_is_read():
    error = Unprunable(Reason.LAYOUT, "a run of 7 tokens")
    plan = RequestPlan.whole((), 20, error.reason, error.detail)
    assert plan.reason is Reason.LAYOUT
    assert plan.why == str(error) == "the pictures cannot be told apart: a run of 7 tokens"
    assert str(Unprunable(Reason.OTHER_MEDIA)) == "video and audio prompts are not pruned yet"


def test_reasons_differ():
    assert len({str(reason) for reason in Reason}) == len(Reason)


LLAVA = {
    "model_type": "llava",
    "image_token_id": IMAGE,
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
}


def settings(budget, layer=2, **more):
    return Settings.of(PruningPolicy(layer, budget, **more), LLAVA)


def counts(made, units, prompt_tokens, **options):
    return [planned.keep for planned in made.plan(units, prompt_tokens, **options).units]


UNITS = [unit((2, 66)), unit((70, 646)), unit((646, 710))]  # 64, 576, 64 tokens


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [(0, [16, 144, 16]), (63, [16, 144, 16]), (64, [64, 144, 64]), (576, [64, 576, 64])],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_units_of_at_most_min_tokens_stay_whole(min_tokens, expected, lenient):
    made = settings(Keep(0.25), min_tokens=min_tokens)
    assert counts(made, UNITS, 800, lenient=lenient) == expected


def test_a_budget_that_does_not_fit_a_unit_is_refused():
    with pytest.raises(BudgetError, match=r"keep=128.*min_tokens=64"):
        settings(Keep(128)).plan(UNITS, 800)
    assert counts(settings(Keep(128), min_tokens=64), UNITS, 800) == [64, 128, 64]


def test_only_a_reader_who_sets_the_policy_is_told_of_min_tokens():
    made = settings(Keep(10))
    with pytest.raises(BudgetError) as caught:
        made.plan(UNITS, 800, policy=PruningPolicy(2, Keep(128)))
    assert "min_tokens" not in str(caught.value)


def test_a_lenient_plan_leaves_whole_what_the_budget_does_not_fit_and_prunes_the_rest():
    plan = settings(Keep(128)).plan(UNITS, 800, lenient=True)
    assert [planned.keep for planned in plan.units] == [64, 128, 64]
    assert plan.reason is None


@pytest.mark.parametrize(
    ("budget", "more", "units", "tokens", "reason"),
    [
        (Keep(5), {}, [], 30, Reason.NO_PICTURES),
        (Keep(5), {}, UNITS, 710, Reason.ENDS_INSIDE),
        (Keep(1.0), {}, UNITS, 800, Reason.KEEPS_ALL),
        (Keep(0.5), {"min_tokens": 600}, UNITS, 800, Reason.KEEPS_ALL),
        (Keep(700), {}, UNITS, 800, Reason.DOES_NOT_FIT),
        (LayerAverage(2), {}, UNITS, 800, Reason.DOES_NOT_FIT),
        (FlopsReduction(0.95), {}, UNITS[:1], 2000, Reason.DOES_NOT_FIT),
    ],
)
def test_what_is_not_pruned_has_its_own_reason(budget, more, units, tokens, reason):
    plan = settings(budget, **more).plan(units, tokens, lenient=True)
    assert plan.reason is reason
    assert plan.dropped == 0
    assert len(plan.units) == len(units)


def test_whole_units_and_text_count_as_tokens_that_stay_for_flops():
    made = settings(FlopsReduction(0.5), min_tokens=64)
    plan = made.plan(UNITS, 800)
    assert [plan.units[0].keep, plan.units[2].keep] == [64, 64]
    assert made.shape.flops_reduction(800, 800 - plan.dropped, 2) >= 0.5
    assert made.shape.flops_reduction(800, 801 - plan.dropped, 2) < 0.5, "one more could stay"


def test_a_reduction_in_flops_is_one_for_all_units_of_a_prompt():
    """Alone, the smaller picture could not reach the reduction and would stay whole."""
    units = [unit((2, 14)), unit((20, 66))]
    made = settings(FlopsReduction(0.3))
    joint = counts(made, units, 80, lenient=True)
    assert joint == counts(made, units, 80), "a server plans as a program does"
    assert max(joint[0] / 12, joint[1] / 46) < 1
    assert counts(made, units[:1], 80, lenient=True) == [12]


def test_another_policy_than_the_servers_is_planned_at_the_servers_layer():
    made = settings(Keep(10), layer=4)
    own = PruningPolicy(2, LayerAverage(128))
    assert counts(made, UNITS[1:2], 800, policy=own) == [64]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 80)), max_size=5), st.data())
def test_a_plan_keeps_one_to_all_of_each_unit(gaps_and_lengths, data):
    units, at = [], 0
    for gap, length in gaps_and_lengths:
        units.append(unit((at + gap, at + gap + length)))
        at = units[-1].stop
    made = settings(Keep(data.draw(st.floats(0.01, 1))), min_tokens=data.draw(st.integers(0, 40)))
    plan = made.plan(units, at + 5)
    assert [planned.unit for planned in plan.units] == units
    for planned in plan.units:
        assert 1 <= planned.keep <= len(planned.unit)
        assert not planned.dropped or len(planned.unit) > made.policy.min_tokens


def test_settings_settle_the_layer_once():
    made = settings(Keep(5), layer="auto")
    assert (made.layer, made.policy.layer) == (2, 2)
    with pytest.raises(PolicyError, match="layer=32 is out of range for a model of 32 layers"):
        settings(Keep(5), layer=32)


def with_decoder(monkeypatch, **facts):
    family = registry().family("llava")
    shape = family.decoder(LLAVA).shape
    changed = replace(family, decoder=lambda config: Decoder(shape, **facts), default_layer=3)
    monkeypatch.setitem(registry().families, "llava", changed)


def test_kinds_of_layers_that_no_engine_prunes_are_refused_by_name(monkeypatch):
    with_decoder(monkeypatch, layer_kinds=frozenset({"full_attention", "linear_attention"}))
    with pytest.raises(UnsupportedError, match="a decoder with linear_attention is not supported"):
        settings(Keep(5))


def test_a_layer_behind_which_features_are_added_is_refused_with_one_that_works(monkeypatch):
    with_decoder(monkeypatch, adds_after=frozenset({0, 1, 2}))
    with pytest.raises(PolicyError, match=r"layer=2 does not work for LLaVA-1.5.*use layer=3"):
        settings(Keep(5), layer=2)
    assert settings(Keep(5), layer=3).layer == settings(Keep(5), layer="auto").layer == 3
