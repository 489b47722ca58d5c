"""What a selection is: a span's tensors and a count in, the tokens that stay out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ep_core.errors import EntropyPruneError, PluginError
from ep_core.policy import METHOD_NAME

Need = Literal["queries", "hidden", "attention"]


@dataclass(frozen=True)
class SpanInputs:
    """What a selector may read of one span of N tokens; only what it needs is set.

    Attributes:
        queries: `[N, H, D]` query states of layer K-1 at the projection, before RoPE.
        hidden: `[N, d]` hidden states entering layer K.
        attention: `[H, T, N]` attention probabilities in layer K-1 of the prompt's T tokens behind
            the span. Only engines that compute attention maps have them, and what depends on the
            tokens behind a picture cannot be cached with the picture.
    """

    queries: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    attention: torch.Tensor | None = None

    @property
    def tokens(self) -> int | None:
        """N, the smallest where the inputs differ; None where none is set."""
        sizes = [len(tensor) for tensor in (self.queries, self.hidden) if tensor is not None]
        if self.attention is not None:
            sizes.append(self.attention.shape[2])
        return min(sizes, default=None)


@dataclass(frozen=True)
class Selector:
    """A pruning method by name.

    Attributes:
        name: what `method=` says in a policy.
        summary: one line for `entropyprune list`.
        needs: the fields of `SpanInputs` that `select` reads.
        select: `(inputs of one span, k) -> [k]` int64 indices, ascending.
    """

    name: str
    summary: str
    needs: frozenset[Need]
    select: Callable[[SpanInputs, int], torch.Tensor]

    def __post_init__(self) -> None:
        if not METHOD_NAME.fullmatch(self.name):
            raise PluginError(f"selector name {self.name!r}: use letters, digits, '.', '-', '_'")
        if unknown := self.needs - set(get_args(Need)):
            raise PluginError(
                f"selector {self.name!r} needs {sorted(unknown)[0]!r}; there are "
                f"{', '.join(get_args(Need))}"
            )

    def __call__(self, inputs: SpanInputs, k: int) -> torch.Tensor:
        """Select, and check that the answer is k ascending indices of the span.

        The indices themselves are checked on the CPU only: elsewhere it would wait for the device.
        """
        for need in self.needs:
            if getattr(inputs, need) is None:
                raise EntropyPruneError(f"selector {self.name!r} needs {need}, none were given")
        n = k if inputs.tokens is None else inputs.tokens
        if not 1 <= k <= n:
            raise EntropyPruneError(f"cannot keep {k} of the {n} tokens of a span")
        kept = self.select(inputs, k)
        if kept.shape != (k,) or kept.dtype != torch.int64:
            raise EntropyPruneError(
                f"selector {self.name!r} returned {list(kept.shape)} {kept.dtype}, "
                f"expected [{k}] torch.int64"
            )
        if kept.device.type == "cpu" and not (
            kept[0] >= 0 and kept[-1] < n and bool((kept.diff() > 0).all())
        ):
            raise EntropyPruneError(
                f"selector {self.name!r} returned {kept.tolist()}, expected ascending indices "
                f"below {n}"
            )
        return kept
