"""Matrix entropy: of one token's heads (the score), of a set of tokens, of a layer.

Formulas: EntropyPrune (arXiv 2602.17196) and the code its authors released; docs/method.md sets
the two side by side. Torch's matrix products run in float64 here, which no TF32 or bfloat16 matmul
switch reaches; `ep_core.kernels` has the scores themselves, fused and in torch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ep_core import kernels
from ep_core.errors import EntropyPruneError
from ep_core.kernels import reference

Normalize = Literal["rows", "none", "trace"]
NORMALIZATIONS: tuple[Normalize, ...] = ("rows", "none", "trace")

_GRAM_BLOCK = 96  # rows at least: enough for matrix products, few of a picture


def matrix_entropy(
    q: torch.Tensor,
    normalize: Normalize | None = None,
    compat: Literal["released"] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Score each token by the matrix entropy of its heads' query states.

    With `X` the token's queries centred over the heads and `A = X X^T / H` (the dual of the
    `D x D` covariance, same non-zero spectrum), the score is `-sum(l ln l) / ln H` over the
    eigenvalues `l` of `A`, in nats relative to `ln H`, with `0 ln 0 = 0`.

    Args:
        q: `[N, H, D]` query states, any floating dtype, any device. Before or after RoPE: all
            heads of a token turn by the same rotation, which leaves `A` unchanged.
        normalize: what is scaled before the entropy is taken.
            `"rows"`: each centred head to unit L2 norm. A von Neumann entropy, scale free,
            in `[0, ln(H-1)/ln H]` when no centred head is zero. The paper's text.
            `"none"`: nothing. Depends on scale and has no bound: large queries score far below
            zero. What the released code runs.
            `"trace"`: `A` by its trace. Scale free, in `[0, ln(H-1)/ln H]`.
            Default: `"rows"`, or `"none"` under `compat="released"`.
        compat: `"released"` repeats the released arithmetic to the digit: centring in the dtype
            of `q`, float64 from there on, eigenvalues clamped below at 1e-10.
        dtype: float32 (fast): by a fused kernel where there is one, otherwise with a float64 Gram
            matrix and float32 eigenvalues. float64 (reference): all of it in float64, in torch.
            docs/kernels.md states how far the two are apart.

    Returns:
        `[N]` float32 scores. A token with a NaN or infinite query scores `-inf`, so it ranks
        last, and changes no other token's score.

    Raises:
        EntropyPruneError: `q` is not a floating `[N, H >= 2, D >= 1]` tensor, or an option is
            unknown.
    """
    _check_queries(q)
    if normalize is None:
        normalize = "none" if compat == "released" else "rows"
    if normalize not in NORMALIZATIONS:
        raise EntropyPruneError(f"normalize={normalize!r}: allowed are 'rows', 'none', 'trace'")
    if compat not in (None, "released"):
        raise EntropyPruneError(f"compat={compat!r}: allowed are None and 'released'")
    if compat == "released" and normalize != "none":
        raise EntropyPruneError(
            f"compat='released' with normalize={normalize!r}: the released code normalises "
            "nothing; use normalize='none'"
        )
    if dtype not in (torch.float32, torch.float64):
        raise EntropyPruneError(f"dtype={dtype}: allowed are torch.float32 and torch.float64")

    if compat is None and dtype == torch.float32:
        return kernels.matrix_entropy(q, normalize)
    return reference.matrix_entropy(q, normalize, released=compat == "released", dtype=dtype)


def layer_entropy(hidden: torch.Tensor) -> float:
    """Matrix entropy of a span's tokens as a set: how spread out a layer's visual states are.

    Rows are centred over the tokens and scaled to unit norm; the von Neumann entropy of their
    trace-normalised Gram matrix is divided by `ln min(N, d)`. Used to find the layer at which
    the entropy collapses (see `ep_core.ecl`).

    Args:
        hidden: `[N, d]` hidden states of one span, any floating dtype, N >= 2.

    Returns:
        A number in `[0, 1]`: 0 when all tokens are alike, 1 when all directions are equally used.

    Raises:
        EntropyPruneError: the shape does not fit, or a value is NaN or infinite.
    """
    if hidden.ndim != 2 or min(hidden.shape) < 2:
        raise EntropyPruneError(
            f"layer_entropy needs hidden states [N >= 2, d >= 2], got {list(hidden.shape)}"
        )
    if not bool(hidden.isfinite().all()):
        raise EntropyPruneError("hidden states hold NaN or infinity; a wider dtype may help")
    x = hidden.double()
    x = reference.unit_rows(x - x.mean(dim=0, keepdim=True))
    gram = x @ x.mT if x.shape[0] <= x.shape[1] else x.mT @ x
    entropy = reference.gram_entropy(gram[None], unit_trace=True, dtype=torch.float64)
    return float(entropy) / math.log(gram.shape[0])


def cosine_gram(hidden: torch.Tensor) -> torch.Tensor:
    """Gram matrix of the tokens' directions, `[N, d] -> [N, N]` float32.

    Entry `(i, j)` is the cosine of tokens i and j. The product is float64, rounded once, and the
    matrix is symmetric to the bit. The row and column of a zero or non-finite token are NaN: it has
    no direction. A float64 token counts as zero where its squared norm underflows.
    """
    x = hidden.double()
    n = x.shape[0]
    gram = x.new_empty(n, n, dtype=torch.float32)
    inverse = x.new_empty(n)  # of the norms
    block = max(_GRAM_BLOCK, n // 8)  # float64 rows at a time: all of them are a lot of memory
    for start in range(0, n, block):  # the lower half; the upper is its mirror image
        stop = min(start + block, n)
        product = x[start:stop] @ x[:stop].mT
        square = product.diagonal(start)
        usable = torch.isfinite(square) & (square >= torch.finfo(torch.float64).tiny)
        inverse[start:stop] = torch.where(usable, 1 / square.sqrt(), math.nan)
        cosines = (product * inverse[start:stop, None] * inverse[:stop]).float()
        corner = cosines[:, start:].tril()
        cosines[:, start:] = corner + corner.tril(-1).mT
        gram[start:stop, :stop] = cosines
        gram[:stop, start:stop] = cosines.mT
    return gram


def renyi2_entropy(gram: torch.Tensor) -> float:
    """Matrix-based Renyi-2 entropy of a set, `-ln tr((G / n)^2)` in nats.

    Args:
        gram: `[n, n]` cosine Gram matrix of the set (see `cosine_gram`).

    Returns:
        A number in `[0, ln n]`: 0 when all are alike, `ln n` when all are orthogonal.
    """
    return -math.log(float((gram.double() / gram.shape[0]).square().sum()))


def _check_queries(q: torch.Tensor) -> None:
    if q.ndim != 3:
        raise EntropyPruneError(
            f"queries must be [tokens, heads, head_dim], got shape {list(q.shape)}"
        )
    if not q.is_floating_point():
        raise EntropyPruneError(f"queries must be floating point, got {q.dtype}")
    if q.shape[1] < 2:
        raise EntropyPruneError(
            f"matrix entropy compares heads and needs at least 2, got {q.shape[1]}"
        )
    if q.shape[2] < 1:
        raise EntropyPruneError("queries have an empty head_dim")
