"""The policy: one value in three spellings, a digest, and errors that can be acted on."""

import json
import os
import re
import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_core.budget import FlopsReduction, Keep, LayerAverage
from ep_core.errors import EntropyPruneError, PolicyError
from ep_core.policy import ENV, PruningPolicy

COUNT = st.integers(1, 10**9)
SHARE = st.floats(0, 1, exclude_min=True)
BUDGET = st.one_of(
    st.builds(Keep, COUNT | SHARE),
    st.builds(LayerAverage, COUNT | SHARE),
    st.builds(FlopsReduction, st.floats(0, 1, exclude_min=True, exclude_max=True)),
)
POLICY = st.builds(
    PruningPolicy,
    layer=st.integers(1, 200) | st.just("auto"),
    budget=BUDGET,
    method=st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=12),
    min_tokens=st.integers(0, 5000),
)


def exactly(policy):
    """A policy's fields with the types of its numbers: 1 and 1.0 are equal but differ here."""
    fields = (policy.layer, policy.budget.key, policy.budget.value, policy.method)
    return [(type(field), field) for field in (*fields, policy.min_tokens)]


@given(POLICY)
def test_text_and_json_read_back_as_the_same_policy(policy):
    written = json.dumps(policy.to_json())
    for back in (
        PruningPolicy.parse(str(policy)),
        PruningPolicy.parse(written),
        PruningPolicy.from_json(json.loads(written)),
        PruningPolicy.from_environment({ENV: f"  {policy} "}),
    ):
        assert exactly(back) == exactly(policy)
        assert back.digest == policy.digest


@given(POLICY, POLICY)
def test_digests_differ_exactly_where_policies_differ(one, other):
    assert (one.digest == other.digest) == (exactly(one) == exactly(other))


@pytest.mark.parametrize(
    "other",
    [
        "layer=3,keep=128",
        "layer=auto,keep=128",
        "layer=2,keep=129",
        "layer=2,keep=0.128",
        "layer=2,average=128",
        "layer=2,flops=0.128",
        "layer=2,keep=128,method=rows",
        "layer=2,keep=128,min_tokens=1",
    ],
)
def test_each_field_changes_the_digest(other):
    digest = PruningPolicy.parse("layer=2,keep=128").digest
    assert re.fullmatch("[0-9a-f]{12}", digest)
    assert PruningPolicy.parse(other).digest != digest


def test_one_token_and_the_whole_span_are_different_policies():
    one, whole = (PruningPolicy.parse(f"layer=2,keep={value}") for value in ("1", "1.0"))
    assert type(one.budget.value) is int
    assert type(whole.budget.value) is float
    assert one.digest != whole.digest
    assert one != whole, "a cache keyed by the policy would mix them up"


def test_the_digest_is_the_same_in_every_process():
    text = "layer=2,average=0.25,method=set-entropy,min_tokens=64"
    code = f"from ep_core.policy import PruningPolicy; print(PruningPolicy.parse({text!r}).digest)"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert printed == PruningPolicy.parse(text).digest


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("layer=2,keep=128", PruningPolicy(2, Keep(128), "released", 0)),
        (" layer = 2 , keep = 128 ", PruningPolicy(2, Keep(128))),
        ("keep=.5,method=rows,layer=auto", PruningPolicy("auto", Keep(0.5), "rows")),
        ("layer=1,average=1e-1", PruningPolicy(1, LayerAverage(0.1))),
        ('{"layer": 2, "flops": 0.6}', PruningPolicy(2, FlopsReduction(0.6))),
        (
            '\n {"layer": "auto", "keep": 9, "min_tokens": 3}',
            PruningPolicy("auto", Keep(9), min_tokens=3),
        ),
        ("layer=2,keep=1,method=42", PruningPolicy(2, Keep(1), "42")),
    ],
)
def test_spellings(text, policy):
    assert exactly(PruningPolicy.parse(text)) == exactly(policy)


@pytest.mark.parametrize("environ", [{}, {ENV: ""}, {ENV: "  \n"}])
def test_nothing_in_the_environment_is_no_policy(environ):
    assert PruningPolicy.from_environment(environ) is None


def test_the_environment_of_the_process_is_read_at_the_call(monkeypatch):
    monkeypatch.delenv(ENV, raising=False)
    assert PruningPolicy.from_environment() is None
    monkeypatch.setenv(ENV, "layer=3,keep=7")
    assert PruningPolicy.from_environment() == PruningPolicy(3, Keep(7))


BAD = [  # text, what names the value, what says the allowed range
    ("", "''", "layer=2,keep=128"),
    ("on", "'on'", "layer=2,keep=128"),
    ("layer=2,keep=128,", "''", "layer=2,keep=128"),
    ("layer=2,keep=", "'keep='", "layer=2,keep=128"),
    ("layer=2,=3", "'=3'", "layer=2,keep=128"),
    ("keep=128", "layer", "auto"),
    ("layer=2", "none", "keep, average, flops"),
    ("layer=2,keep=1,average=2", "keep and average", "one budget"),
    ("layer=2,keep=1,layer=3", "layer is given twice", ""),
    ("layer=2,budget=1", "'budget'", "layer, keep, average, flops, method, min_tokens"),
    ("layer=0,keep=1", "layer=0", "at least 1"),
    ("layer=-1,keep=1", "layer=-1", "at least 1"),
    ("layer=1.5,keep=1", "layer=1.5", "at least 1"),
    ("layer=two,keep=1", "layer=two", "at least 1"),
    ("layer=2,keep=0", "keep=0", "at least 1"),
    ("layer=2,keep=1.5", "keep=1.5", "(0, 1]"),
    ("layer=2,keep=1e3", "keep=1000.0", "(0, 1]"),
    ("layer=2,keep=nan", "keep=nan", "(0, 1]"),
    ("layer=2,keep=25%", "keep='25%'", "no number"),
    ("layer=2,flops=1", "flops=1", "(0, 1)"),
    ("layer=2,flops=60", "flops=60", "(0, 1)"),
    ("layer=2,keep=1,method=a b", "method='a b'", "name"),
    ("layer=2,keep=1,min_tokens=-1", "min_tokens=-1", "at least 0"),
    ("layer=2,keep=1,min_tokens=0.5", "min_tokens=0.5", "at least 0"),
    ("layer=2,keep=1,min_tokens=few", "min_tokens=few", "at least 0"),
    ('{"layer": true, "keep": 1}', "layer=True", "at least 1"),
    ('{"layer": null, "keep": 1}', "layer=None", "at least 1"),
    ('{"layer": [2], "keep": 1}', "layer=[2]", "at least 1"),
    ('{"layer": 2, "keep": true}', "keep=True", "no number"),
    ('{"layer": 2, "keep": "128"}', "keep='128'", "no number"),
    ('{"layer": 2, "keep": 1, "method": 3}', "method=3", "name"),
    ('{"layer": 2, "keep": 1, "method": null}', "method=None", "name"),
    ('{"layer": 2, "keep": 1, "min_tokens": false}', "min_tokens=False", "at least 0"),
    ("{layer: 2}", "JSON", ""),
]


@pytest.mark.parametrize(("text", "names", "allowed"), BAD, ids=[text for text, _, _ in BAD])
def test_a_bad_policy_is_one_line_with_value_range_and_example(text, names, allowed):
    with pytest.raises(PolicyError) as caught:
        PruningPolicy.parse(text)
    message = str(caught.value)
    assert "\n" not in message
    assert names in message, f"the value is not named: {message}"
    assert allowed in message, f"the allowed range is missing: {message}"
    assert re.search(r"as in|such as|examples?\b", message), f"no example: {message}"


@pytest.mark.parametrize("value", [None, [], "layer=2,keep=1", 3])
def test_json_that_is_no_object_is_refused(value):
    with pytest.raises(PolicyError, match="must be a JSON object") as caught:
        PruningPolicy.from_json(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "layer=a\nb,keep=1",
        "layer=2,keep=a\nb",
        "layer=2,keep=1,min_tokens=a\nb",
        "layer=2,keep=1,method=a\nb",
        "a\nb=1,a\nb=2",
        "a\nb=1",
        "a\nb",
        '{"layer": "a\\nb", "keep": 1}',
        '{"layer": 2,\n"keep": 1,\n}',
    ],
)
def test_line_breaks_in_the_input_never_reach_the_message(text):
    with pytest.raises(PolicyError) as caught:
        PruningPolicy.parse(text)
    assert "\n" not in str(caught.value), "the message has more than one line"


@pytest.mark.parametrize(
    "text", ["layer=2,keep=1" + "0" * 5000, "layer=9" + "0" * 5000 + ",keep=1"]
)
def test_a_number_too_long_for_python_is_an_error_of_ours(text):
    with pytest.raises(EntropyPruneError):
        PruningPolicy.parse(text).at_layer(2, 32)


def test_a_setting_given_twice_in_json_is_refused_as_in_text():
    with pytest.raises(PolicyError, match="layer is given twice"):
        PruningPolicy.parse('{"layer": 2, "layer": 3, "keep": 1}')


@given(st.text(max_size=40) | st.text('laye=r2,kp.1{}":[] \n', max_size=40))
def test_any_text_is_a_policy_or_one_line_of_error(text):
    try:
        policy = PruningPolicy.parse(text)
    except PolicyError as error:
        message = str(error)
    else:
        assert exactly(PruningPolicy.parse(str(policy))) == exactly(policy)
        return
    assert "\n" not in message


def test_a_budget_must_be_a_budget():
    with pytest.raises(PolicyError, match=r"budget=128 is no budget; an example is Keep\(128\)"):
        PruningPolicy(2, 128)


def test_a_policy_cannot_change():
    with pytest.raises(AttributeError):
        PruningPolicy(2, Keep(1)).layer = 3


@pytest.mark.parametrize(
    ("layer", "default", "layers", "settled"), [(2, 1, 32, 2), ("auto", 1, 28, 1), (31, 2, 32, 31)]
)
def test_the_layer_is_settled_for_a_model(layer, default, layers, settled):
    policy = PruningPolicy(layer, Keep(5), "rows", 3)
    assert policy.at_layer(default, layers) == PruningPolicy(settled, Keep(5), "rows", 3)


@pytest.mark.parametrize(("layer", "layers"), [(32, 32), (100, 32), ("auto", 2)])
def test_a_layer_behind_the_model_is_refused_with_what_is_allowed(layer, layers):
    with pytest.raises(PolicyError, match=f"allowed are 1 to {layers - 1}") as caught:
        PruningPolicy(layer, Keep(5)).at_layer(2, layers)
    assert f"layer={2 if layer == 'auto' else layer} " in str(caught.value)
