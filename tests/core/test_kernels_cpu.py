"""The C++ kernels of every instruction set that this processor runs, against float64."""

import math
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

from ep_conformance.selection_cases import stored_cases, stored_tensors
from ep_core.entropy import NORMALIZATIONS, cosine_gram, matrix_entropy
from ep_core.kernels import build, cpu
from ep_core.kernels.interface import Unavailable
from ep_core.kernels.reference import greedy_renyi2 as greedy_renyi2_torch
from ep_core.selectors import top_k

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [  # tokens, heads, head_dim: odd ones, the smallest, the largest
    (21, 32, 128),
    (16, 28, 128),
    (17, 64, 256),
    (5, 63, 255),
    (9, 40, 80),
    (33, 9, 4),
    (7, 5, 17),
    (6, 2, 1),
    (6, 3, 2),
    (5, 64, 1),
    (1, 16, 96),
]
BOUND = 1e-5  # docs/kernels.md


def available():
    """The variants that were built and that this processor runs."""
    try:
        best = cpu.open_library("baseline").ep_variant()
    except Unavailable:
        return []
    return [v for v in list(build.VARIANTS)[: best + 1] if build.library(v).exists()]


@pytest.fixture(params=available() or ["none"])
def library(request):
    if request.param == "none":
        pytest.skip("no compiled library (entropyprune doctor says why)")
    return cpu.open_library(request.param)


def queries(tokens, heads, head_dim, *, seed=0, dtype=torch.float32):
    """Heads of uneven strength that share a direction by a degree that differs between tokens."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(tokens, heads, head_dim, generator=generator)
    strength = 0.1 + torch.rand(tokens, heads, 1, generator=generator)
    shared = torch.randn(tokens, 1, head_dim, generator=generator)
    degree = torch.randn(tokens, heads, 1, generator=generator)
    degree *= 3 * torch.rand(tokens, 1, 1, generator=generator)
    return ((own * strength + degree * shared) * torch.linspace(1, 0.1, head_dim)).to(dtype)


def exact(q, normalize):
    """The formula in numpy, from singular values, and the unit in which errors are stated."""
    scores, units = [], []
    for token in q.double().numpy():
        heads = len(token)
        x = token - token.mean(axis=0)
        if normalize == "rows":
            norms = np.sqrt((x * x).sum(axis=1, keepdims=True))
            x = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
        spectrum = np.linalg.svd(x, compute_uv=False) ** 2 / heads
        if normalize == "trace" and spectrum.sum():
            spectrum = spectrum / spectrum.sum()
        trace = spectrum.sum()
        spectrum = spectrum[spectrum > 0]
        score = -(spectrum * np.log(spectrum)).sum() / math.log(heads)
        scores.append(score)
        unit = max(abs(score), trace / math.log(heads)) if normalize == "none" else 1.0
        units.append(unit or 1.0)
    return np.array(scores), np.array(units)


def assert_close(library, q, normalize):
    expected, units = exact(q, normalize)
    actual = cpu.matrix_entropy(library, q, normalize)
    assert actual.dtype == torch.float32
    error = np.abs(actual.double().numpy() - expected) / units
    worst = int(error.argmax())
    assert error[worst] <= BOUND, (
        f"token {worst}: {float(actual[worst])}, float64 says {expected[worst]}, off by "
        f"{error[worst]:.1e} of {units[worst]:.3g}"
    )


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), SHAPES)
def test_scores_are_float64s_within_the_bound(library, tokens, heads, head_dim, dtype, normalize):
    q = queries(tokens, heads, head_dim, seed=heads + head_dim, dtype=dtype)
    assert_close(library, q, normalize)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("offset", [30.0, 1e4, 1e7])
def test_a_common_offset_far_larger_than_the_spread_costs_no_digits(library, offset, normalize):
    assert_close(library, queries(20, 28, 96) + offset, normalize)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-21, 1e-19, 1e-12, 1e12, 1e16, 1e20, 1e36])
def test_scales_at_which_float32_squares_overflow_or_vanish(library, scale, normalize):
    q = queries(20, 16, 24) * scale
    if normalize == "none" and not 1e-20 < scale < 1e17:
        # the score itself is not a float32 number
        assert torch.equal(
            cpu.matrix_entropy(library, q, "none"),
            matrix_entropy(q, "none", dtype=torch.float64),
        )
    else:
        assert_close(library, q, normalize)


@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4, 1e-6, 1e-20])
def test_a_short_head_has_a_direction_all_the_same(library, ratio):
    q = queries(20, 8, 32)
    q -= q.mean(dim=1, keepdim=True)
    q[:, 3] *= ratio
    q[:, 4] -= q.sum(dim=1)  # the mean stays zero, so the short head stays short
    assert_close(library, q, "rows")


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_head_at_the_mean_counts_as_zero_row(library, normalize):
    q = torch.zeros(3, 3, 4)
    q[1] = torch.tensor([[1.0, 3, 5, 7], [2, 3, 4, 5], [3, 3, 3, 3]])
    q[2] = 1e-3 * q[1] + 100
    q[2, 1] = (q[2, 0] + q[2, 2]) / 2
    assert_close(library, q, normalize)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("heads", [2, 7, 28, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_tokens_and_identical_heads_score_exactly_zero(library, heads, dtype, normalize):
    q = torch.randn(19, 1, 33, generator=torch.Generator().manual_seed(heads)).to(dtype)
    q[[0, 18]] = 0
    scores = cpu.matrix_entropy(library, q.expand(19, heads, 33), normalize)
    assert torch.equal(scores, torch.zeros(19))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_its_tokens_alone(library, bad, dtype, normalize):
    clean = queries(37, 12, 40, dtype=dtype)
    for token, head, column in ((0, 0, 0), (15, 11, 39), (16, 5, 7), (36, 3, 16)):
        q = clean.clone()
        q[token, head, column] = bad
        scores = cpu.matrix_entropy(library, q, normalize)
        expected = cpu.matrix_entropy(library, clean, normalize)
        expected[token] = -math.inf
        assert torch.equal(scores, expected), f"{bad} in token {token}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_16_bit_number_is_read_exactly(library, dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite() & (values.abs() < 1e15) & (values != 0)]
    # two heads +-v: the only eigenvalue of A is v^2, so the score gives |v| back
    q = torch.stack([values, -values], dim=1)[:, :, None]
    square = values.double() ** 2
    expected = -square * square.log() / math.log(2)
    scores = cpu.matrix_entropy(library, q, "none")
    unit = torch.maximum(expected.abs(), square / math.log(2))
    wrong = (scores - expected).abs() > 1e-6 * unit + 1e-37
    assert not wrong.any(), f"misread: {values[wrong].tolist()[:5]}"


def surrounded(q):
    """The same numbers inside a larger tensor of NaN."""
    tokens, heads, head_dim = q.shape
    room = torch.full((2 * tokens + 2, heads + 3, head_dim + 5), math.nan, dtype=q.dtype)
    view = room[1 : 2 * tokens : 2, 2 : 2 + heads, 3 : 3 + head_dim]
    view.copy_(q)
    return view


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 16, 33, 128])
def test_strided_queries_are_read_in_place_and_nothing_beside_them(
    library, head_dim, dtype, monkeypatch
):
    q = queries(19, 12, head_dim, dtype=dtype)
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)
    expected = cpu.matrix_entropy(library, q, "rows")
    turned = cpu.matrix_entropy(library, q.mT.contiguous().mT, "rows")  # strided D: a copy
    assert torch.equal(turned, expected)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda _: pytest.fail("copied"))
    for view in (surrounded(q), by_head):
        assert torch.equal(cpu.matrix_entropy(library, view, "rows"), expected)


def test_a_token_scores_the_same_in_every_batch_and_with_every_number_of_threads(library):
    q = queries(200, 28, 64, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    together = cpu.matrix_entropy(library, q, "none")
    alone = torch.cat([cpu.matrix_entropy(library, token[None], "none") for token in q])
    assert torch.equal(together, alone)
    try:
        for count in (2, 3, 64):
            torch.set_num_threads(count)
            assert torch.equal(cpu.matrix_entropy(library, q, "none"), together), count
    finally:
        torch.set_num_threads(threads)
    assert cpu.matrix_entropy(library, q[:0], "none").shape == (0,)


STARVED = """
import resource, threading
import torch
from ep_core.kernels import cpu

library = cpu.open_library("baseline")
q = torch.randn(200, 28, 64, generator=torch.Generator().manual_seed(0))
torch.set_num_threads(1)
expected = cpu.matrix_entropy(library, q, "rows")
torch.set_num_threads(8)
# scores that nobody computes are NaN, not what an earlier call left behind
torch.use_deterministic_algorithms(True)

pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + 2**24  # less than the stack of one thread
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    threading.Thread(target=print).start()
except RuntimeError:
    pass
else:
    raise SystemExit("a thread could start")
assert torch.equal(cpu.matrix_entropy(library, q, "rows"), expected)
"""


@pytest.mark.skipif(not available(), reason="no compiled library")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_threads_that_cannot_start_leave_no_token_without_a_score():
    def large_stacks():
        _, hard = resource.getrlimit(resource.RLIMIT_STACK)
        resource.setrlimit(resource.RLIMIT_STACK, (2**26, hard))

    run = subprocess.run(
        [sys.executable, "-c", STARVED],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=large_stacks,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_threads_as_torch_has(threads):
    class Recorder:
        def ep_matrix_entropy(self, *arguments):
            self.threads = arguments[-2]
            return 0

    before, recorder = torch.get_num_threads(), Recorder()
    try:
        torch.set_num_threads(threads)
        cpu.matrix_entropy(recorder, torch.zeros(4, 4, 4), "none")
    finally:
        torch.set_num_threads(before)
    assert recorder.threads == threads


@pytest.mark.parametrize("case", stored_cases(), ids=lambda case: case.name)
def test_kept_sets_of_the_stored_cases_are_float64s(library, case):
    tensor = stored_tensors()[case.tensor]
    for (start, stop), k, expected in zip(case.spans, case.keep, case.kept, strict=True):
        span = tensor[start:stop]
        if tensor.ndim == 3:
            normalize = "none" if case.method == "released" else case.method
            kept = top_k(cpu.matrix_entropy(library, span, normalize), k)
        else:
            kept = cpu.greedy_renyi2(library, cosine_gram(span), k)
        assert tuple(kept.tolist()) == expected


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 64), (28, 128), (32, 128)])
def test_kept_sets_are_float64s_wherever_rounding_does_not_decide(
    library, heads, head_dim, normalize
):
    q = queries(576, heads, head_dim, seed=7, dtype=torch.bfloat16)
    scores = cpu.matrix_entropy(library, q, normalize)
    reference = matrix_entropy(q, normalize, dtype=torch.float64)
    gap = reference.sort(descending=True).values.diff().abs()
    clear = 2e-6 * max(1.0, float(reference.abs().max()))
    counts = [k + 1 for k in range(len(gap)) if gap[k] > clear]
    assert len(counts) > 400, f"only {len(counts)} of 575 budgets are clear of rounding"
    wrong = [k for k in counts if not torch.equal(top_k(scores, k), top_k(reference, k))]
    assert not wrong, f"kept sets differ at k={wrong}"


def gram_with_ties(n, seed):
    """Cosines from a few directions, some tokens alike, some without a direction."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 24, generator=generator)
    hidden[n // 2 :: 3] = hidden[0].clone()
    hidden[1::7] = 0
    hidden[2::11] = math.nan
    return cosine_gram(hidden)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 17, 64, 101, 576])
def test_greedy_picks_are_the_torch_paths(library, n):
    for seed in range(3):
        gram = gram_with_ties(n, seed)
        for k in sorted({1, 2, (n + 1) // 2, n - 1, n} & set(range(1, n + 1))):
            actual = cpu.greedy_renyi2(library, gram, k)
            assert torch.equal(actual, greedy_renyi2_torch(gram, k)), f"seed {seed}, k={k}"


def test_no_order_of_summation_decides_a_greedy_tie(library):
    # tokens 3 and 4 have the same squares to 0, 1 and 2, in another order; 0, 1, 2 come first
    generator = np.random.default_rng(0)
    decided = 0
    for _ in range(400):
        a, b, c = (generator.random(3) * 10.0 ** -generator.integers(0, 4, 3)).astype(np.float32)
        x, y, z = (float(value) ** 2 for value in (a, b, c))
        gram = torch.eye(5)
        gram[3:, 3:] = 1
        gram[3, :3], gram[4, :3] = torch.tensor([a, b, c]), torch.tensor([b, c, a])
        gram[:3, 3:] = gram[3:, :3].T
        assert cpu.greedy_renyi2(library, gram, 4).tolist() == [0, 1, 2, 3]
        decided += (y + z) + x < (x + y) + z  # without the rounding token 4 would be kept
    assert decided > 10, f"only {decided} examples show anything"


def test_greedy_reads_rows_as_torch_does_whatever_their_layout(library):
    gram = torch.rand(50, 50, generator=torch.Generator().manual_seed(0))  # not symmetric
    expected = greedy_renyi2_torch(gram, 20)
    wide = torch.full((50, 77), math.nan)
    wide[:, 5:55] = gram
    for view in (gram, wide[:, 5:55], gram.T.contiguous().T):
        assert torch.equal(cpu.greedy_renyi2(library, view, 20), expected)


def test_the_operators_are_sound():
    try:
        found = cpu.load()
    except Unavailable as reason:
        pytest.skip(str(reason))
    checks = ("test_schema", "test_faketensor")
    q = queries(5, 8, 16, dtype=torch.bfloat16)
    torch.library.opcheck(found.matrix_entropy, (q, "rows"), test_utils=checks)
    torch.library.opcheck(found.greedy_renyi2, (cosine_gram(q.flatten(1)), 3), test_utils=checks)
