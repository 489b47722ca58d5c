"""The Triton kernels, run by Triton's interpreter, against float64 and against the torch path.

Run in an environment that has Triton: .venv-lmdeploy/bin/pytest tests/triton
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with the engines' environments")

import triton

from ep_conformance.selection_cases import stored_cases, stored_tensors
from ep_core.entropy import NORMALIZATIONS, cosine_gram, matrix_entropy
from ep_core.kernels import cuda
from ep_core.kernels.reference import greedy_renyi2 as greedy_renyi2_torch
from ep_core.kernels.triton_greedy import greedy_renyi2
from ep_core.kernels.triton_scorer import matrix_entropy as fused
from ep_core.selectors import top_k

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(2, 32, 128), (1, 64, 256), (2, 28, 80), (4, 9, 17), (3, 2, 1)]
# the interpreter takes its time; larger shapes are held to the error bound only
CASES = [
    case
    for case in stored_cases()
    if case.tensor == "close-calls" or stored_tensors()[case.tensor].numel() < 8_000
]


def queries(tokens, heads, head_dim, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads + head_dim)
    own = torch.randn(tokens, heads, head_dim, generator=generator)
    shared = torch.randn(tokens, 1, head_dim, generator=generator)
    degree = torch.randn(tokens, heads, 1, generator=generator)
    return ((own + degree * shared) * torch.linspace(1, 0.1, head_dim)).to(dtype)


def assert_close(q, normalize):
    """Within 1e-5; without normalisation of the larger of the score and the trace / ln H."""
    scores = fused(q, normalize).double()
    expected = matrix_entropy(q, normalize, dtype=torch.float64).double()
    x = q.double() - q.double().mean(dim=1, keepdim=True)
    trace = x.square().sum(dim=(1, 2)) / q.shape[1]
    unit = torch.ones(())
    if normalize == "none":
        unit = torch.maximum(expected.abs(), trace / math.log(q.shape[1])).clamp_min(1e-30)
    error = (scores - expected).abs() / unit
    assert error.max() <= 1e-5, f"{scores.tolist()}, float64 says {expected.tolist()}"


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), SHAPES)
def test_scores_are_float64s_within_the_bound(tokens, heads, head_dim, dtype, normalize):
    assert_close(queries(tokens, heads, head_dim, dtype=dtype), normalize)


@pytest.mark.parametrize("normalize", ["rows", "trace"])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e36])
def test_scales_at_which_float32_squares_overflow_or_vanish(scale, normalize):
    assert_close(queries(3, 8, 24) * scale, normalize)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_offsets_short_heads_and_heads_at_the_mean(normalize):
    q = torch.zeros(4, 3, 4)
    q[1] = torch.tensor([[1.0, 3, 5, 7], [2, 3, 4, 5], [3, 3, 3, 3]])
    q[2] = queries(1, 3, 4)[0] + 1e5
    q[3] = queries(1, 3, 4)[0]
    q[3, 1] = q[3, [0, 2]].mean(dim=0) * (1 + 1e-4)
    assert_close(q, normalize)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("heads", [2, 7, 64])
def test_zero_tokens_and_identical_heads_score_exactly_zero(heads, normalize):
    q = torch.randn(3, 1, 33, generator=torch.Generator().manual_seed(heads))
    q[0] = 0
    assert torch.equal(fused(q.expand(3, heads, 33), normalize), torch.zeros(3))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_its_tokens_alone(bad, normalize):
    q = queries(3, 12, 40)
    expected = fused(q, normalize)
    q[1, 11, 39] = bad
    expected[1] = -math.inf
    assert torch.equal(fused(q, normalize), expected)


def test_strided_queries_are_read_in_place():
    q = queries(3, 12, 40, dtype=torch.bfloat16)
    room = torch.full((7, 15, 45), math.nan, dtype=q.dtype)
    view = room[1:6:2, 2:14, 3:43]
    view.copy_(q)
    for same in (view, q.mT.contiguous().mT, q.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(fused(same, "rows"), fused(q, "rows"))
    assert fused(q[:0], "rows").shape == (0,)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kept_sets_of_the_stored_cases_are_float64s(case):
    tensor = stored_tensors()[case.tensor]
    for (start, stop), k, expected in zip(case.spans, case.keep, case.kept, strict=True):
        span = tensor[start:stop]
        if tensor.ndim == 3:
            normalize = "none" if case.method == "released" else case.method
            kept = top_k(fused(span, normalize), k)
        else:
            kept = greedy_renyi2(cosine_gram(span), k)
        assert tuple(kept.tolist()) == expected


@pytest.mark.parametrize("n", [1, 2, 7, 16, 17, 101])
def test_greedy_picks_are_the_torch_paths(n):
    hidden = torch.randn(n, 24, generator=torch.Generator().manual_seed(n))
    hidden[n // 2 :: 3] = hidden[0].clone()
    hidden[1::7] = 0
    hidden[2::11] = math.nan
    gram = cosine_gram(hidden)
    for k in sorted({1, 2, (n + 1) // 2, n} & set(range(1, n + 1))):
        assert torch.equal(greedy_renyi2(gram, k), greedy_renyi2_torch(gram, k)), f"k={k}"


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [(28, 80, torch.float16), (32, 128, torch.bfloat16), (64, 40, torch.float32)],
)
def test_the_check_of_a_size_accepts_the_scorer_and_no_worse_one(heads, head_dim, dtype, normalize):
    size = cuda.ScorerSize(torch.device("cpu"), heads, head_dim, dtype, normalize)
    right = []
    size.check(lambda q, how: right.append(fused(q, how)) or right[0])
    scores = right[0]
    for worse in (scores + 2e-5 * scores.abs().clamp_min(1), scores.abs(), scores * math.nan):
        with pytest.raises(ArithmeticError):
            size.check(lambda q, how, worse=worse: worse)


@pytest.mark.parametrize("n", [9, 16, 17, 32, 600, 1000])
def test_the_check_of_a_block_accepts_the_greedy_set_and_no_other(n):
    size = cuda.GreedySize.of(torch.empty(n, 0), 1)
    assert size.block == max(16, triton.next_power_of_2(n)), "not what is compiled"
    size.check(greedy_renyi2)
    for worse in (
        lambda gram, k: torch.arange(k),
        lambda gram, k: greedy_renyi2(gram.nan_to_num(), k),
        lambda gram, k: (len(gram) - 1 - greedy_renyi2(gram.flip(0, 1), k)).flip(0),
    ):
        with pytest.raises(ArithmeticError):
            size.check(worse)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(capability, tmp_path):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, script, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
