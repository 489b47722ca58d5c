"""Between the layers of the decoder: rank each picture's tokens before layer K, cut the others out.

Forward hooks do it, so the same code serves every model whose layers take `positions`,
`hidden_states` and `forward_batch`. What to cut is planned by `ep_core.compaction`; this file says
where that happens in SGLang and which of its tensors have a row for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch import nn

from ep_backends.sglang.attention import PrunedAttention
from ep_backends.sglang.batch import ForwardPass, on_host, pass_of, prefill_of
from ep_backends.sglang.ledger import LAYER_INPUTS
from ep_backends.sglang.requests import SGLangRequest
from ep_core.compaction import HIDDEN, Pass, Ranks
from ep_core.errors import UnsupportedError
from ep_core.plan import RequestPlan
from ep_core.selectors import Selector


class LayerHooks:
    """The hooks of one decoder. They know nothing of a pass but what is on its batch."""

    def __init__(
        self,
        attention: Any,
        selector: Selector,
        layer: int,
        heads: tuple[int, int],
        ranks: Ranks | None = None,
    ) -> None:
        """Prepare; `attach` puts them on.

        Args:
            attention: the decoder's `PrunedAttention`.
            selector: the policy's method.
            layer: K.
            heads: query heads of this rank, and the size of each.
            ranks: tensor-parallel ranks that decide together, or None for one alone.
        """
        self._attention, self._selector, self._layer = attention, selector, layer
        self._heads, self._ranks = heads, ranks
        self._entered: Pass | None = None

    def attach(self, layers: Any) -> None:
        """Put the hooks on a decoder's layers."""
        if "queries" in self._selector.needs:
            attention = layers[self._layer - 1].self_attn
            attention.register_forward_pre_hook(self.enter_attention, with_kwargs=True)
            attention.qkv_proj.register_forward_hook(self.after_projection)
        for index in range(self._layer, len(layers)):
            hook = partial(self.between, index)
            layers[index].register_forward_pre_hook(hook, with_kwargs=True)
        layers[-1].register_forward_hook(self.after_last_layer, with_kwargs=True)

    def between(
        self, index: int, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """After layer `index - 1`, before layer `index`: cut."""
        given = _given(args, kwargs)
        batch = given["forward_batch"]
        if not batch.forward_mode.is_extend():
            return None
        current, changed = pass_of(batch), {}
        if index == self._layer:
            slots = batch.out_cache_loc.long()
            if prefill_of(batch).shortens:
                changed["hidden_states"], slots = self._cut(batch, given, slots)
            self._attention.begin_kept_layers(batch, slots)
        if current.positions is None:
            return None
        return _replaced(args, kwargs, changed | {"positions": current.positions})

    def _cut(
        self, batch: Any, given: Mapping[str, Any], slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rank each unit that is complete, drop the rest of it, let parts of others wait.

        Args:
            batch: SGLang's batch.
            given: what layer K was given.
            slots: `[T]` slots below layer K.

        Returns:
            `[T', d]` hidden states and `[T']` slots of what layers >= K compute.
        """
        current, plan = pass_of(batch), prefill_of(batch)
        hidden = residual.fold(given["hidden_states"], batch)
        plan.choose(self._selector, hidden, ranks=self._ranks)
        self._drop(batch, plan)
        current.positions = plan.take(given["positions"], "positions", dim=-1)
        slots = plan.take(slots, "slots")
        hidden = residual.set_written(plan.take(hidden, HIDDEN), batch)
        for unit in plan.units:
            if unit.waited is not None:
                unit.waited.rows.clear()
        for request, part in zip(current.requests, plan.requests, strict=True):
            if request is not None:
                request.waiting = part.waiting
        # SGLang takes tokens beyond this number for padding, and there may be more than before
        current.tokens = batch.global_num_token_non_padded_cpu
        batch.global_num_token_non_padded_cpu = len(hidden)
        return hidden, slots

    def _drop(self, batch: Any, plan: Pass) -> None:
        """Hand the slots of dropped tokens to their requests."""
        rows = on_host(batch.req_pool_indices_cpu, batch.req_pool_indices) if plan.units else []
        for ranked in plan.units:
            request, row = pass_of(batch).requests[ranked.request], rows[ranked.request]
            if request is not None:
                home = self._attention.slots(row, ranked.unit.start, ranked.unit.stop)
                request.dropped.add(self._attention.drop(home[ranked.gone]))

    def after_last_layer(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        """Spread the output back to the batch's tokens; dropped ones read zero."""
        batch = _given(args, kwargs)["forward_batch"]
        current = pass_of(batch)
        if current.positions is None:
            return None
        batch.global_num_token_non_padded_cpu = current.tokens
        hidden = residual.fold(output, batch)
        return residual.set_written(prefill_of(batch).spread(hidden, 0.0), batch)

    # The projection of layer K-1 is not given the batch: the attention that calls it is.

    def enter_attention(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Before layer K-1 attends: does the pass want its queries?"""
        batch = _given(args, kwargs)["forward_batch"]
        wanted = batch.forward_mode.is_extend() and prefill_of(batch).shortens
        self._entered = prefill_of(batch) if wanted else None

    def after_projection(self, module: Any, args: Any, output: Any) -> None:
        """Keep the queries of what is ranked: RoPE may rotate them in place."""
        plan, self._entered = self._entered, None
        if plan is not None:
            heads, size = self._heads
            plan.copy_queries(output[0][:, : heads * size].unflatten(1, (heads, size)))


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's inputs by name, in whatever way they were given."""
    return dict(zip(LAYER_INPUTS, args, strict=False)) | dict(kwargs)


def _replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], changed: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's inputs in the way they were given, some of them changed."""
    named = zip(LAYER_INPUTS, args, strict=False)
    first = tuple(changed.get(name, value) for name, value in named)
    by_name = {name: changed.get(name, value) for name, value in kwargs.items()}
    return (*first, *args[len(first) :]), by_name


def decoder_layers(model: nn.Module) -> Any:
    """The language model's layers: the module list whose layers attend through the KV pool."""
    from sglang.srt.layers.radix_attention import RadixAttention

    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            attention = getattr(module[0], "self_attn", None)
            if isinstance(getattr(attention, "attn", None), RadixAttention):
                return module
    raise UnsupportedError(f"{type(model).__name__} has no decoder layers that pruning knows")


class _OnePrompt(PrunedAttention):
    """In the place of a server's attention: a table with one prompt, and nothing that attends."""

    def __init__(self, tokens: int, device: str) -> None:
        self._rows = torch.arange(tokens, device=device)[None]
        self._mapping = torch.arange(tokens, device=device)

    def begin_kept_layers(self, batch: Any, slots: torch.Tensor) -> None:
        """Nothing attends."""


def select(
    selector: Selector,
    plan: RequestPlan,
    queries: torch.Tensor | None,
    hidden: torch.Tensor | None,
    device: str,
) -> list[list[int]]:
    """Send one prompt through the hooks of a decoder without layers; see `Backend.select`."""
    tokens = plan.prompt_tokens
    if hidden is None:
        hidden = torch.zeros(tokens, 1)
    heads = (1, 1) if queries is None else (queries.shape[1], queries.shape[2])
    hooks = LayerHooks(_OnePrompt(tokens, device), selector, 1, heads)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        extend_prefix_lens_cpu=[0],
        extend_seq_lens_cpu=[tokens],
        extend_prefix_lens=None,
        extend_seq_lens=None,
        req_pool_indices=None,
        req_pool_indices_cpu=torch.zeros(1, dtype=torch.int64),
        out_cache_loc=torch.arange(tokens, device=device),
        global_num_token_non_padded_cpu=tokens,
        pruning=ForwardPass([SGLangRequest(plan)]),
    )
    residual.start(batch)
    positions = torch.arange(tokens, device=device)
    if queries is not None:
        hooks.enter_attention(None, (), {"forward_batch": batch})
        hooks.after_projection(None, (), (queries.flatten(1).to(device),))
    hooks.between(1, None, (positions, hidden.to(device), batch), {})
    return [ranked.chosen.tolist() for ranked in prefill_of(batch).units]
