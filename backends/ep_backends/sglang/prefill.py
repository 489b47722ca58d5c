"""Prefill: rank each picture's tokens before layer K, run the kept ones through the rest.

Forward hooks on the decoder's layers do it, so the same code serves every model whose layers take
`(positions, hidden_states, forward_batch)`.

A chunk of a long prompt may end inside a picture. Its part of the picture then waits at layer K
and goes on with the chunk that brings the rest: the answer is that of the whole prompt at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual
from torch import nn

from ep_backends.selection import choose
from ep_backends.sglang.attention import PrunedAttention
from ep_backends.sglang.requests import Carried, RequestPlan, plan_of
from ep_core.errors import UnsupportedError
from ep_core.settings import Settings
from ep_core.spans import VisualSpan


@dataclass
class _Picture:
    """A picture that ends in this batch: its tokens are ranked now.

    Attributes:
        plan: of its request.
        span: where it is in its prompt.
        keep: tokens that stay.
        row: its request's row in the table of slots.
        first: position in the batch of its first token that is new in it.
        carried: its tokens of earlier chunks, or None.
    """

    plan: RequestPlan
    span: VisualSpan
    keep: int
    row: int
    first: int
    carried: Carried | None

    @property
    def waiting(self) -> int:
        """Tokens from earlier chunks."""
        return 0 if self.carried is None else self.carried.stop - self.span.start


@dataclass
class _Part:
    """The beginning of a picture whose end is not in this batch: it waits.

    Attributes:
        plan, span, carried: as for `_Picture`.
        first, stop: its new tokens in the batch.
    """

    plan: RequestPlan
    span: VisualSpan
    first: int
    stop: int
    carried: Carried | None


@dataclass
class _Pass:
    """One extend batch, planned on host integers.

    Attributes:
        tokens: new tokens in the batch.
        runs: in order, what layers >= K compute: `(first, stop)` tokens of the batch, or a picture.
        prefixes: tokens of each request that layers >= K hold already.
        extends: tokens of each request that they compute now.
        stops: for each request the prompt position after the last token that they will have seen.
        standing_in: requests whose tokens all wait, by their first token in the batch.
    """

    tokens: int
    runs: list[tuple[int, int] | _Picture] = field(default_factory=list)
    parts: list[_Part] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    extends: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    standing_in: list[int] = field(default_factory=list)
    queries: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    source: torch.Tensor | None = None  # None: nothing is dropped, nothing waits
    real: int | None = None  # the batch's own number of tokens, where SGLang counted it

    @property
    def pictures(self) -> list[_Picture]:
        """Pictures that are ranked now."""
        return [run for run in self.runs if isinstance(run, _Picture)]


class Prefill:
    """The hooks of one model, and what they pass on within a forward pass."""

    def __init__(
        self, model: nn.Module, attention: PrunedAttention, settings: Settings, group: Any
    ) -> None:
        """Attach to a model.

        Args:
            model: SGLang's model.
            attention: its attention backend.
            settings: what to prune.
            group: the tensor-parallel group.
        """
        self._attention = attention
        self._settings = settings
        self._group = group
        self._pass: _Pass | None = None
        attention.prefill = self._plan
        layers, k = decoder_layers(model), settings.layer
        if "queries" in settings.selector.needs:
            projection = layers[k - 1].self_attn.qkv_proj
            projection.register_forward_hook(self._after_projection)
        layers[k].register_forward_pre_hook(self._before_layer_k)
        for layer in layers[k + 1 :]:
            layer.register_forward_pre_hook(self._before_later_layer)
        layers[-1].register_forward_hook(self._after_last_layer)
        self._q_size = layers[k - 1].self_attn.q_size
        self._head_dim = layers[k - 1].self_attn.head_dim

    def _plan(self, batch: Any) -> None:
        """Plan a batch; SGLang forgets its pictures before the first layer runs."""
        rows = _on_host(batch.req_pool_indices_cpu, batch.req_pool_indices)
        prefixes = _on_host(batch.extend_prefix_lens_cpu, batch.extend_prefix_lens)
        lengths = _on_host(batch.extend_seq_lens_cpu, batch.extend_seq_lens)
        inputs = batch.mm_inputs or [None] * len(rows)
        current = self._pass = _Pass(sum(lengths))
        first = 0
        for row, prefix, new, own in zip(rows, prefixes, lengths, inputs, strict=True):
            _plan_request(current, plan_of(own), row, first, prefix, new)
            first += new

    def _after_projection(self, module: nn.Module, args: Any, output: Any) -> None:
        current = self._pass
        if current is not None and (current.pictures or current.parts):
            # [T, H_local * D]; a copy, because RoPE may rotate them in place
            current.queries = output[0][:, : self._q_size].clone()

    def _before_layer_k(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hand the kept tokens on."""
        positions, hidden, batch, *rest = args
        current = self._pass
        if current is None or not batch.forward_mode.is_extend():
            return None
        slots = batch.out_cache_loc.long()
        if current.pictures or current.parts:
            hidden = residual.fold(hidden, batch)
            hidden, positions, slots = self._drop(current, hidden, positions, slots)
            residual.set_written(hidden, batch)
            # SGLang takes tokens beyond this number for padding, and there may be more than before
            current.real = batch.global_num_token_non_padded_cpu
            batch.global_num_token_non_padded_cpu = len(hidden)
        current.positions, current.queries = positions, None
        view = copy.copy(batch)
        _resize(view, current)
        view.out_cache_loc = self._attention.mapping[slots]
        _send_to_padding(view.out_cache_loc, current)
        self._attention.begin_kept_layers(view, current.stops)
        return positions, hidden, batch, *rest

    def _drop(
        self, current: _Pass, hidden: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rank each picture that is complete, drop the rest of it, let the other parts wait.

        Args:
            current: the pass; its `source` is set.
            hidden: `[T, d]` hidden states entering layer K.
            positions: `[T]` or `[3, T]`.
            slots: `[T]` slots of the pool below K.

        Returns:
            The same of what layers >= K compute.
        """
        table, mapping = self._attention.rows.req_to_token, self._attention.mapping
        queries = current.queries
        # what there is to take from: the batch's tokens, then those that waited
        states, places, homes = [hidden], [positions], [slots]
        offset = current.tokens
        source: list[torch.Tensor] = []
        for run in current.runs:
            if not isinstance(run, _Picture):
                source.append(torch.arange(*run, device=hidden.device))
                continue
            own = slice(run.first, run.first + len(run.span) - run.waiting)
            home = table[run.row, run.span.start : run.span.stop].long()
            kept = self._select(run, hidden[own], None if queries is None else queries[own])
            gone = home[_others(kept, len(run.span))]
            run.plan.released.append(mapping[gone])
            mapping.index_fill_(0, gone, 0)
            if hidden.is_cuda:
                run.plan.ready = torch.cuda.current_stream().record_event()
            at = run.first + kept - run.waiting
            if run.carried is not None:
                at = torch.where(kept < run.waiting, offset + kept, at)
                states.append(run.carried.hidden)
                places.append(run.carried.positions)
                homes.append(home[: run.waiting])
                offset += run.waiting
                run.plan.carried = None
            source.append(at)
        for part in current.parts:
            part.plan.carried = _carry(part, hidden, positions, queries, self._head_dim)
        current.source = torch.cat(source)
        return (
            torch.cat(states)[current.source],
            torch.cat(places, dim=-1)[..., current.source],
            torch.cat(homes)[current.source],
        )

    def _before_later_layer(
        self, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        current = self._pass
        if current is None or current.source is None or not args[2].forward_mode.is_extend():
            return None
        return current.positions, *args[1:]

    def _after_last_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Spread the output back to the batch's tokens; dropped ones read zero."""
        current, batch = self._pass, args[2]
        if current is None or not batch.forward_mode.is_extend():
            return None
        self._pass = None
        if current.source is None:
            return None
        batch.global_num_token_non_padded_cpu = current.real
        hidden = residual.fold(output, batch)
        # tokens that waited belong to no token of this batch: they go to a row behind it
        target = current.source.clamp_max(current.tokens)
        spread = hidden.new_zeros(current.tokens + 1, hidden.shape[1])
        spread[target] = hidden
        return residual.set_written(spread[: current.tokens], batch)

    def _select(
        self, picture: _Picture, hidden: torch.Tensor, queries: torch.Tensor | None
    ) -> torch.Tensor:
        """Kept tokens of a picture, `[keep]` ascending; one decision for all ranks."""
        if queries is not None:
            queries = queries.view(len(queries), -1, self._head_dim)
        if picture.carried is not None:
            hidden = torch.cat([picture.carried.hidden, hidden])
            if queries is not None:
                assert picture.carried.queries is not None
                queries = torch.cat([picture.carried.queries, queries])
        return choose(
            self._settings.selector,
            picture.keep,
            queries=queries,
            hidden=hidden,
            ranks=self._group if self._group.world_size > 1 else None,
        )


def decoder_layers(model: nn.Module) -> Any:
    """The language model's layers: the module list whose layers attend through the KV pool."""
    from sglang.srt.layers.radix_attention import RadixAttention

    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            attention = getattr(module[0], "self_attn", None)
            if isinstance(getattr(attention, "attn", None), RadixAttention):
                return module
    raise UnsupportedError(f"{type(model).__name__} has no decoder layers that pruning knows")


def _plan_request(
    current: _Pass, plan: RequestPlan | None, row: int, first: int, prefix: int, new: int
) -> None:
    """Add one request's new tokens `[prefix, prefix + new)`, at `first` in the batch."""
    stop = prefix + new
    held = prefix - (0 if plan is None else plan.dropped_in(prefix))
    at, count = prefix, 0  # up to where it is planned, tokens that layers >= K compute

    def run_to(position: int) -> int:
        if position > at:
            current.runs.append((first + at - prefix, first + position - prefix))
        return max(0, position - at)

    for span, keep in zip(plan.spans, plan.keep, strict=True) if plan is not None else ():
        if keep == len(span) or span.stop <= prefix or span.start >= stop:
            continue
        assert plan is not None
        carried = None
        if span.start < prefix:
            carried = plan.carried
            if carried is None or (carried.span, carried.stop) != (span, prefix):
                raise RuntimeError(
                    f"entropyprune: a prefix of {prefix} tokens ends inside the picture "
                    f"[{span.start}, {span.stop}), whose first part is not there; please report it"
                )
            held -= prefix - span.start
        begin = max(span.start, prefix)
        count += run_to(begin)
        if span.stop <= stop:
            picture = _Picture(plan, span, keep, row, first + begin - prefix, carried)
            current.runs.append(picture)
            count += keep
            at = span.stop
        else:
            where = (first + begin - prefix, first + new)
            current.parts.append(_Part(plan, span, *where, carried))
            at = stop
            stop = span.start
            break
    count += run_to(stop)
    if not count:
        # kernels want at least one token of each request: this one's result is not used
        current.standing_in.append(len(current.extends))
        current.runs.append((first, first + 1))
    current.prefixes.append(held)
    current.extends.append(max(1, count))
    current.stops.append(stop)


def _on_host(values: Any, tensor: torch.Tensor) -> list[int]:
    """Host integers of a batch; SGLang leaves some out of the batches it warms up with."""
    if values is None:
        values = tensor
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


def _others(kept: torch.Tensor, n: int) -> torch.Tensor:
    """The indices below n that are not in `kept`, ascending, without waiting for the device."""
    stays = torch.zeros(n, dtype=torch.int8, device=kept.device)
    stays.index_fill_(0, kept, 1)  # assigning a number would wait for the device
    return stays.argsort(stable=True)[: n - len(kept)]


def _carry(
    part: _Part,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    queries: torch.Tensor | None,
    head_dim: int,
) -> Carried:
    """What waits of a picture: the new tokens after those that waited before."""
    own = slice(part.first, part.stop)
    count = part.stop - part.first
    states, places = [hidden[own]], [positions[..., own]]
    asked = [] if queries is None else [queries[own].view(count, -1, head_dim)]
    start = part.span.start
    if part.carried is not None:
        count += part.carried.stop - start
        states.insert(0, part.carried.hidden)
        places.insert(0, part.carried.positions)
        if part.carried.queries is not None:
            asked.insert(0, part.carried.queries)
    return Carried(
        span=part.span,
        stop=start + count,
        hidden=torch.cat(states),
        positions=torch.cat(places, dim=-1),
        queries=torch.cat(asked) if asked else None,
    )


def _resize(view: Any, current: _Pass) -> None:
    """Give the batch's copy the lengths of the tokens that layers >= K compute and hold."""
    prefixes = torch.tensor(current.prefixes, dtype=torch.int32)
    extends = torch.tensor(current.extends, dtype=torch.int32)
    device = view.seq_lens.device
    view.extend_prefix_lens_cpu, view.extend_seq_lens_cpu = current.prefixes, current.extends
    view.extend_num_tokens = sum(current.extends)
    view.seq_lens_cpu = (prefixes + extends).to(torch.int64)
    view.seq_lens_sum = int(view.seq_lens_cpu.sum())
    view.seq_lens = view.seq_lens_cpu.to(device, view.seq_lens.dtype, non_blocking=True)
    view.extend_prefix_lens = prefixes.to(device, non_blocking=True)
    view.extend_seq_lens = extends.to(device, non_blocking=True)
    view.extend_start_loc = (extends.cumsum(0) - extends).int().to(device, non_blocking=True)


def _send_to_padding(slots: torch.Tensor, current: _Pass) -> None:
    """Tokens that stand in write to slot 0, which no request reads."""
    for request in current.standing_in:
        slots[sum(current.extends[:request])] = 0
