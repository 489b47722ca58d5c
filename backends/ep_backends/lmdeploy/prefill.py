"""Rank each picture's tokens before layer K, run the kept ones through the layers from there on.

Forward hooks on the decoder's layers do it, so the same code serves every model whose layers take
`(hidden_states, rotary_pos_emb=, past_key_value=, residual=, attn_metadata=)`. Layers >= K pack the
kept tokens from the first slot of the request's blocks on, and see lengths of kept tokens.

LMDeploy never ends a chunk inside a picture, so a picture is always whole.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ep_backends.budgets import KEY
from ep_backends.lmdeploy.kv import PicturePlan, pages_below
from ep_backends.selection import Ranks, choose
from ep_core.errors import UnsupportedError
from ep_core.settings import Settings
from ep_core.spans import VisualSpan

DROPPED = "entropyprune_dropped"  # inputs of a model's forward pass
PAGES_BELOW = "entropyprune_pages_below"


@dataclass(frozen=True)
class Pruned:
    """A picture that lost tokens: `keep` of them stay, by name in `kept` if that was asked for."""

    span: VisualSpan
    keep: int
    kept: list[int] | None


@dataclass
class Held:
    """What a sequence lost so far; LMDeploy's `model_metas` carry it from pass to pass.

    Attributes:
        pictures: by their place in the sequence.
        passes: of prefill that it took so far.
    """

    pictures: tuple[Pruned, ...] = ()
    passes: int = 0

    @property
    def dropped(self) -> int:
        """Tokens that layers >= K do not hold."""
        return sum(len(picture.span) - picture.keep for picture in self.pictures)


@dataclass
class _Picture:
    """A picture of this pass: `[first, stop)` among its new tokens."""

    first: int
    stop: int
    keep: int
    kept: list[int] | None  # filled in for who asked


@dataclass
class _Pass:
    """One prefill pass, planned on host integers.

    Attributes:
        runs: in order, what layers >= K compute: `(first, stop)` tokens of the pass, or a picture.
        computed: tokens of each sequence that layers >= K compute.
        held: tokens of each that they hold afterwards.
        tokens: new tokens of the pass.
    """

    runs: list[tuple[int, int] | _Picture] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    tokens: int = 0
    queries: list[torch.Tensor] = field(default_factory=list)  # of each picture, [N, H, D]
    source: torch.Tensor | None = None  # tokens of the pass that went on; None: all

    @property
    def pictures(self) -> list[_Picture]:
        """Pictures that lose tokens now."""
        return [run for run in self.runs if isinstance(run, _Picture)]


class Pruner:
    """The hooks of one model, and what they pass on within a forward pass."""

    def __init__(
        self, model: nn.Module, settings: Settings, ratio: int, ranks: Ranks | None
    ) -> None:
        """Attach to a model.

        Args:
            model: LMDeploy's model.
            settings: what to prune.
            ratio: pages below layer K for each page from K on.
            ranks: tensor-parallel ranks, or None for one alone.
        """
        self._settings = settings
        self.ratio = ratio
        self._ranks = ranks
        self._pass: _Pass | None = None
        self._below: Any = None  # attention metadata of layers < K
        self._rest: Any = None  # of layers >= K
        self._rotary: Any = None
        self._counts: list[int] = []
        self._dropped: torch.Tensor | None = None
        layers, k = decoder_layers(model), settings.layer
        if "queries" in settings.selector.needs:
            projection = layers[k - 1].self_attn.qkv_proj
            projection.register_forward_hook(self._after_projection)
        for i, layer in enumerate(layers):
            hook = self._before_below if i < k else self._before_k if i == k else self._before_rest
            layer.register_forward_pre_hook(hook, with_kwargs=True)

    def plan(self, context: Any) -> list[dict[str, Any]] | None:
        """`update_model_metas`: plan a pass, and say what each sequence will have lost after it.

        Args:
            context: LMDeploy's `StepContext`.
        """
        self._pass = None
        metas: list[dict[str, Any]] | None = context.model_metas
        if context.is_decoding:
            return metas
        batch = len(context.q_seqlens)
        held = [_held(meta) for meta in metas] if metas else [Held()] * batch
        pictures = [_pruned(given) for given in context.input_multimodals or [{}] * batch]
        shorter = any(pictures) or any(one.dropped for one in held)
        if batch == 1:  # known without asking the device, which would wait for it
            news, totals = [context.input_ids.numel()], [context.sum_kv_seqlen]
        elif shorter:
            news, totals = torch.stack([context.q_seqlens, context.kv_seqlens]).tolist()
        else:
            return [{KEY: Held((), one.passes + 1)} for one in held]
        current = _Pass()
        after = []
        for new, total, before, given in zip(news, totals, held, pictures, strict=True):
            start = total - new
            if start and not before.passes:
                raise RuntimeError(
                    f"entropyprune: {start} tokens of a sequence are cached, and nothing says "
                    "which of them layers >= K hold; please report it"
                )
            # from its start a sequence is computed anew
            before = before if start else Held()
            after.append({KEY: _plan_sequence(current, before, given, start, new)})
        self._pass = current if shorter else None
        return after

    def inputs(self, context: Any) -> dict[str, torch.Tensor]:
        """What the model's forward pass takes besides its own inputs.

        Args:
            context: LMDeploy's `StepContext`.

        Returns:
            the pages of layers < K, and in decode what each sequence lost, `[B]`.
        """
        config = context.cache_config
        table = context.attn_metadata.block_offsets
        per_block = config.block_size // config.kernel_block_size
        inputs = {PAGES_BELOW: pages_below(table, per_block, self.ratio)}
        if context.is_decoding:
            metas = context.model_metas or [None] * len(context.kv_seqlens)
            counts = [_held(meta).dropped for meta in metas]
            if self._dropped is None or counts != self._counts:
                dropped = torch.tensor(counts, dtype=context.kv_seqlens.dtype)
                self._dropped = dropped.to(context.kv_seqlens.device, non_blocking=True)
                self._counts = counts
            inputs[DROPPED] = self._dropped
        return inputs

    def begin(self, metadata: Any, pages: torch.Tensor, dropped: torch.Tensor | None) -> None:
        """Before a model's forward pass; may be captured in a CUDA graph in decode.

        Args:
            metadata: LMDeploy's attention metadata of the pass.
            pages: `[B, W]` pages of layers < K.
            dropped: `[B]` in decode, None in prefill.
        """
        self._below = dataclasses.replace(metadata, block_offsets=pages)
        self._rotary = None
        if dropped is not None:
            self._pass = None
            lengths = metadata.kv_seqlens - dropped
            ends = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            self._rest = dataclasses.replace(metadata, kv_seqlens=lengths, cu_seqlens_k=ends)
        else:
            self._rest = metadata if self._pass is None else _prefill_metadata(metadata, self._pass)

    def end(self, hidden: torch.Tensor) -> torch.Tensor:
        """After it: spread the output `[1, T', d]` to the pass's tokens; dropped ones read zero."""
        current, self._pass = self._pass, None
        self._below = self._rest = self._rotary = None
        if current is None or current.source is None:
            return hidden
        spread = hidden.new_zeros(1, current.tokens, hidden.shape[-1])
        return spread.index_copy_(1, current.source, hidden)

    def _after_projection(self, module: Any, args: Any, output: torch.Tensor) -> None:
        current = self._pass
        if current is None or not current.pictures:
            return
        queries, _, _ = module.split_qkv(output.flatten(0, -2))
        # copies, because RoPE may rotate them in place
        current.queries = [queries[p.first : p.stop].clone() for p in current.pictures]

    def _before_below(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attn_metadata": self._below}

    def _before_rest(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = kwargs | {"attn_metadata": self._rest}
        if self._rotary is not None:
            kwargs["rotary_pos_emb"] = self._rotary
        return args, kwargs

    def _before_k(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Hand the kept tokens on, at their own rotary positions."""
        current = self._pass
        if current is not None and current.pictures:
            hidden, *rest = args
            residual = kwargs["residual"]
            source = current.source = self._source(current, (hidden + residual)[0])
            current.queries = []
            self._rotary = tuple(part[source] for part in kwargs["rotary_pos_emb"])
            args = (hidden[:, source], *rest)
            kwargs = kwargs | {"residual": residual[:, source]}
        return self._before_rest(layer, args, kwargs)

    def _source(self, current: _Pass, hidden: torch.Tensor) -> torch.Tensor:
        """Rank the pictures' tokens; which tokens of the pass go on, `[T']` ascending.

        Args:
            current: the pass.
            hidden: `[T, d]` hidden states entering layer K.
        """
        queries = iter(current.queries)
        source = []
        for run in current.runs:
            if not isinstance(run, _Picture):
                source.append(torch.arange(*run, device=hidden.device))
                continue
            kept = choose(
                self._settings.selector,
                run.keep,
                queries=next(queries, None),
                hidden=hidden[run.first : run.stop],
                ranks=self._ranks,
            )
            if run.kept is not None:
                run.kept += kept.tolist()
            source.append(kept + run.first)
        return torch.cat(source)


def decoder_layers(model: nn.Module) -> Any:
    """The language model's layers: the module list whose layers attend through the KV cache."""
    from lmdeploy.pytorch.nn import Attention

    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            attention = getattr(module[0], "self_attn", None)
            if isinstance(getattr(attention, "attn_fwd", None), Attention):
                return module
    raise UnsupportedError(f"{type(model).__name__} has no decoder layers that pruning knows")


def _held(meta: dict[str, Any] | None) -> Held:
    held: Held = (meta or {}).get(KEY) or Held()
    return held


def _pruned(multimodals: dict[str, Any] | None) -> list[Any]:
    """Of a sequence's `MultiModalData` in a pass, those that lose tokens, in order."""
    pictures = (multimodals or {}).get("image", ())
    return sorted(
        (data for data in pictures if KEY in (data.meta or {})), key=lambda data: data.start
    )


def _plan_sequence(current: _Pass, held: Held, pictures: list[Any], start: int, new: int) -> Held:
    """Add a sequence's new tokens `[start, start + new)`; what it has lost after them."""
    first = current.tokens
    at = 0  # up to where it is planned
    lost = []
    for data in pictures:
        plan: PicturePlan = data.meta[KEY]
        span = VisualSpan(data.start, data.end)
        begin, stop = span.start - start, span.stop - start
        if not at <= begin < stop <= new:
            raise RuntimeError(
                f"entropyprune: the picture [{span.start}, {span.stop}) is not whole in a pass "
                f"over [{start}, {start + new}); please report it"
            )
        if at < begin:
            current.runs.append((first + at, first + begin))
        kept: list[int] | None = [] if plan.detailed else None
        current.runs.append(_Picture(first + begin, first + stop, plan.keep, kept))
        lost.append(Pruned(span, plan.keep, kept))
        at = stop
    if at < new:
        current.runs.append((first + at, first + new))
    current.tokens += new
    dropped = sum(len(picture.span) - picture.keep for picture in lost)
    after = Held((*held.pictures, *lost), held.passes + 1)
    current.computed.append(new - dropped)
    current.held.append(start + new - after.dropped)
    return after


def _prefill_metadata(metadata: Any, current: _Pass) -> Any:
    """The attention metadata of layers >= K."""
    lengths = torch.tensor([current.computed, current.held])
    ends = nn.functional.pad(lengths.cumsum(1), (1, 0))
    device = metadata.q_seqlens.device

    def like(values: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return values.to(device, other.dtype, non_blocking=True)

    return dataclasses.replace(
        metadata,
        q_seqlens=like(lengths[0], metadata.q_seqlens),
        kv_seqlens=like(lengths[1], metadata.kv_seqlens),
        q_start_loc=like(ends[0, :-1], metadata.q_start_loc),
        kv_start_loc=like(ends[1, :-1], metadata.kv_start_loc),
        cu_seqlens_q=like(ends[0], metadata.cu_seqlens_q),
        cu_seqlens_k=like(ends[1], metadata.cu_seqlens_k),
        kv_flatten_size=sum(current.held),
        max_q_seqlen=max(current.computed),
        max_kv_seqlen=max(current.held),
    )
