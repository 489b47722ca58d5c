"""What clients ask of pruning and what a server plans for it, without any engine."""

import json

import pytest

from ep_backends.shared.requests import (
    Wish,
    plan_prompt,
    read_wish,
    server_settings,
    session_wish,
)
from ep_core.backend import Request
from ep_core.budget import Keep, LayerAverage
from ep_core.errors import BudgetError, PolicyError, UnsupportedError
from ep_core.plan import Reason, Run, Unit
from ep_core.policy import PruningPolicy

SERVER = PruningPolicy(2, Keep(128), "rows", min_tokens=16)
CONFIG = {
    "model_type": "llava",
    "image_token_id": 9,
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
}
SETTINGS = server_settings(SERVER, CONFIG)
SMALL, LARGE, TINY = (Unit((Run(*run),)) for run in [(2, 66), (66, 642), (650, 660)])


def test_nothing_asked_is_the_servers_policy():
    assert read_wish(None, SERVER) == Wish(SERVER)
    assert read_wish({}, SERVER) == Wish(SERVER)


@pytest.mark.parametrize("asked", ["off", False])
def test_off_is_no_policy(asked):
    assert read_wish(asked, SERVER).policy is None


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ('{"keep": 64}', Keep(64)),
        ('{"keep": 0.5}', Keep(0.5)),
        ('{"keep": 1.0}', Keep(1.0)),
        ('{"average": 192}', LayerAverage(192)),
    ],
)
def test_a_budget_of_the_request_takes_the_servers_other_settings_along(text, budget):
    wish = read_wish(json.loads(text), SERVER)
    assert wish == Wish(PruningPolicy(2, budget, "rows", min_tokens=16), own=True)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("on", "cannot be read"),
        (True, "cannot be read"),
        (3, "cannot be read"),
        (0, "cannot be read"),
        ([], "cannot be read"),
        ({"keep": 4, "average": 5}, "both keep and average"),
        ({"layer": 3}, "a request cannot set 'layer', only keep, average"),
        ({"method": "rows"}, "a request cannot set 'method'"),
        ({"min_tokens": 3}, "a request cannot set 'min_tokens'"),
        ({"flops": 0.5}, "a request cannot set 'flops'"),
        ({"keep": "many"}, "is no number"),
        ({"keep": True}, "is no number"),
        ({"keep": float("nan")}, "outside"),
        ({"keep": 0}, "at least 1"),
        ({"keep": 1}, 'keep=1 is one token to some JSON writers.*{"keep": 0.5}.*"off"'),
        ({"average": 1}, "average=1 is one token to some"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_can(asked, message):
    with pytest.raises(PolicyError, match=message):
        read_wish(asked, SERVER)


def test_details_are_for_sessions_and_not_for_every_client():
    with pytest.raises(PolicyError, match="a request cannot set 'details'"):
        read_wish({"details": True}, SERVER)
    assert read_wish({"details": True}, SERVER, details=True) == Wish(SERVER, details=True)
    assert read_wish({"keep": 5, "details": True}, SERVER, details=True).details


def test_one_token_is_no_riddle_in_a_session():
    asked = session_wish(Request(("hi",), budget=Keep(1)), pruned=True)
    assert read_wish(asked, SERVER, details=True).policy.budget == Keep(1)


@pytest.mark.parametrize(
    ("budget", "asked"),
    [(None, {"details": True}), (Keep(5), {"keep": 5, "details": True}), ("off", "off")],
)
def test_a_session_asks_for_what_its_request_says(budget, asked):
    assert session_wish(Request(("hi",), budget=budget), pruned=True) == asked


def test_a_session_without_a_policy_asks_nothing():
    assert session_wish(Request(("hi",)), pruned=False) is None
    assert session_wish(Request(("hi",), budget="off"), pruned=False) is None
    with pytest.raises(UnsupportedError, match="where the server has a policy"):
        session_wish(Request(("hi",), budget=Keep(5)), pruned=False)


def keeps(units, *asked, tokens=700):
    wishes = [read_wish(one, SERVER) for one in asked]
    plan = plan_prompt(SETTINGS, units, wishes, tokens)
    assert [planned.unit for planned in plan.units] == list(units)
    return [planned.keep for planned in plan.units], plan.reason


def test_a_picture_that_the_servers_budget_does_not_fit_does_not_switch_off_the_others():
    assert keeps([SMALL, LARGE, TINY], None, None, None) == ([64, 128, 10], None)
    assert keeps([SMALL], None) == ([64], Reason.DOES_NOT_FIT)
    assert keeps([TINY], None) == ([10], Reason.KEEPS_ALL)  # at most min_tokens


def test_pictures_with_wishes_of_their_own_are_planned_each_by_its_own():
    assert keeps([SMALL, LARGE], {"keep": 4}, None) == ([4, 128], None)
    assert keeps([SMALL, LARGE], "off", {"keep": 0.25}) == ([64, 144], None)
    assert keeps([SMALL, LARGE], "off", "off") == ([64, 576], Reason.OFF)


def test_a_budget_of_the_request_that_does_not_fit_is_an_error_it_can_act_on():
    with pytest.raises(BudgetError, match="keep=64 or less") as caught:
        keeps([SMALL], {"keep": 500})
    assert "min_tokens" not in str(caught.value), "a request cannot set it"


def test_a_prompt_that_ends_inside_a_picture_is_not_pruned_in_any_part():
    assert keeps([SMALL, LARGE], {"keep": 4}, None, tokens=642) == ([64, 576], Reason.ENDS_INSIDE)
    assert keeps([], tokens=5) == ([], Reason.NO_PICTURES)


def test_a_method_that_reads_attention_maps_is_refused_in_a_server(monkeypatch):
    from ep_core.plugins import registry
    from ep_core.selectors import Selector

    spy = Selector("spy", "reads maps", frozenset({"attention"}), lambda inputs, k: None)
    monkeypatch.setitem(registry().selectors, "spy", spy)
    with pytest.raises(UnsupportedError, match="'spy' reads attention maps, which a server's"):
        server_settings(PruningPolicy(2, Keep(5), "spy"), CONFIG)
