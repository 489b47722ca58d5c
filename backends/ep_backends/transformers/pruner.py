"""Pruning inside a transformers model: hooks at four places.

- the base model's input: find the pictures and plan how many tokens each keeps (host integers);
- layer K-1: read the query states, where the selector wants them;
- layers K..: layer K keeps the selected columns of its input, later layers get what belongs to
  them;
- the last layer: its output is spread back to the prompt's columns.

A batch stays rectangular: shorter rows are padded on the left. The cache of layers >= K holds the
kept columns (and that padding) only; its layer K remembers which ones they are.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from ep_backends.transformers.cache import HeldColumns, check_cache, from_layer, held_columns
from ep_backends.transformers.ledger import (
    CUT_ALONG,
    check_decoder,
    check_generation,
    check_inputs,
    refuse_continuous_batching,
)
from ep_core.errors import UnsupportedError
from ep_core.family import Family
from ep_core.patching import Patches
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy
from ep_core.report import PruneCounters, RequestRecord, SpanRecord
from ep_core.selectors import Selector
from ep_core.spans import VisualSpan, plan, select, staying

_ACTIVE = "_entropyprune"  # on a decoder: its Pruning


def enable(model: PreTrainedModel, policy: PruningPolicy | str) -> Pruning:
    """Prune visual tokens in a loaded transformers model until the handle is disabled.

    Args:
        model: a vision-language model whose `model_type` has an adapter.
        policy: what to prune, as a value or as text such as `"layer=2,keep=0.25"`.

    Returns:
        A handle, usable as a context manager. Disabling it restores the model to the bit.

    Raises:
        UnsupportedError: the model or its attention implementation cannot be pruned.
        PolicyError: the policy cannot be read or does not fit the model.
    """
    if isinstance(policy, str):
        policy = PruningPolicy.parse(policy)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"{type(model).__name__} is no transformers model; of a wrapper such as PEFT's, "
            "enable what it wraps, as in enable(model.get_base_model(), policy)"
        )
    family = registry().family(model.config.model_type)
    decoder = model.get_decoder()
    if active := getattr(decoder, _ACTIVE, None):
        raise UnsupportedError(
            f"pruning is already on with {active.policy}; disable it before enabling another"
        )
    config = model.config.to_dict()
    policy = policy.at_layer(family.default_layer, family.decoder(config).shape.layers)
    selector = registry().selector(policy.method)
    check_decoder(decoder, family, selector, query_norm=family.decoder(config).query_norm)
    return Pruning(model, policy, family, selector)


@dataclass
class Row:
    """One prompt of a batch, in columns of the current forward pass.

    Attributes:
        spans: its pictures.
        keep: tokens kept of each.
        kept: once selected, `[keep]` indices relative to each span's start.
        first: prompt position of column 0; earlier turns count, padding does not.
        stop: the column behind its last token.
        reason: why nothing is pruned, or None.
    """

    spans: Sequence[VisualSpan] = ()
    keep: Sequence[int] = ()
    kept: Sequence[torch.Tensor] = ()
    first: int = 0
    stop: int = 0
    reason: str | None = None

    @property
    def dropped(self) -> int:
        """Tokens that layers >= K do not see."""
        return sum(map(len, self.spans)) - sum(self.keep) if self.reason is None else 0

    def record(self) -> RequestRecord:
        """What happened, on the host."""
        kept = [k.tolist() for k in self.kept] or [list(range(len(s))) for s in self.spans]
        return RequestRecord(
            tuple(
                SpanRecord(self.first + span.start, self.first + span.stop, tuple(indices))
                for span, indices in zip(self.spans, kept, strict=True)
            ),
            self.reason,
        )


@torch.no_grad()
def choose(
    selector: Selector,
    rows: Sequence[Row],
    *,
    queries: torch.Tensor | None,
    hidden: torch.Tensor | None,
    attention: torch.Tensor | None = None,
) -> None:
    """Select in every row that drops tokens, filling in `Row.kept`.

    Args:
        selector: a registered selector.
        rows: B rows.
        queries: `[B, N, H, D]`, where the selector needs them.
        hidden: `[B, N, d]`, where the selector needs them.
        attention: `[B, H, N, N]`, where the selector needs them.
    """
    for b, row in enumerate(rows):
        if row.dropped:
            row.kept = select(
                selector,
                row.spans,
                row.keep,
                queries=None if queries is None else queries[b],
                hidden=None if hidden is None else hidden[b],
                attention=None if attention is None else attention[b, :, : row.stop],
            )


@dataclass
class _Pass:
    """One forward pass whose layers >= K differ from those below."""

    rows: list[Row]
    real: torch.Tensor  # [B, cached + N] bool: columns of layers < K that are no padding
    cached: int
    held: int | None  # M <= N: new columns that layers >= K hold; None if nothing is dropped
    padded: bool  # rows of this pass hold different numbers of columns in layers >= K
    queries: torch.Tensor | None = None  # [B, N, H, D]
    attention: torch.Tensor | None = None  # [B, H, N, N]
    index: torch.Tensor | None = None  # [B, M]: which new columns, padding first, then ascending
    later_inputs: dict[str, Any] = field(default_factory=dict)


class _Local(threading.local):
    """What one thread is doing; every thread may run the model."""

    rows: Sequence[Row] = ()
    planned: _Pass | None = None  # from the base model's hook to the decoder's
    active: _Pass | None = None  # while the decoder runs


class Pruning:
    """Pruning that is switched on for one model. Made by `enable`.

    Attributes:
        policy: the policy, its layer settled.
        counters: totals over the prompts of all prefill passes since pruning was switched on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: PruningPolicy,
        family: Family,
        selector: Selector,
    ) -> None:
        assert isinstance(policy.layer, int)
        self.policy = policy
        self.counters = PruneCounters()
        self._layer = policy.layer
        self._family = family
        self._selector = selector
        self._config = model.config.to_dict()
        self._shape = family.decoder(self._config).shape
        self._decoder = model.get_decoder()
        self._signature = inspect.signature(model.base_model.forward)
        self._local = _Local()
        self._patches = Patches()
        try:
            self._attach(model)
        except BaseException:
            self.disable()
            raise

    @property
    def records(self) -> list[RequestRecord]:
        """One record for each row of this thread's latest prefill; reading waits for the device."""
        return [row.record() for row in self._local.rows]

    def disable(self) -> None:
        """Remove every hook; the model is as it was before `enable`. Twice does nothing."""
        self._patches.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def __reduce__(self) -> NoReturn:
        # a copy of the model would keep hooks that act on the original
        raise UnsupportedError("a model cannot be copied or pickled while pruning is on")

    def _attach(self, model: PreTrainedModel) -> None:
        def hook(handle: Any) -> None:
            self._patches.add(handle.remove)

        base, decoder, layers = model.base_model, self._decoder, self._decoder.layers
        setattr(decoder, _ACTIVE, self)
        self._patches.add(lambda: delattr(decoder, _ACTIVE))
        hook(base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        hook(decoder.register_forward_pre_hook(self._before_decoder))
        hook(decoder.register_forward_hook(self._after_decoder))
        if "queries" in self._selector.needs:
            attention = layers[self._layer - 1].self_attn
            normed = self._family.decoder(self._config).query_norm
            projection = attention.q_norm if normed else attention.q_proj
            hook(projection.register_forward_hook(self._after_queries))
        if "attention" in self._selector.needs:
            hook(layers[self._layer - 1].self_attn.register_forward_hook(self._after_attention))
        hook(layers[self._layer].register_forward_pre_hook(self._before_layer_k, with_kwargs=True))
        for layer in layers[self._layer + 1 :]:
            hook(layer.register_forward_pre_hook(self._before_later_layer, with_kwargs=True))
        hook(layers[-1].register_forward_hook(self._after_last_layer))
        if model.can_generate():
            make = functools.partial(_checked, model, self.policy)
            names = ("generation_config", "assistant_model", "custom_generate")
            self._patches.replace(model, "generate", make, parameters=names)
            for name in ("generate_batch", "init_continuous_batching"):
                self._patches.replace(model, name, refuse_continuous_batching)

    def _before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Plan this pass."""
        self._local.planned = None
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        check_inputs(module, self._decoder, given)
        cache, held = given.get("past_key_values"), None
        cached = 0
        if cache is not None:
            held = check_cache(cache, self.policy)
            cached = cache.get_seq_length()
        inputs = given.get("input_ids")
        if inputs is None:
            inputs = given["inputs_embeds"]
        batch, tokens = inputs.shape[:2]
        mask = given.get("attention_mask")
        if mask is None:
            mask = torch.ones(batch, cached + tokens, device=inputs.device)
        elif not isinstance(mask, torch.Tensor) or mask.shape != (batch, cached + tokens):
            raise UnsupportedError(
                "pruning needs the attention_mask [batch, tokens] that says which tokens are "
                "padding; got another kind of mask"
            )
        real = mask.bool()
        # a single new token is decode
        counts = self._plan(inputs, real, cached) if tokens > 1 else None
        if counts is not None or held is not None:
            self._local.planned = _Pass(
                rows=list(self._local.rows),
                real=real,
                cached=cached,
                held=None if counts is None else max(counts),
                padded=counts is not None and len(set(counts)) > 1,
            )

    def _plan(self, inputs: torch.Tensor, real: torch.Tensor, cached: int) -> list[int] | None:
        """Plan every row of a prefill; its new tokens in layers >= K, None if none drops any."""
        flags: list[list[bool]] = real.tolist()
        if inputs.ndim == 2:
            rows = [
                self._plan_row(row, columns, cached)
                for row, columns in zip(inputs.tolist(), flags, strict=True)
            ]
        else:
            reason = "inputs_embeds were given without input_ids"
            rows = [Row(reason=reason) for _ in flags]
        self._local.rows = rows
        for row in rows:
            self.counters.add(sum(map(len, row.spans)), row.dropped, row.reason)
        if not any(row.dropped for row in rows):
            return None
        return [
            sum(columns[cached:]) - row.dropped for columns, row in zip(flags, rows, strict=True)
        ]

    def _plan_row(self, token_ids: list[int], real: list[bool], cached: int) -> Row:
        """Plan one prompt; `real` also covers the cached columns."""
        columns = [column for column, flag in enumerate(real[cached:]) if flag]
        row = Row(
            first=sum(real[:cached]) - (columns[0] if columns else 0),
            stop=columns[-1] + 1 if columns else 0,
        )
        try:
            found = self._family.find(self._config, token_ids)
            spans = [VisualSpan(one.run.start, one.run.stop) for one in found]
        except UnsupportedError as error:
            row.reason = str(error)
            return row
        seen = [sum(real[cached + span.start : cached + span.stop]) for span in spans]
        row.spans = [span for span, n in zip(spans, seen, strict=True) if n]  # others are padding
        if not row.spans:
            row.reason = "the prompt has no visual tokens"
        elif any(0 < n < len(span) for span, n in zip(spans, seen, strict=True)):
            row.reason = "the attention mask hides a part of a picture"
        elif columns[-1] < row.spans[-1].stop:
            row.reason = "the prompt ends inside a picture, and its last token must stay"
        else:
            row.keep = plan(
                self.policy,
                row.spans,
                layer=self._layer,
                shape=self._shape,
                prompt_tokens=len(columns),
            )
            if not row.dropped:
                row.reason = "the budget keeps every token"
        return row

    def _before_decoder(self, module: nn.Module, args: Any) -> None:
        # a pass that an exception ended may have left its state behind
        self._local.active, self._local.planned = self._local.planned, None

    def _after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self._local.active = self._local.active, None
        if current is not None and "attention_mask" not in current.later_inputs:
            raise UnsupportedError(
                "the decoder ran without its hooks, so nothing was pruned; enable pruning before "
                "torch.compile"
            )

    def _after_queries(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if (current := self._local.active) is not None:
            batch, columns = current.real.shape
            current.queries = output.view(batch, columns - current.cached, -1, self._shape.head_dim)

    def _after_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        if (current := self._local.active) is not None:
            current.attention = output[1][..., current.cached :]

    def _before_layer_k(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep the selected columns of the layer's inputs; build the mask that fits them."""
        current, cache = self._local.active, kwargs.get("past_key_values")
        if current is None:
            if cache is not None and held_columns(cache) is not None:
                raise UnsupportedError("continue a pruned cache by calling the model")
            return None
        hidden = args[0] if args else kwargs["hidden_states"]  # [B, N, d]
        current.real = current.real.to(hidden.device)  # layers may be spread over devices
        columns = torch.arange(current.cached, current.real.shape[1], device=hidden.device)
        columns = columns.expand(len(hidden), -1)
        if current.held is not None:
            choose(
                self._selector,
                current.rows,
                queries=current.queries,
                hidden=hidden,
                attention=current.attention,
            )
            held = _held(current)
            # stable: first what goes (the padding of shorter rows), then what stays, in order
            index = torch.argsort(held.byte(), dim=1, stable=True)[:, -current.held :]
            current.index = index
            padding = ~held.take_along_dim(index, dim=1)
            columns = columns.take_along_dim(index, dim=1).masked_fill(padding, -1)
            hidden = hidden[_batch(index), index]  # whole rows: a gather goes by element
            for name in CUT_ALONG:
                current.later_inputs[name] = _take(kwargs.get(name), index)
        columns, padded = HeldColumns.join(
            cache, self.policy, current.real.shape[1], columns, current.padded
        )
        mask = None
        # where layers < K need no mask, these need none; to ask again would wait for the device
        if padded or kwargs.get("attention_mask") is not None:
            mask = create_causal_mask(
                config=self._decoder.config,
                inputs_embeds=hidden,
                # what is padding is said anew in each pass: an earlier turn's tail may become it
                attention_mask=current.real.take_along_dim(columns.clamp_min(0), 1)
                & (columns >= 0),
                past_key_values=from_layer(cache, self._layer),
            )
        current.later_inputs["attention_mask"] = mask
        kwargs = kwargs | current.later_inputs
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def _before_later_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._local.active is None:
            return None
        return args, kwargs | self._local.active.later_inputs

    def _after_last_layer(
        self, module: nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        """Spread the output back to the prompt's columns; dropped ones hold NaN, no answer."""
        current = self._local.active
        if current is None or current.index is None:
            return None
        batch, columns = current.real.shape
        index = current.index.to(output.device)
        spread = output.new_full((batch, columns - current.cached, output.shape[2]), math.nan)
        spread[_batch(index), index] = output
        return spread


def _held(current: _Pass) -> torch.Tensor:
    """`[B, N]` bool: new columns that layers >= K hold."""
    held = current.real[:, current.cached :].clone()
    for own, row in zip(held, current.rows, strict=True):
        if row.dropped:
            own &= staying(len(own), row.spans, row.kept)
    return held


def _batch(index: torch.Tensor) -> torch.Tensor:
    """`[B, 1]`: beside columns `[B, M]` the first index of a `[B, N, d]` tensor."""
    return torch.arange(len(index), device=index.device)[:, None]


def _take(value: Any, index: torch.Tensor) -> Any:
    """Keep the columns `index` `[B, M]` of a layer input with one entry for each token."""
    if value is None:
        return None
    if isinstance(value, tuple):  # cos and sin, each [B or 1, N, head_dim]
        return tuple(
            part.to(index.device).take_along_dim(index[..., None], dim=-2) for part in value
        )
    return value.to(index.device).take_along_dim(index, dim=-1)  # position ids [B or 1, N]


def _checked(
    model: PreTrainedModel, policy: PruningPolicy, generate: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(generate).bind_partial(*args, **kwargs).arguments
        check_generation(model.generation_config, policy, given | given.get("kwargs", {}))
        return generate(*args, **kwargs)

    return checked
