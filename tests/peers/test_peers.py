"""Each peer on a case small enough to be worked out by hand."""

import math

import pytest
import torch

from ep_core import EntropyPruneError, SpanInputs
from ep_core.plugins import registry
from ep_peers import entropyprune_selectors, visionzip

from ..host_sync import NoWaiting  # noqa: TID252 # tests are no installed package

# random needs a seed on the host, and what VisionZip reads is there before
ON_THE_DEVICE = {each.name for each in entropyprune_selectors()} - {"random", "visionzip-style"}


def kept(method, k, **inputs):
    tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
    return registry().selector(method)(SpanInputs(**tensors), k).tolist()


def directions(*degrees):
    """Unit vectors in the plane."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack((angles.cos(), angles.sin()), dim=1)


@pytest.mark.parametrize(
    ("method", "expected"), [("hidden-norm-small", [0, 3]), ("hidden-norm-large", [1, 2])]
)
def test_hidden_norms_are_5_13_10_and_1(method, expected):
    hidden = [[3.0, 4.0], [5.0, 12.0], [6.0, 8.0], [0.0, 1.0]]
    assert kept(method, 2, hidden=hidden) == expected


@pytest.mark.parametrize(
    ("method", "expected"), [("query-norm-small", [1]), ("query-norm-large", [0])]
)
def test_query_norms_count_all_heads_together(method, expected):
    # squares: 9 + 9 = 18 against 16 + 1 = 17, though token 1 has the longest single head
    queries = [[[3.0, 0.0], [0.0, 3.0]], [[4.0, 0.0], [0.0, 1.0]]]
    assert kept(method, 1, queries=queries) == expected


def test_random_takes_every_token_about_equally_often():
    counts = torch.zeros(10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        counts[kept("random", 3, hidden=torch.randn(10, 4, generator=generator))] += 1
    spread = math.sqrt(1000 * 0.3 * 0.7)
    assert (counts - 300).abs().max() < 5 * spread, counts.tolist()


def test_random_depends_on_the_picture_alone():
    hidden = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    first = kept("random", 3, hidden=hidden)
    kept("random", 3, hidden=hidden + 1)
    assert kept("random", 3, hidden=hidden) == first


def test_fastv_reads_the_last_token_and_averages_heads():
    head_one = [[0.9, 0.0, 0.0], [0.1, 0.2, 0.3]]  # a token behind the picture a row
    head_two = [[0.9, 0.0, 0.0], [0.1, 0.5, 0.1]]
    # means of the last rows: 0.1, 0.35, 0.2
    assert kept("fastv", 2, attention=[head_one, head_two]) == [1, 2]
    assert kept("fastv", 1, attention=[head_one, head_two]) == [1]


def test_sparsevlm_averages_over_the_text_that_looks_at_the_picture():
    # sums 0.7, 0.1, 0.6, mean 0.47: rows 0 and 2 are raters; means 0.3, 0.1, 0.25
    attention = [[[0.6, 0.1, 0.0], [0.0, 0.0, 0.1], [0.0, 0.1, 0.5]]]
    assert kept("sparsevlm-style", 2, attention=attention) == [0, 2]
    # a rater decides, the others do not: with all rows 2 would lead by 0.6 against 0.55
    attention = [[[0.55, 0.0, 0.3], [0.0, 0.0, 0.15], [0.0, 0.0, 0.15]]]
    assert kept("sparsevlm-style", 1, attention=attention) == [0]


def test_dart_gives_each_pivot_its_share_of_the_least_similar():
    """Ten tokens of nine directions; the first eight have the largest queries."""
    hidden = directions(0, 0, 0, 0, 0, 0, 0, 90, 45, 91, 10, 80)
    queries = torch.zeros(12, 1, 1)
    queries[:8] = torch.arange(8, 0, -1.0)[:, None, None]
    # one more: shares are rounded so that the last pivot (90 degrees) has it, and 10 is farthest
    assert kept("dart", 9, hidden=hidden, queries=queries) == [0, 1, 2, 3, 4, 5, 6, 7, 10]
    # two more: the fourth pivot (0 degrees) has one, and 91 is farthest from that
    assert kept("dart", 10, hidden=hidden, queries=queries) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]


def test_dart_keeps_pivots_only_where_it_keeps_no_more():
    queries = torch.tensor([1.0, 3.0, 2.0])[:, None, None]
    assert kept("dart", 2, hidden=directions(0, 1, 90), queries=queries) == [1, 2]


def test_divprune_starts_at_the_loneliest_and_goes_on_to_the_farthest():
    # nearest neighbours are 2, 2, 38, 8, 8 degrees away: 2 leads; then 4 is 48 and 0 is 40 away
    # from it; then 0 is 40 away from the nearest kept, 1 is 38, 3 is 8
    hidden = directions(0, 2, 40, 80, 88)
    assert kept("divprune", 1, hidden=hidden) == [2]
    assert kept("divprune", 2, hidden=hidden) == [2, 4]
    assert kept("divprune", 3, hidden=hidden) == [0, 2, 4]


def test_a_token_without_a_direction_is_no_diversity():
    hidden = torch.cat((directions(0, 60), torch.zeros(1, 2)))
    assert kept("divprune", 2, hidden=hidden) == [0, 1]


def test_max_volume_takes_the_longest_and_then_the_longest_residual():
    # lengths 5, 4, 3, 2; outside [5, 0] there are 0, 3 and 2 left; outside both nothing is
    hidden = [[5.0, 0.0], [-4.0, 0.0], [0.5, 3.0], [0.0, -2.0]]
    assert kept("max-volume", 1, hidden=hidden) == [0]
    assert kept("max-volume", 2, hidden=hidden) == [0, 2]
    assert kept("max-volume", 3, hidden=hidden) == [0, 1, 2]


def test_max_volume_is_greedy_for_the_determinant():
    """Each step has the largest determinant of all that extend the step before."""
    hidden = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = []
    for k in range(1, 8):
        volume = {
            i: float((hidden[[*chosen, i]] @ hidden[[*chosen, i]].T).det())
            for i in set(range(12)) - set(chosen)
        }
        chosen.append(max(volume, key=volume.get))
        assert kept("max-volume", k, hidden=hidden) == sorted(chosen), f"of {k}"


def test_max_volume_ranks_what_is_not_finite_last():
    assert kept("max-volume", 2, hidden=[[math.nan, 1.0], [1.0, 0.0], [0.0, 2.0]]) == [1, 2]


def test_visionzip_takes_what_the_tower_looked_at():
    with visionzip.looking_at(torch.tensor([0.1, 0.4, 0.2, 0.3])):
        assert kept("visionzip-style", 2, hidden=torch.zeros(4, 1)) == [1, 3]
        with pytest.raises(EntropyPruneError, match="say which picture"):
            kept("visionzip-style", 2, hidden=torch.zeros(5, 1))
    with pytest.raises(EntropyPruneError, match="say which picture"):
        kept("visionzip-style", 2, hidden=torch.zeros(4, 1))


@pytest.mark.parametrize("method", sorted(ON_THE_DEVICE))
def test_no_choice_waits_for_the_device(method):
    with NoWaiting(), torch.device("meta"):
        inputs = SpanInputs(
            queries=torch.empty(30, 4, 8, dtype=torch.bfloat16),
            hidden=torch.empty(30, 32, dtype=torch.bfloat16),
            attention=torch.empty(4, 6, 30, dtype=torch.bfloat16),
        )
        assert registry().selector(method)(inputs, 12).shape == (12,)
