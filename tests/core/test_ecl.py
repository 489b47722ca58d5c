"""The collapse layer: planted ones are found, everything else is refused with a reason."""

import json
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_core.ecl import EntropyProfile, find_collapse_layer
from ep_core.errors import EntropyPruneError

WIDTHS = st.integers(3, 12)
PROFILES = st.builds(
    EntropyProfile,
    st.text(max_size=20),
    WIDTHS.flatmap(
        lambda layers: st.lists(st.tuples(*[st.floats(0, 1)] * layers), min_size=1, max_size=6).map(
            tuple
        )
    ),
)


def profile(values):
    return EntropyProfile("a model", tuple(tuple(map(float, row)) for row in values))


def falling(samples=20, layers=12, *, slope=0.005, noise=0.004, drop=0.0, at=3, seed=0):
    """Entropies that fall slowly, with one drop between the inputs of layers at-1 and at."""
    rng = np.random.default_rng(seed)
    values = 0.9 - slope * np.arange(layers) + noise * rng.standard_normal((samples, layers))
    values[:, at:] -= drop
    return values


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("at", [1, 2, 7, 11])
def test_a_planted_collapse_is_found(at, seed):
    found = find_collapse_layer(profile(falling(drop=0.2, at=at, seed=seed)))
    assert (found.layer, found.candidate) == (at, at), found.reason
    assert found.drop == pytest.approx(0.2, abs=0.02)
    assert found.standard_drop >= 3
    assert found.share_of_samples == found.share_of_resamples == 1
    assert found.reason


@pytest.mark.parametrize("seed", range(10))
def test_a_steady_fall_is_no_collapse(seed):
    found = find_collapse_layer(profile(falling(seed=seed)))
    assert found.layer is None
    assert "needed" in found.reason


def test_an_entropy_that_only_rises_is_no_collapse():
    found = find_collapse_layer(profile(np.tile(np.linspace(0.2, 0.8, 9), (8, 1))))
    assert found.layer is None
    assert "falls before no layer" in found.reason


def test_a_constant_entropy_is_no_collapse():
    found = find_collapse_layer(profile(np.full((8, 9), 0.5)))
    assert found.layer is None
    assert "falls before no layer" in found.reason


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_too_few_samples_are_never_enough(samples):
    found = find_collapse_layer(profile(falling(samples, drop=0.3)))
    assert found.layer is None
    assert f"{samples} samples are too few, 4 are needed" in found.reason
    assert found.candidate == 3, "the candidate is named all the same"


def test_four_samples_are_enough_for_a_clear_collapse():
    assert find_collapse_layer(profile(falling(4, drop=0.3))).layer == 3


def test_outliers_among_the_samples_do_not_move_the_collapse():
    values = falling(20, drop=0.2, at=3)
    values[:4] = falling(4, drop=0.8, at=8, seed=9)
    values[4] = values[4, ::-1]
    assert find_collapse_layer(profile(values)).layer == 3


def test_a_drop_in_a_few_samples_only_is_no_collapse():
    values = falling(20)
    values[:6, 5:] -= 0.5
    assert find_collapse_layer(profile(values)).layer is None


def test_samples_that_disagree_on_the_layer_are_no_collapse():
    values = np.concatenate([falling(10, drop=0.2, at=3), falling(10, drop=0.2, at=8, seed=1)])
    found = find_collapse_layer(profile(values))
    assert found.layer is None
    assert "resamples agree" in found.reason


def test_a_drop_that_is_only_the_largest_of_many_alike_is_no_collapse():
    one = 0.9 - np.cumsum([0, 0.03, 0.05, 0.01, 0.04, 0.02, 0.03, 0.0])
    found = find_collapse_layer(profile(np.tile(one, (10, 1))))
    assert found.candidate == 2
    assert found.share_of_samples == found.share_of_resamples == 1, "nothing else is in doubt"
    assert found.layer is None
    assert "standard deviations of the other layers' drops, 3 are needed" in found.reason


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
def test_a_drop_is_stated_in_standard_deviations_of_the_other_layers_drops(scale):
    normal = NormalDist(mu=2 * scale, sigma=scale)
    others = [normal.inv_cdf(quantile) for quantile in np.linspace(0, 1, 41)[1:-1]]
    drops = np.insert(others, 7, normal.mean + 4 * scale)
    one = 0.9 - np.cumsum([0, *drops])
    found = find_collapse_layer(profile(np.tile(one, (10, 1))))
    assert found.candidate == 8
    assert found.standard_drop == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize(("deviations", "layer"), [(2.95, None), (3.05, 5)])
def test_three_robust_standard_deviations_are_needed(deviations, layer):
    sigma = 0.01 / NormalDist().inv_cdf(0.75)  # the others lie 0.01 around 0.02
    drops = [0.01, 0.03, 0.02, 0.01, 0.02 + deviations * sigma, 0.03, 0.01, 0.03]
    one = 0.9 - np.cumsum([0, *drops])
    found = find_collapse_layer(profile(np.tile(one, (10, 1))))
    assert (found.candidate, found.layer) == (5, layer), found.reason


def test_a_drop_in_hardly_more_than_half_of_the_samples_is_refused_for_that():
    values = falling(11, noise=0)
    values[:6, 4:] -= 0.3
    values[6:, 4:] += 0.05
    found = find_collapse_layer(profile(values))
    assert (found.layer, found.candidate) == (None, 4)
    assert "falls there in 55% of the samples, 60% are needed" in found.reason


def test_the_finding_is_the_same_each_time_for_a_seed():
    values = profile(np.concatenate([falling(9, drop=0.1), falling(11, drop=0.1, at=6, seed=1)]))
    assert find_collapse_layer(values, seed=4) == find_collapse_layer(values, seed=4)


def test_three_layers_are_too_few_to_tell_a_small_drop_from_noise():
    values = falling(20, layers=3, slope=0, noise=0.0001, drop=0.001, at=1)
    found = find_collapse_layer(profile(values))
    assert found.layer is None, f"one other layer has no spread: {found.standard_drop:.0f} sigma"


@given(PROFILES)
def test_json_reads_back_unchanged(value):
    assert EntropyProfile.from_json(value.to_json()) == value


@given(PROFILES)
def test_the_finder_answers_consistently_on_any_profile(value):
    found = find_collapse_layer(value)
    assert 1 <= found.candidate < len(value.entropies[0])
    assert found.layer in (None, found.candidate)
    assert 0 <= found.share_of_samples <= 1
    assert 0 <= found.share_of_resamples <= 1
    if len(value.entropies) < 4:
        assert found.layer is None
    medians = np.median(-np.diff(np.array(value.entropies), axis=1), axis=0)
    assert found.drop == medians.max() == medians[found.candidate - 1]


@pytest.mark.parametrize(
    "entropies", [(), ((),), ((0.5, 0.4),), ((0.5, 0.4, 0.3), (0.5, 0.4)), ((0.1,) * 3, (0.1,) * 4)]
)
def test_a_profile_needs_samples_of_the_same_three_or_more_layers(entropies):
    with pytest.raises(EntropyPruneError, match="3 or more layers"):
        EntropyProfile("a model", entropies)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5])
def test_an_entropy_outside_0_to_1_is_refused(value):
    with pytest.raises(EntropyPruneError):
        EntropyProfile("a model", ((0.5, value, 0.4),) * 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        "{}",
        json.dumps({"model": "m"}),
        json.dumps({"entropies": [[0.1, 0.2, 0.3]]}),
        json.dumps({"model": "m", "entropies": 3}),
        json.dumps({"model": "m", "entropies": [0.1, 0.2]}),
        json.dumps({"model": "m", "entropies": [[None, 0.2, 0.3]]}),
        json.dumps({"model": "m", "entropies": [["a", "b", "c"]]}),
        json.dumps({"model": "m", "entropies": [[0.1, 0.2]]}),
    ],
)
def test_text_that_is_no_profile_is_one_line_of_error(text):
    with pytest.raises(EntropyPruneError) as caught:
        EntropyProfile.from_json(text)
    assert type(caught.value) is EntropyPruneError
    assert "\n" not in str(caught.value)
