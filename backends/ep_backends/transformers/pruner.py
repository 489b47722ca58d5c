"""Pruning inside a transformers model: hooks at three places of the decoder.

- the base model's input: find the pictures and plan how many tokens each keeps (host integers);
- layer K-1: read the query states, where the selector wants them;
- layers K..: layer K keeps the selected tokens of its input, later layers get what belongs to
  them, and the last layer's output is spread back to the prompt's length.

A batch is kept rectangular by left padding the shorter rows. The cache of layers >= K then holds
the kept tokens (and that padding) only; which of its columns are padding travels with the cache
object itself, so that copies and later turns find it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask

from ep_backends.transformers.ledger import ATTENTION, check_generation
from ep_core.adapter import ModelAdapter
from ep_core.errors import UnsupportedError
from ep_core.patching import Patches, missing_parameters
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy
from ep_core.report import PruneCounters, RequestRecord, SpanRecord
from ep_core.selectors import Selector
from ep_core.spans import VisualSpan, plan, select

_ACTIVE = "_entropyprune"  # on a model: its Pruning; on a cache: its _KeptCache


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
    if active := getattr(model, _ACTIVE, None):
        raise UnsupportedError(
            f"pruning is already on with {active.policy}; disable it before enabling another"
        )
    adapter = registry().adapter(model.config.model_type)
    config = model.config.to_dict()
    shape = adapter.decoder_shape(config)
    policy = policy.at_layer(adapter.default_layer, shape.layers)
    _check_decoder(model.get_decoder(), adapter)
    return Pruning(model, policy, adapter, registry().selector(policy.method))


@dataclass
class Row:
    """One prompt of a batch, in columns of the current forward pass.

    Attributes:
        spans: its pictures.
        keep: tokens kept of each.
        kept: once selected, `[keep]` indices relative to each span's start.
        first: prompt position of column 0; earlier turns count, padding does not.
        reason: why nothing is pruned, or None.
    """

    spans: Sequence[VisualSpan] = ()
    keep: Sequence[int] = ()
    kept: Sequence[torch.Tensor] = ()
    first: int = 0
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
) -> None:
    """Select in every row that drops tokens, filling in `Row.kept`.

    Args:
        selector: a registered selector.
        rows: B rows.
        queries: `[B, N, H, D]`, where the selector needs them.
        hidden: `[B, N, d]`, where the selector needs them.
    """
    for b, row in enumerate(rows):
        if row.dropped:
            row.kept = select(
                selector,
                row.spans,
                row.keep,
                queries=None if queries is None else queries[b],
                hidden=None if hidden is None else hidden[b],
            )


@dataclass
class _Pass:
    """One forward pass whose layers >= K differ from those below."""

    rows: list[Row]
    past: torch.Tensor  # [B, P] bool: cached columns of layers >= K that are no padding
    real: torch.Tensor  # [B, N] bool: columns of this pass that are no padding
    columns: int | None  # M <= N: columns that layers >= K compute on; None if none is dropped
    below: int  # columns that layers < K hold after this pass
    queries: torch.Tensor | None = None  # [B, N, H, D]
    index: torch.Tensor | None = None  # [B, M]: which columns, ascending, padding first
    later_inputs: dict[str, Any] = field(default_factory=dict)


@dataclass
class _KeptCache:
    """What the cache of a pruned prompt must remember."""

    layer: int
    below: int  # columns in layers < K
    real: torch.Tensor  # [B, columns in layers >= K] bool: no padding


class Pruning:
    """Pruning that is switched on for one model. Made by `enable`.

    Attributes:
        policy: the policy, its layer settled.
        counters: totals over all prefills since pruning was switched on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: PruningPolicy,
        adapter: ModelAdapter,
        selector: Selector,
    ) -> None:
        assert isinstance(policy.layer, int)
        self.policy = policy
        self.counters = PruneCounters()
        self._layer = policy.layer
        self._adapter = adapter
        self._selector = selector
        self._config = model.config.to_dict()
        self._shape = adapter.decoder_shape(self._config)
        self._decoder = model.get_decoder()
        self._rows: list[Row] = []
        self._pass: _Pass | None = None
        self._patches = Patches()
        self._attach(model)

    @property
    def records(self) -> list[RequestRecord]:
        """One record for each row of the latest prefill; reading it waits for the device."""
        return [row.record() for row in self._rows]

    def disable(self) -> None:
        """Remove every hook; the model is as it was before `enable`. Twice does nothing."""
        self._patches.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disable()

    def _attach(self, model: PreTrainedModel) -> None:
        def hook(handle: Any) -> None:
            self._patches.add(handle.remove)

        setattr(model, _ACTIVE, self)
        self._patches.add(lambda: delattr(model, _ACTIVE))
        base, layers = model.base_model, self._decoder.layers
        self._signature = inspect.signature(base.forward)
        hook(base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        hook(base.register_forward_hook(self._after_model, always_call=True))
        if "queries" in self._selector.needs:
            attention = layers[self._layer - 1].self_attn
            normed = self._adapter.query_norm(self._config)
            projection = attention.q_norm if normed else attention.q_proj
            hook(projection.register_forward_hook(self._after_queries))
        hook(layers[self._layer].register_forward_pre_hook(self._before_layer_k, with_kwargs=True))
        for layer in layers[self._layer + 1 :]:
            hook(layer.register_forward_pre_hook(self._before_later_layer, with_kwargs=True))
        hook(layers[-1].register_forward_hook(self._after_last_layer))
        if model.can_generate():
            self._patches.replace(model, "generate", functools.partial(_guarded, model))

    def _before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Plan this pass."""
        self._pass = None
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        for name in ("output_attentions", "output_hidden_states"):
            if given.get(name) or getattr(module.config, name, False):
                raise UnsupportedError(f"{name} does not work with pruning; disable it first")
        cache, kept_cache = given.get("past_key_values"), None
        cached = 0
        if cache is not None:
            kept_cache = _check_cache(cache, self._layer)
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
        columns = self._plan(inputs, real, cached) if tokens > 1 else None
        if columns is not None or kept_cache is not None:
            self._pass = _Pass(
                rows=self._rows,
                past=real[:, :cached] if kept_cache is None else kept_cache.real,
                real=real[:, cached:],
                columns=columns,
                below=cached + tokens,
            )

    def _plan(self, inputs: torch.Tensor, real: torch.Tensor, cached: int) -> int | None:
        """Plan every row of a prefill; columns that layers >= K need, None if nothing drops."""
        flags: list[list[bool]] = real.tolist()
        if inputs.ndim == 2:
            self._rows = [
                self._plan_row(row, columns, cached)
                for row, columns in zip(inputs.tolist(), flags, strict=True)
            ]
        else:
            reason = "inputs_embeds were given without input_ids"
            self._rows = [Row(reason=reason) for _ in flags]
        for row in self._rows:
            self.counters.add(sum(map(len, row.spans)), row.dropped, row.reason)
        if not any(row.dropped for row in self._rows):
            return None
        return max(
            sum(columns[cached:]) - row.dropped
            for columns, row in zip(flags, self._rows, strict=True)
        )

    def _plan_row(self, token_ids: list[int], real: list[bool], cached: int) -> Row:
        """Plan one prompt; `real` also covers the cached columns."""
        columns = [column for column, flag in enumerate(real[cached:]) if flag]
        row = Row(first=sum(real[:cached]) - (columns[0] if columns else 0))
        try:
            row.spans = self._adapter.find_spans(self._config, token_ids)
        except UnsupportedError as error:
            row.reason = str(error)
            return row
        if not row.spans:
            row.reason = "the prompt has no visual tokens"
            return row
        if columns[-1] < row.spans[-1].stop:
            row.reason = "the prompt ends inside a picture, and its last token must stay"
            return row
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

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._pass = None

    def _after_queries(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self._pass is not None:
            batch, tokens = self._pass.real.shape
            self._pass.queries = output.view(batch, tokens, -1, self._shape.head_dim)

    def _before_layer_k(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep the selected columns of the layer's inputs; build the mask that fits them."""
        current = self._pass
        if current is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]  # [B, N, d]
        real = current.real
        if current.columns is not None:
            choose(self._selector, current.rows, queries=current.queries, hidden=hidden)
            stays = _staying_columns(current)
            # stable: first what goes (the padding of shorter rows), then what stays, in order
            index = torch.argsort(stays.byte(), dim=1, stable=True)[:, -current.columns :]
            current.index = index
            real = stays.take_along_dim(index, dim=1)
            hidden = hidden.take_along_dim(index[..., None], dim=1)
            for name in self._adapter.cut_along:
                current.later_inputs[name] = _cut(kwargs.get(name), index)
        cache = kwargs.get("past_key_values")
        real = torch.cat([current.past, real], dim=1)
        current.later_inputs["attention_mask"] = create_causal_mask(
            config=self._decoder.config,
            inputs_embeds=hidden,
            attention_mask=real,
            past_key_values=_from_layer(cache, self._layer),
        )
        if cache is not None:
            setattr(cache, _ACTIVE, _KeptCache(self._layer, current.below, real))
        kwargs = kwargs | current.later_inputs
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def _before_later_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._pass is None:
            return None
        return args, kwargs | self._pass.later_inputs

    def _after_last_layer(
        self, module: nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        """Spread the output back to the prompt's columns; dropped ones hold NaN, no answer."""
        if self._pass is None or self._pass.index is None:
            return None
        batch, tokens = self._pass.real.shape
        spread = output.new_full((batch, tokens, output.shape[2]), math.nan)
        index = self._pass.index[..., None].expand(-1, -1, output.shape[2])
        return spread.scatter(1, index, output)


def _staying_columns(current: _Pass) -> torch.Tensor:
    """`[B, N]` bool: columns that layers >= K see."""
    stays = current.real.clone()
    for b, row in enumerate(current.rows):
        if row.dropped:
            for span, kept in zip(row.spans, row.kept, strict=True):
                stays[b, span.start : span.stop] = False
                stays[b, span.start + kept] = True
    return stays


def _cut(value: Any, index: torch.Tensor) -> Any:
    """Keep the columns `index` `[B, M]` of a layer input with one entry for each token."""
    if value is None:
        return None
    if isinstance(value, tuple):  # cos and sin, each [B or 1, N, head_dim]
        return tuple(part.take_along_dim(index[..., None], dim=-2) for part in value)
    return value.take_along_dim(index, dim=-1)  # position ids [B or 1, N]


def _from_layer(cache: Cache | None, layer: int) -> Cache | None:
    """A view of a cache's layers from `layer` on, or None while they are empty."""
    if cache is None or cache.get_seq_length(layer) == 0:
        return None
    return Cache(layers=cache.layers[layer:])


def _check_cache(cache: Any, layer: int) -> _KeptCache | None:
    """Refuse caches that cannot differ in length by layer; return what a pruned one remembers."""
    if not isinstance(cache, Cache) or any(type(part) is not DynamicLayer for part in cache.layers):
        raise UnsupportedError(
            f"pruning works with DynamicCache, whose layers may differ in length; "
            f"got {type(cache).__name__}"
        )
    if cache.offloading:
        raise UnsupportedError("pruning does not work with an offloaded cache")
    kept: _KeptCache | None = getattr(cache, _ACTIVE, None)
    if kept is None:
        return None
    length = cache.get_seq_length()
    if length == 0:  # reset: an empty cache remembers nothing
        delattr(cache, _ACTIVE)
        return None
    if (kept.layer, kept.below, kept.real.shape[1]) != (layer, length, cache.get_seq_length(layer)):
        raise UnsupportedError(
            "the cache of a pruned prompt was cropped, or filled under another policy, since it "
            "was last used; start from a new DynamicCache"
        )
    return kept


def _check_decoder(decoder: Any, adapter: ModelAdapter) -> None:
    attention = decoder.config._attn_implementation
    if attention not in ATTENTION:
        raise UnsupportedError(
            f"attention implementation {attention!r} is not proven with pruning; load the model "
            f"with attn_implementation set to one of {', '.join(ATTENTION)}"
        )
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedError(
            f"a decoder with {', '.join(sorted(kinds))} is not supported; supported is "
            "full_attention in every layer"
        )
    names = ("hidden_states", "attention_mask", "past_key_values", *adapter.cut_along)
    if missing := missing_parameters(decoder.layers[0].forward, names):
        raise UnsupportedError(
            f"{type(decoder.layers[0]).__name__} takes no {', '.join(missing)}; this version of "
            "transformers is not supported"
        )


def _guarded(model: PreTrainedModel, generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(generate).bind_partial(*args, **kwargs).arguments
        check_generation(model.generation_config, given | given.get("kwargs", {}))
        return generate(*args, **kwargs)

    return guarded
