"""Where LMDeploy's forward pass is hooked, and how its metadata is spelled.

What layers >= K compute, and which tokens stay, is the core's (`ep_core.compaction`). Forward hooks
on the decoder's layers carry it out, so the same code serves every model whose layers take
`ledger.LAYER_ARGUMENTS` by name. Before each layer there is one place, `Pruner._before_layer`: it
gives the layer the attention metadata of its group, and before layer K cuts what goes on. Layers
>= K pack the kept tokens from the first slot of the request's blocks on, and see their lengths.

LMDeploy never ends a chunk inside a picture. If it did, `Pass.add` would refuse the next chunk.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ep_backends.lmdeploy.attached import (
    STATE,
    STEP,
    SequenceState,
    plan_among,
    state_in,
    step_of,
)
from ep_backends.lmdeploy.kv import pages_below
from ep_backends.lmdeploy.settings import LMDeploySettings
from ep_core.compaction import Pass, Ranks
from ep_core.errors import EntropyPruneError

DROPPED = "entropyprune_dropped"  # inputs of a model's forward pass
PAGES_BELOW = "entropyprune_pages_below"


@dataclass
class Step:
    """One forward pass, from `update_model_metas` to its output; it travels on the `StepContext`.

    Attributes:
        compaction: what layers >= K compute; None where no sequence loses or has lost tokens, and
            in decode.
        below: attention metadata of layers < K.
        rest: that of layers >= K.
        rotary: cosines and sines of the rows that layers >= K compute; None for all rows.
    """

    compaction: Pass | None = None
    below: Any = None
    rest: Any = None
    rotary: tuple[torch.Tensor, ...] | None = None


class Pruner:
    """The hooks of one model. What a pass knows is in its `Step`."""

    def __init__(
        self,
        layers: Sequence[Any],
        settings: LMDeploySettings,
        context: Callable[[], Any],
        ranks: Ranks | None,
    ) -> None:
        """Attach to a decoder.

        Args:
            layers: of the decoder.
            settings: what to prune.
            context: gives LMDeploy's current `StepContext`.
            ranks: tensor-parallel ranks, or None for one alone.
        """
        self.settings = settings
        self._context, self._ranks = context, ranks
        self._counts: list[int] = []  # of the decode step before, and the same on the device
        self._dropped: torch.Tensor | None = None
        if "queries" in settings.core.selector.needs:
            projection = layers[settings.core.layer - 1].self_attn.qkv_proj
            projection.register_forward_hook(self._after_projection)
        for i, layer in enumerate(layers):
            names = tuple(inspect.signature(layer.forward).parameters)
            layer.register_forward_pre_hook(partial(self._before_layer, i, names), with_kwargs=True)

    def plan(self, context: Any) -> list[dict[str, Any]] | None:
        """`update_model_metas`: plan a pass, and say what each sequence has behind it afterwards.

        Args:
            context: LMDeploy's `StepContext`.
        """
        step = Step()
        setattr(context, STEP, step)
        if context.is_decoding:
            metas: list[dict[str, Any]] | None = context.model_metas
            return metas
        batch = len(context.q_seqlens)
        none: list[Any] = [None] * batch
        before = [state_in(meta) for meta in context.model_metas or none]
        plans = [
            state.plan or plan_among(pictures)
            for state, pictures in zip(before, context.input_multimodals or none, strict=True)
        ]
        if batch == 1:  # known without asking the device, which would wait for it
            news, totals = [context.input_ids.numel()], [context.sum_kv_seqlen]
        elif any(plans):
            news, totals = torch.stack([context.q_seqlens, context.kv_seqlens]).tolist()
        else:
            return [{STATE: SequenceState(passes=state.passes + 1)} for state in before]
        current = Pass()
        after = []
        for new, total, state, plan in zip(news, totals, before, plans, strict=True):
            start = total - new
            if start and not state.passes:
                raise EntropyPruneError(
                    f"{start} tokens of a sequence are cached, and nothing says which of them "
                    "layers >= K hold; please report it"
                )
            known = len(current.units)
            current.add(plan, new, prefix=start)
            ranked = current.units[known:] if self.settings.details else ()
            after.append({STATE: SequenceState(plan, state.passes + 1, (*state.ranked, *ranked))})
        if any(plans):
            step.compaction = current
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
        inputs = {PAGES_BELOW: pages_below(table, per_block, self.settings.ratio)}
        if context.is_decoding:
            metas = context.model_metas or [None] * len(context.kv_seqlens)
            counts = [state_in(meta).dropped for meta in metas]
            if self._dropped is None or counts != self._counts:
                dropped = torch.tensor(counts, dtype=context.kv_seqlens.dtype)
                self._dropped = dropped.to(context.kv_seqlens.device, non_blocking=True)
                self._counts = counts
            inputs[DROPPED] = self._dropped
        return inputs

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around a model's forward pass; may be captured in a CUDA graph in decode.

        Args:
            run: LMDeploy's own pass.
            args, kwargs: its arguments, and the tensors of `inputs`.

        Returns:
            LMDeploy's output, hidden states `[1, T, d]`; those of dropped tokens are zero.
        """
        step = step_of(self._context())
        metadata = kwargs["attn_metadata"]
        pages, dropped = kwargs.pop(PAGES_BELOW), kwargs.pop(DROPPED, None)
        step.below = dataclasses.replace(metadata, block_offsets=pages)
        step.rest = metadata
        if dropped is not None:
            lengths = metadata.kv_seqlens - dropped
            ends = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            step.rest = dataclasses.replace(metadata, kv_seqlens=lengths, cu_seqlens_k=ends)
        elif step.compaction is not None:
            step.rest = kept_metadata(metadata, step.compaction)
        hidden = run(*args, **kwargs)
        if step.compaction is None or not step.compaction.shortens:
            return hidden
        return step.compaction.spread(hidden[0], 0.0)[None]

    def _after_projection(self, module: Any, args: Any, output: torch.Tensor) -> None:
        compaction = step_of(self._context()).compaction
        if compaction is not None and compaction.shortens:
            queries, _, _ = module.split_qkv(output.flatten(0, -2))
            compaction.copy_queries(queries)

    def _before_layer(
        self, index: int, names: Sequence[str], layer: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Between two layers: the seam. All arguments go on by name, unknown ones as they are."""
        given = dict(zip(names, args, strict=False)) | kwargs
        step = step_of(self._context())
        if index < self.settings.core.layer:
            return (), given | {"attn_metadata": step.below}
        if index == self.settings.core.layer:
            given = self._cut(step, given)
        given["attn_metadata"] = step.rest
        if step.rotary is not None:
            given["rotary_pos_emb"] = step.rotary
        return (), given

    def _cut(self, step: Step, given: dict[str, Any]) -> dict[str, Any]:
        """Rank, and hand the kept tokens on, at their own rotary positions."""
        compaction = step.compaction
        if compaction is None or not compaction.shortens:
            return given
        hidden, residual = given["hidden_states"], given.get("residual")
        entering = hidden if residual is None else hidden + residual
        compaction.choose(self.settings.core.selector, entering[0], ranks=self._ranks)
        step.rotary = tuple(compaction.take(part) for part in given["rotary_pos_emb"])
        return given | {
            "hidden_states": compaction.take(hidden, dim=1),
            "residual": None if residual is None else compaction.take(residual, dim=1),
        }


def kept_metadata(metadata: Any, compaction: Pass) -> Any:
    """The attention metadata of layers >= K in prefill: lengths of kept tokens."""
    new = compaction.lengths
    held = [before + added for before, added in zip(compaction.prefixes, new, strict=True)]
    lengths = torch.tensor([new, held])
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
        kv_flatten_size=sum(held),
        max_q_seqlen=max(new),
        max_kv_seqlen=max(held),
    )
