"""What a forward pass knows of pruning; it travels on SGLang's `ForwardBatch`.

SGLang makes a `ForwardBatch` of the scheduler's batch and copies it on the way to the model, field
by field. So ours is a subclass with one field more, and a copy keeps it. The hooks between the
layers (`prefill.py`) and the attention (`attention.py`) read it from the batch that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from ep_backends.sglang.requests import SGLangRequest, request_of
from ep_core.compaction import Pass
from ep_core.errors import UnsupportedError


@dataclass
class ForwardPass:
    """One forward pass.

    Attributes:
        requests: of the batch, in order, None for text alone; none at all for SGLang's dummies.
        prefill: of an extend batch, what layers >= K compute; made when it is first asked for.
        positions: rotary positions of what layers >= K compute, once they were cut.
        tokens: `global_num_token_non_padded_cpu` of the batch before it was cut.
        kept: the batch as layers >= K attend to it, once it is prepared.
    """

    requests: Sequence[SGLangRequest | None] = ()
    prefill: Pass | None = None
    positions: torch.Tensor | None = None
    tokens: int | None = None
    kept: Any = None


@dataclass
class PrunedBatch(ForwardBatch):  # type: ignore[misc]  # sglang is untyped
    """SGLang's batch with what its pass knows."""

    pruning: ForwardPass | None = None


def pass_of(batch: Any) -> ForwardPass:
    """The pass of a batch, or of a view of one; a new one for SGLang's dummies."""
    found: ForwardPass | None = getattr(batch, "pruning", None)
    if found is None:
        found = batch.pruning = ForwardPass()
    return found


def prefill_of(batch: Any) -> Pass:
    """What layers >= K compute of an extend batch, planned when it is first asked for."""
    current = pass_of(batch)
    if current.prefill is None:
        prefixes = on_host(batch.extend_prefix_lens_cpu, batch.extend_prefix_lens)
        lengths = on_host(batch.extend_seq_lens_cpu, batch.extend_seq_lens)
        requests = current.requests or [None] * len(lengths)
        current.prefill = Pass()
        for request, prefix, new in zip(requests, prefixes, lengths, strict=True):
            if request is None:
                current.prefill.add(None, new, prefix=prefix)
            else:
                current.prefill.add(request.plan, new, prefix=prefix, waiting=request.waiting)
    return current.prefill


def kept_lengths(batch: Any) -> list[int]:
    """Of each lane of a decode batch, the tokens that layers >= K hold: exact, on the host."""
    lengths = on_host(batch.seq_lens_cpu, batch.seq_lens)
    # lanes behind those of the requests are padding
    dropped = [0] * len(lengths)
    for i, request in enumerate(pass_of(batch).requests):
        dropped[i] = 0 if request is None else request.plan.dropped
    return [length - gone for length, gone in zip(lengths, dropped, strict=True)]


def on_host(values: Any, tensor: torch.Tensor) -> list[int]:
    """Host integers of a batch; those that SGLang leaves out of its dummies may be waited for."""
    if values is None:
        values = tensor
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


# Hooks where batches are made.


def make_batch(
    original: Callable[..., Any], cls: type, batch: Any, model_runner: Any, **kwargs: Any
) -> Any:
    """Around `ForwardBatch.init_new`: the batch is one that carries the pass."""
    if cls is not ForwardBatch:
        raise UnsupportedError(f"another plugin makes batches of its own, {cls.__name__}")
    made = original(PrunedBatch, batch, model_runner, **kwargs)
    made.pruning = ForwardPass([request_of(req) for req in batch.reqs])
    return made


def make_replay_view(
    original: Callable[..., Any], forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around `build_replay_fb_view`: what a decode graph is prepared by carries the pass too."""
    view = original(forward_batch, *args, **kwargs)
    view.pruning = pass_of(forward_batch)
    return view
