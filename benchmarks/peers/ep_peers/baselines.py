"""What every method has to beat: chance, and the norms of what it reads."""

from functools import partial

import torch

from ep_core.selectors import Need, Selector, SpanInputs, top_k


def random(inputs: SpanInputs, k: int) -> torch.Tensor:
    """A random subset that depends on the span alone, as a cached prefix needs it."""
    assert inputs.hidden is not None
    # the generator's seed is a number on the host: on a GPU this waits, so time no method by it
    seed = int(inputs.hidden.double().sum().view(torch.int64)) & (2**63 - 1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inputs.hidden), generator=generator)
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
    Selector("random", "a random subset", frozenset({"hidden"}), random),
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
