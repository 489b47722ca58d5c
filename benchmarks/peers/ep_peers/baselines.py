"""What every method has to beat: chance, and the norms of what it reads."""

from functools import partial

import torch

from ep_core.selectors import Need, Selector, SpanInputs, top_k

_SEED = 2602


class Random:
    """A random subset, another one at each call; the same calls give the same subsets."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(_SEED)

    def __call__(self, inputs: SpanInputs, k: int) -> torch.Tensor:
        """`[k]` ascending indices, on the device of the hidden states."""
        assert inputs.hidden is not None
        order = torch.randperm(len(inputs.hidden), generator=self._generator)
        return order[:k].sort().values.to(inputs.hidden.device)


def by_norm(inputs: SpanInputs, k: int, *, of: Need, sign: int) -> torch.Tensor:
    """Rank tokens by the L2 norm of their queries (all heads together) or hidden state.

    Args:
        inputs: of one span.
        k: tokens that stay.
        of: which of the inputs.
        sign: 1 keeps the largest, -1 the smallest.
    """
    states = getattr(inputs, of).double().flatten(1)
    return top_k(sign * states.norm(dim=1), k)


_STATES: list[tuple[str, str, Need]] = [
    ("query", "query states", "queries"),
    ("hidden", "hidden states", "hidden"),
]
SELECTORS = [
    Selector("random", "a random subset", frozenset({"hidden"}), Random()),
    *(
        Selector(
            f"{what}-norm-{size}",
            f"the {'smallest' if sign < 0 else 'largest'} L2 norms of {name}",
            frozenset({need}),
            partial(by_norm, of=need, sign=sign),
        )
        for what, name, need in _STATES
        for size, sign in (("small", -1), ("large", 1))
    ),
]
