"""Budgets: how many of a picture's tokens stay, in the three meanings that are in use.

`keep` counts tokens after the pruning layer, `average` is the mean over all layers, `flops` is a
target reduction of prefill FLOPs. With `L` layers, pruning at layer `K` and `n` visual tokens of
which `k` stay, the layer average is `(K n + (L - K) k) / L`.

Decimals are read as written (0.29 is 29/100), so that a fraction of a span rounds the same way
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

from ep_core.errors import BudgetError


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a language model that its prefill cost and its layer average depend on.

    Attributes:
        layers: number of decoder layers.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated feed-forward network.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of one head.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int

    def layer_flops(self, tokens: int) -> int:
        """Prefill FLOPs of one layer over `tokens` tokens, one multiply-add counted as two.

        `4 n d (H D) + 4 n d (H_kv D) + 4 n^2 (H D) + 6 n d m`: the q and o projections, the k
        and v projections, attention, the gated feed-forward network. With `H = H_kv` and
        `d = H D` this is the released code's `8 n d^2 + 4 n^2 d + 6 n d m`.
        """
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = 4 * tokens * self.hidden_size * (q_width + kv_width)
        attention = 4 * tokens**2 * q_width
        return projections + attention + 6 * tokens * self.hidden_size * self.intermediate_size

    def prefill_flops(self, tokens: int, kept: int, layer: int) -> int:
        """Prefill FLOPs with `tokens` tokens below `layer` and `kept` tokens from it on."""
        return layer * self.layer_flops(tokens) + (self.layers - layer) * self.layer_flops(kept)

    def flops_reduction(self, tokens: int, kept: int, layer: int) -> float:
        """Share of the unpruned prefill FLOPs that pruning saves, in [0, 1)."""
        return 1 - self.prefill_flops(tokens, kept, layer) / self.prefill_flops(tokens, tokens, 0)


@dataclass(frozen=True)
class _CountOrShare:
    """An integer is a count of tokens, a float in (0, 1] a share of the span."""

    value: int | float
    is_share: bool = field(init=False, repr=False)  # keeps 1 and 1.0 apart, which compare equal
    key: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_share", isinstance(self.value, float))
        key, value = self.key, self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BudgetError(f"{key}={value!r} is no number; examples: {key}=128, {key}=0.25")
        if not self.is_share and value < 1:
            raise BudgetError(
                f"{key}={value} keeps nothing; a count is at least 1, as in {key}=128"
            )
        if self.is_share and not 0 < value <= 1:
            raise BudgetError(
                f"{key}={value} is outside (0, 1]; a decimal is a share of the picture's tokens, "
                f"as in {key}=0.25, an integer is a count, as in {key}=128"
            )

    @property
    def exact(self) -> Fraction:
        """The value as written: 0.29 is 29/100."""
        return Fraction(repr(float(self.value)))


@dataclass(frozen=True)
class Keep(_CountOrShare):
    """Tokens kept after the layer: an integer is a count per span, a float a share of the span.

    A share keeps `floor(share * n + 1/2)` of n tokens, at least one.
    """

    key: ClassVar[str] = "keep"

    def tokens(
        self, spans: Sequence[int], *, layer: int, shape: DecoderShape, other_tokens: int = 0
    ) -> list[int]:
        """Tokens kept of each span of the given lengths.

        Args:
            spans: length of each span.
            layer: the pruning layer K.
            shape: the decoder.
            other_tokens: tokens of the prompt that are never pruned.

        Raises:
            BudgetError: the budget does not fit a span; the message says which one does, and
                `BudgetError.min_tokens` which spans a policy would have to leave whole.
        """
        if self.is_share:
            return [max(1, math.floor(self.exact * n + Fraction(1, 2))) for n in spans]
        count = int(self.value)
        if too_small := [n for n in spans if n < count]:
            raise BudgetError(
                f"keep={count} asks for more than a span of {min(too_small)} tokens has; use "
                f"keep={min(too_small)} or less, or a share such as keep=0.25",
                min_tokens=max(too_small),
            )
        return [count for _ in spans]


@dataclass(frozen=True)
class LayerAverage(_CountOrShare):
    """Mean number of the span's tokens over all layers: a count, or a share of the span.

    Keeps `floor((L * average - K * n) / (L - K))` of n tokens, as the released code does.
    """

    key: ClassVar[str] = "average"

    def tokens(
        self, spans: Sequence[int], *, layer: int, shape: DecoderShape, other_tokens: int = 0
    ) -> list[int]:
        """Tokens kept of each span; see `Keep.tokens`."""
        layers = shape.layers

        def least(n: int) -> Fraction:  # the average at which one token stays
            return Fraction(layer * n + (layers - layer), layers)

        def kept(n: int) -> int:
            average = self.exact * n if self.is_share else self.exact
            return math.floor((layers * average - layer * n) / (layers - layer))

        impossible = [n for n in spans if not 1 <= kept(n) <= n]
        if impossible:
            low, high = max(math.ceil(least(n)) for n in spans), min(spans)
            share = math.ceil(max(least(n) / n for n in spans) * 10_000) / 10_000
            counts = f"average={low} up to average={high}"
            raise BudgetError(
                f"average={self.value} is impossible for a span of {impossible[0]} tokens, all of "
                f"which the first {layer} of {layers} layers see; use "
                + (f"average={share} or more" if self.is_share or low > high else counts),
                min_tokens=max(impossible),
            )
        return [kept(n) for n in spans]


@dataclass(frozen=True)
class FlopsReduction:
    """Target share of prefill FLOPs to save, in (0, 1), by the model in `DecoderShape`.

    The same share of each span is kept, rounded down and at least one token: the largest share
    whose prefill saves at least the target.
    """

    value: float
    key: ClassVar[str] = "flops"

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, float):
            raise BudgetError(f"flops={self.value!r} must be a decimal in (0, 1), such as 0.6")
        if not 0 < self.value < 1:
            raise BudgetError(f"flops={self.value} is outside (0, 1); an example is flops=0.6")

    def tokens(
        self, spans: Sequence[int], *, layer: int, shape: DecoderShape, other_tokens: int = 0
    ) -> list[int]:
        """Tokens kept of each span; see `Keep.tokens`."""
        visual = sum(spans)
        if not visual:
            return []

        def kept(share: int) -> list[int]:  # in units of 2^-40, finer than any two counts differ
            return [max(1, n * share >> 40) for n in spans]

        def reduction(share: int) -> float:
            tokens = sum(kept(share)) + other_tokens
            return shape.flops_reduction(visual + other_tokens, tokens, layer)

        if reduction(0) < self.value:
            most = math.floor(reduction(0) * 1000) / 1000
            raise BudgetError(
                f"flops={self.value} cannot be reached by pruning {visual} visual tokens at "
                f"layer {layer} of {shape.layers} beside {other_tokens} other tokens; use "
                + (f"flops={most} or less" if most else "keep=1.0 to keep every token"),
                min_tokens=max(spans),
            )
        low, high = 0, 1 << 40  # the reduction falls as the share grows
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if reduction(middle) >= self.value else (low, middle - 1)
        return kept(low)


Budget = Keep | LayerAverage | FlopsReduction
BUDGETS: dict[str, type[Keep] | type[LayerAverage] | type[FlopsReduction]] = {
    budget.key: budget for budget in (Keep, LayerAverage, FlopsReduction)
}


def layer_average(tokens: int, kept: int, *, layer: int, layers: int) -> float:
    """Mean number of visual tokens over all layers: the inverse of `LayerAverage`."""
    return (layer * tokens + (layers - layer) * kept) / layers
