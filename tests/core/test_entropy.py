"""Matrix entropy against a reference written from the formula, and its invariances."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ep_core.entropy import (
    NORMALIZATIONS,
    cosine_gram,
    layer_entropy,
    matrix_entropy,
    renyi2_entropy,
)
from ep_core.errors import EntropyPruneError
from ep_core.kernels import reference as torch_kernels
from ep_core.kernels.reference import greedy_renyi2 as greedy_renyi2_torch
from ep_core.selectors import greedy_renyi2, top_k

SHAPES = [  # tokens, heads, head_dim
    (6, 2, 32),
    (6, 8, 64),
    (6, 9, 80),
    (6, 28, 128),
    (6, 32, 128),
    (4, 40, 256),
    (6, 40, 32),  # fewer dimensions than heads
    (6, 9, 4),
]


def queries(tokens, heads, head_dim, *, seed=0, dtype=torch.float32):
    """Heads of different strength that share directions: spectra far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(tokens, heads, heads, generator=generator, dtype=torch.float64)
    base = torch.randn(tokens, heads, head_dim, generator=generator, dtype=torch.float64)
    strength = torch.rand(tokens, heads, 1, generator=generator, dtype=torch.float64) ** 2 + 0.05
    return (mixing.abs().sqrt() @ (base * strength)).to(dtype)


def reference(q, normalize):
    """The formula in numpy float64, the spectrum from singular values and not from a Gram."""
    scores = []
    for token in q.double().numpy():
        heads = token.shape[0]
        x = token - token.mean(axis=0)
        if normalize == "rows":
            norms = np.sqrt((x * x).sum(axis=1))
            x = np.stack([row / n if n else row for row, n in zip(x, norms, strict=True)])
        spectrum = np.linalg.svd(x, compute_uv=False) ** 2 / heads
        if normalize == "trace" and spectrum.sum():
            spectrum = spectrum / spectrum.sum()
        spectrum = spectrum[spectrum > 0]
        scores.append(-(spectrum * np.log(spectrum)).sum() / math.log(heads))
    return np.array(scores)


def released(q):
    """The released arithmetic: centred in the dtype of q, float64 from there on, a floor."""
    x = (q - q.mean(dim=1, keepdim=True)).to(torch.float64)
    gram = torch.bmm(x, x.transpose(1, 2)) / q.shape[1]
    eigenvalues = torch.clamp(torch.linalg.eigvalsh(gram), min=1e-10)
    return -(eigenvalues * torch.log(eigenvalues)).sum(dim=-1) / math.log(q.shape[1])


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fast", "reference"])
def test_equals_the_numpy_reference(tokens, heads, head_dim, normalize, dtype):
    q = queries(tokens, heads, head_dim, seed=heads + head_dim)
    expected = reference(q, normalize)
    # the spectrum has rank min(H-1, D): float32 eigenvalues are good to 1e-7 of the trace
    tolerance = (2e-5 if dtype == torch.float32 else 1e-6) * max(1, np.abs(expected).max())
    scores = matrix_entropy(q, normalize, dtype=dtype)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, atol=tolerance, rtol=2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("shift", [0, 30])
def test_low_precision_queries_are_centred_in_float64(dtype, normalize, shift):
    q = queries(5, 28, 128, dtype=dtype) + shift
    expected = reference(q, normalize)
    np.testing.assert_allclose(
        matrix_entropy(q, normalize, dtype=torch.float64).numpy(), expected, rtol=2e-7, atol=2e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), SHAPES)
def test_compat_released_is_the_released_arithmetic_to_the_digit(tokens, heads, head_dim, dtype):
    q = queries(tokens, heads, head_dim, dtype=dtype)
    assert torch.equal(matrix_entropy(q, compat="released"), released(q).float())


def test_compat_released_centres_in_the_dtype_of_the_queries():
    q = queries(8, 28, 128, dtype=torch.bfloat16)
    assert not torch.equal(
        matrix_entropy(q, compat="released"), matrix_entropy(q, "none", dtype=torch.float64)
    ), "bfloat16 centring left no trace"


def test_compat_released_keeps_the_eigenvalue_floor():
    heads = 32
    expected = heads * -(1e-10 * math.log(1e-10)) / math.log(heads)
    score = float(matrix_entropy(torch.ones(1, heads, 64), compat="released"))
    assert score == pytest.approx(expected, rel=1e-5, abs=0)


def test_default_is_rows_and_under_compat_none():
    q = queries(4, 8, 64)
    assert torch.equal(matrix_entropy(q), matrix_entropy(q, "rows"))
    assert not torch.equal(matrix_entropy(q), matrix_entropy(q, "trace"))
    assert torch.equal(
        matrix_entropy(q, compat="released"), matrix_entropy(q, "none", compat="released")
    )


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 64), (28, 128), (32, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fast_and_reference_precision_keep_the_same_tokens(heads, head_dim, normalize, dtype):
    q = queries(256, heads, head_dim, seed=7, dtype=dtype)
    fast = matrix_entropy(q, normalize)
    exact = matrix_entropy(q, normalize, dtype=torch.float64)
    gap = exact.sort(descending=True).values.diff().abs()
    threshold = 1e-5 * max(1.0, float(exact.abs().max()))
    counts = [k + 1 for k in range(len(gap)) if gap[k] > threshold]  # k that no rounding decides
    assert len(counts) > 128, f"only {len(counts)} of 255 budgets are clear of rounding"
    wrong = [k for k in counts if not torch.equal(top_k(fast, k), top_k(exact, k))]
    assert not wrong, f"kept sets differ at k={wrong}"


def rotate(q, angles):
    """Rotate pairs `(i, i + D/2)` by `angles` [N, D/2], the same for every head."""
    first, second = q.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rope_angles(positions, pairs):
    frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return positions.double()[:, None] * frequencies


def rope(q):
    return rotate(q, rope_angles(torch.arange(100, 100 + len(q)), q.shape[2] // 2))


def m_rope(q):
    n, pairs = len(q), q.shape[2] // 2
    axes = torch.stack(
        [torch.full((n,), 7), 7 + torch.arange(n) // 3, 7 + torch.arange(n) % 3]
    )  # time, height, width
    section = torch.tensor([0] * (pairs // 4) + [1] * (3 * pairs // 8) + [2] * (3 * pairs // 8))
    angles = torch.stack([rope_angles(axis, pairs) for axis in axes])
    return rotate(q, angles.gather(0, section.expand(1, n, pairs))[0])


def permute_heads(q):
    return q[:, torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(1))]


def rotate_head_dim(q):
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(q.shape[2], q.shape[2], generator=generator, dtype=torch.float64)
    return q @ torch.linalg.qr(matrix).Q


def shift(q):
    offset = torch.randn(len(q), 1, q.shape[2], generator=torch.Generator().manual_seed(3))
    return q + 5 * offset.double()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("change", [rope, m_rope, permute_heads, rotate_head_dim, shift])
def test_invariant_under(change, normalize):
    q = queries(9, 28, 128, dtype=torch.float64)
    changed = change(q)
    assert (changed - q).abs().max() > 0.1, "the change changes nothing"
    torch.testing.assert_close(
        matrix_entropy(changed, normalize, dtype=torch.float64),
        matrix_entropy(q, normalize, dtype=torch.float64),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("normalize", ["rows", "trace"])
def test_scale_free(normalize):
    q = queries(7, 32, 128, dtype=torch.float64)
    scales = torch.tensor([1e-12, 1e-3, 0.1, 1.0, 4.0, 1e3, 1e12], dtype=torch.float64)
    torch.testing.assert_close(
        matrix_entropy(q * scales[:, None, None], normalize),
        matrix_entropy(q, normalize),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("scale", [0.1, 0.5, 4.0, 30.0])
def test_without_normalisation_the_score_depends_on_scale_as_the_formula_says(scale):
    q = queries(5, 32, 128, dtype=torch.float64)
    x = (q - q.mean(dim=1, keepdim=True)).numpy()
    trace = (x**2).sum(axis=(1, 2)) / 32
    # S(c^2 A) = c^2 S(A) - c^2 tr(A) ln c^2
    expected = scale**2 * (reference(q, "none") - trace * math.log(scale**2) / math.log(32))
    scores = matrix_entropy(q * scale, "none", dtype=torch.float64).double().numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)


def test_without_normalisation_larger_queries_fall_below_zero():
    q = torch.randn(1, 32, 128, generator=torch.Generator().manual_seed(0))
    small, unit, large = (float(matrix_entropy(q * c, "none")) for c in (0.1, 1, 4))
    assert small > 0 > unit > large, (small, unit, large)


@pytest.mark.parametrize("normalize", ["rows", "trace"])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), SHAPES)
def test_normalised_scores_stay_in_their_range(tokens, heads, head_dim, normalize):
    scores = matrix_entropy(queries(tokens, heads, head_dim), normalize)
    top = math.log(heads - 1) / math.log(heads)
    # single tokens may round past an end by some units of float32
    assert bool((scores >= -1e-6).all() and (scores <= top + 1e-6).all()), f"not in [0, {top}]"


@pytest.mark.parametrize("normalize", ["rows", "trace"])
@pytest.mark.parametrize("heads", [2, 3, 8, 28, 40])
def test_the_top_of_the_range_is_reached_by_orthogonal_heads(heads, normalize):
    score = float(matrix_entropy(torch.eye(heads)[None], normalize))
    assert score == pytest.approx(math.log(heads - 1) / math.log(heads), abs=1e-6)


@pytest.mark.parametrize("normalize", ["rows", "trace"])
def test_heads_on_one_line_score_zero(normalize):
    line = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(8.0)[None, :, None]
    torch.testing.assert_close(
        matrix_entropy(line * steps, normalize), torch.zeros(3), rtol=0, atol=1e-5
    )


@pytest.fixture
def fast_float32_matmul():
    precision = torch.get_float32_matmul_precision()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    half = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = half
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matmul_switches_of_the_host_change_no_bit(fast_float32_matmul, dtype):
    q = queries(16, 28, 128, dtype=dtype)

    def everything():
        scores = [matrix_entropy(q, normalize) for normalize in NORMALIZATIONS]
        return [*scores, matrix_entropy(q, compat="released"), cosine_gram(q.flatten(1))]

    before = everything()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.set_float32_matmul_precision("medium")
    for old, new in zip(before, everything(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_hosts_default_dtype_changes_no_bit(default):
    q = queries(40, 28, 64, dtype=torch.float16)

    def everything():
        scores = [
            matrix_entropy(q, normalize, dtype=dtype)
            for normalize in NORMALIZATIONS
            for dtype in (torch.float32, torch.float64)
        ]
        gram = cosine_gram(q.flatten(1))
        released = matrix_entropy(q, compat="released")
        return [
            *scores,
            released,
            gram,
            greedy_renyi2(q.flatten(1), 9),
            greedy_renyi2_torch(gram, 9),
        ]

    before = everything()
    standard = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        after = everything()
    finally:
        torch.set_default_dtype(standard)
    for old, new in zip(before, after, strict=True):
        assert old.dtype == new.dtype
        assert torch.equal(old, new)


class MatmulDtypes(TorchDispatchMode):
    """Records the dtypes that matrix products see."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.seen |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "compute",
    [
        *(partial(matrix_entropy, normalize=n, dtype=torch.float64) for n in NORMALIZATIONS),
        lambda q: matrix_entropy(q, compat="released"),
        lambda q: cosine_gram(q.flatten(1)),
        lambda q: layer_entropy(q.flatten(1)),
    ],
    ids=[*NORMALIZATIONS, "released", "cosine_gram", "layer_entropy"],
)
def test_no_matrix_product_of_torch_runs_below_float64(compute, dtype):
    q = queries(4, 8, 64, dtype=dtype)
    with MatmulDtypes() as products:
        compute(q)
    assert products.seen == {torch.float64}


@pytest.mark.parametrize("compat", [None, "released"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_token_that_is_not_finite_ranks_last_and_changes_no_other(at, bad, compat):
    clean = queries(8, 28, 64)
    broken = clean.clone()
    broken[at, 5, 9] = bad
    before, after = (matrix_entropy(q, compat=compat) for q in (clean, broken))
    others = [n for n in range(8) if n != at]
    assert after[at] == -math.inf
    assert torch.equal(after[others], before[others])
    assert top_k(after, 7).tolist() == others


def test_every_token_not_finite_still_scores():
    assert torch.equal(matrix_entropy(torch.full((3, 4, 8), math.nan)), torch.full((3,), -math.inf))


@pytest.mark.parametrize(
    ("dtype", "large", "options"),
    [
        (torch.float16, 65000.0, {"compat": "released"}),
        (torch.float32, 3e38, {"compat": "released"}),
        (torch.float64, 1e200, {"normalize": "none"}),
        (torch.float64, 1e200, {"normalize": "trace"}),
    ],
)
def test_a_finite_token_that_overflows_breaks_no_other(dtype, large, options):
    clean = queries(4, 8, 16, dtype=dtype)
    q = clean.clone()
    q[2] = -large
    q[2, 0] = large  # finite, and its distance from the mean over heads is not
    scores = matrix_entropy(q, **options)
    others = [0, 1, 3]
    assert torch.equal(scores[others], matrix_entropy(clean, **options)[others])
    assert not scores.isnan().any()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [2, 7, 28, 40])
def test_zero_tokens_and_identical_heads_score_zero(heads, dtype, normalize):
    one = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(heads)).to(dtype)
    one[0] = 0
    torch.testing.assert_close(
        matrix_entropy(one.expand(4, heads, 32), normalize), torch.zeros(4), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_head_at_the_mean_counts_as_zero_row(normalize):
    q = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]])
    assert float(matrix_entropy(q, normalize)) == pytest.approx(
        float(reference(q, normalize)[0]), abs=1e-6
    )


@pytest.mark.parametrize("options", [{}, {"normalize": "none"}, {"compat": "released"}], ids=str)
def test_one_token_scores_as_in_a_batch_and_none_gives_none(options):
    q = queries(6, 28, 128)
    batch = matrix_entropy(q, **options)
    alone = torch.cat([matrix_entropy(q[n : n + 1], **options) for n in range(6)])
    torch.testing.assert_close(alone, batch, rtol=1e-6, atol=1e-6)
    assert matrix_entropy(q[:0], **options).shape == (0,)


PRECISIONS = [
    *({"normalize": n, "dtype": d} for n in NORMALIZATIONS for d in (torch.float32, torch.float64)),
    {"normalize": "none", "released": True},
]


@pytest.mark.parametrize("options", PRECISIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(9, 4), (9, 80), (28, 128)])
def test_the_size_of_a_block_changes_no_bit(monkeypatch, heads, head_dim, dtype, options):
    q = queries(77, heads, head_dim, dtype=dtype)
    q[[0, 15, 16, 76], 2, 3] = math.nan
    scores = []
    for tokens in (1, 16, 39, 77):
        monkeypatch.setattr(torch_kernels, "BLOCK", tokens * heads * max(heads, head_dim))
        scores.append(torch_kernels.matrix_entropy(q, **options))
    for score in scores[:-1]:
        assert torch.equal(score, scores[-1])


class LargestTensor(TorchDispatchMode):
    """Records how many bytes the largest tensor has that an operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return made


@pytest.mark.parametrize("options", PRECISIONS, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 64), (28, 128), (64, 256), (64, 8)])
def test_the_scorer_in_torch_takes_no_more_memory_for_more_tokens(heads, head_dim, options):
    per_token = 8 * heads * max(heads, head_dim)
    q = torch.empty(10**9 // per_token, heads, head_dim, dtype=torch.bfloat16, device="meta")
    with LargestTensor() as largest:
        assert torch_kernels.matrix_entropy(q, **options).shape == q.shape[:1]
    assert 2**24 < largest.bytes <= 2**25, f"{largest.bytes / 2**20:.0f} MiB of float64 at once"


def test_memory_layout_changes_no_bit():
    q = queries(6, 28, 128)
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(matrix_entropy(strided), matrix_entropy(q))


def test_the_input_is_left_alone():
    q = queries(3, 8, 16)
    q[1, 0, 0] = math.nan
    copy = q.clone()
    for options in ({}, {"normalize": "trace"}, {"compat": "released"}):
        matrix_entropy(q, **options)
    assert torch.equal(q.nan_to_num(7), copy.nan_to_num(7))


@pytest.mark.parametrize(
    ("q", "options", "says"),
    [
        (torch.zeros(4, 8), {}, r"\[tokens, heads, head_dim\], got shape \[4, 8\]"),
        (torch.zeros(1, 2, 8, 16), {}, r"got shape \[1, 2, 8, 16\]"),
        (torch.zeros(4, 1, 16), {}, "at least 2, got 1"),
        (torch.zeros(4, 0, 16), {}, "at least 2, got 0"),
        (torch.zeros(4, 8, 0), {}, "empty head_dim"),
        (torch.zeros(4, 8, 16, dtype=torch.int32), {}, "floating point, got torch.int32"),
        (torch.zeros(4, 8, 16, dtype=torch.complex64), {}, "floating point, got torch.complex64"),
        (torch.zeros(4, 8, 16), {"normalize": "row"}, "normalize='row': allowed are 'rows'"),
        (torch.zeros(4, 8, 16), {"compat": "paper"}, "compat='paper': allowed are None"),
        (torch.zeros(4, 8, 16), {"dtype": torch.float16}, "allowed are torch.float32 and"),
        (
            torch.zeros(4, 8, 16),
            {"normalize": "rows", "compat": "released"},
            "use normalize='none'",
        ),
    ],
)
def test_what_cannot_be_scored_is_an_error(q, options, says):
    with pytest.raises(EntropyPruneError, match=says):
        matrix_entropy(q, **options)


@pytest.mark.parametrize(("tokens", "width"), [(5, 32), (32, 5), (12, 12)])
def test_layer_entropy_equals_the_numpy_reference(tokens, width):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator) * torch.rand(
        width, generator=generator
    )
    x = hidden.double().numpy()
    x = x - x.mean(axis=0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    p = np.linalg.svd(x, compute_uv=False) ** 2
    p = p[p > 1e-25] / p.sum()
    expected = -(p * np.log(p)).sum() / math.log(min(tokens, width))
    assert layer_entropy(hidden) == pytest.approx(expected, abs=1e-9)


def test_layer_entropy_reaches_both_ends():
    assert layer_entropy(torch.ones(6, 4)) == pytest.approx(0, abs=1e-9)
    assert layer_entropy(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(1)


@pytest.mark.parametrize("width", [2, 3, 7, 16, 48])
def test_layer_entropy_never_rounds_out_of_its_range(width):
    spread = torch.cat([torch.eye(width), -torch.eye(width)])
    generator = torch.Generator().manual_seed(width)
    turned = spread @ torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    alike = torch.rand(1, width, generator=generator).expand(9, width) * (1 + 1e-7)
    values = [layer_entropy(hidden) for hidden in (spread, turned, alike)]
    assert all(0 <= value <= 1 for value in values), values


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (0, 8), (2, 2, 2)])
def test_layer_entropy_refuses_what_is_no_set(shape):
    with pytest.raises(EntropyPruneError, match="needs hidden states"):
        layer_entropy(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cosine_gram_equals_numpy_and_tokens_without_direction_are_nan(dtype):
    hidden = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden[1] = 0
    hidden[3, 2] = math.nan
    hidden[4, 0] = math.inf
    gram = cosine_gram(hidden)
    assert gram.dtype == torch.float32
    usable = [0, 2, 5]
    x = hidden.double().numpy()[usable]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(gram[usable][:, usable].numpy(), x @ x.T, atol=6e-8)
    for lost in (1, 3, 4):
        assert gram[lost].isnan().all()
        assert gram[:, lost].isnan().all()


def test_a_token_whose_squared_norm_underflows_has_no_direction():
    smallest = math.sqrt(torch.finfo(torch.float64).tiny)
    direction = torch.tensor([3.0, -4.0], dtype=torch.float64) / 5
    lengths = torch.tensor([1, 1.001 * smallest, 0.999 * smallest, 1e-160], dtype=torch.float64)
    gram = cosine_gram(direction * lengths[:, None])
    torch.testing.assert_close(gram[:2, :2], torch.ones(2, 2), rtol=0, atol=1e-6)
    # of what is left below that, too few digits for a cosine
    assert gram[2:].isnan().all()
    assert gram[:, 2:].isnan().all()


@pytest.mark.parametrize("tokens", [95, 96, 97, 300, 801])
def test_cosine_gram_is_symmetric_and_whole_at_every_size(tokens):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 40, generator=generator).to(torch.bfloat16)
    hidden[[0, 40, tokens - 1]] = torch.tensor([math.nan, 0, math.inf], dtype=hidden.dtype)[:, None]
    x = hidden.double().numpy()
    with np.errstate(invalid="ignore"):
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        x[~np.isfinite(x).all(axis=1)] = math.nan
        expected = (x @ x.T).astype(np.float32)
    gram = cosine_gram(hidden)
    assert torch.equal(gram.nan_to_num(9), gram.T.nan_to_num(9)), "not symmetric"
    np.testing.assert_allclose(gram.numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_renyi2_entropy_reaches_both_ends(n):
    assert renyi2_entropy(torch.ones(n, n)) == pytest.approx(0, abs=1e-12)
    assert renyi2_entropy(torch.eye(n)) == pytest.approx(math.log(n), abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_layer_entropy_names_states_that_are_not_finite(bad):
    hidden = torch.ones(4, 8)
    hidden[2, 3] = bad
    with pytest.raises(EntropyPruneError, match="NaN or infinity"):
        layer_entropy(hidden)
