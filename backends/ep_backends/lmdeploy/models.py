"""LMDeploy's models with pruning, built by its workers in place of its own (`module_map.py`).

No forward pass is written anew: a mixin wraps the doors that LMDeploy's models have. Without a
policy in the model's configuration it does nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from lmdeploy.pytorch import distributed
from lmdeploy.pytorch.engine.input_process import BaseModelInputProcessor, PreprocessInputResult
from lmdeploy.pytorch.models.internvl3_hf import InternVLForConditionalGeneration
from lmdeploy.pytorch.models.llava import LlavaForConditionalGeneration
from lmdeploy.pytorch.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from lmdeploy.pytorch.models.qwen2_vl import Qwen2VLForConditionalGeneration

from ep_backends.budgets import KEY
from ep_backends.lmdeploy.kv import kv_ratio
from ep_backends.lmdeploy.ledger import check_decoder
from ep_backends.lmdeploy.plugin import settings_of
from ep_backends.lmdeploy.prefill import DROPPED, PAGES_BELOW, Pruner

_Model: Any = object  # behind the mixin: a class of LMDeploy's, which is untyped


class PrunedModel(_Model):  # type: ignore[misc] # as it says
    """Mixed in front of a class of LMDeploy's."""

    def __init__(self, config: Any, ctx_mgr: Any, *args: Any, **kwargs: Any) -> None:
        """Build the model, then attach to its decoder.

        Args:
            config: the checkpoint's, with the policy where there is one.
            ctx_mgr: LMDeploy's `StepContextManager`.
            args, kwargs: more arguments of LMDeploy's model.
        """
        super().__init__(config, ctx_mgr, *args, **kwargs)
        settings = settings_of(config)
        self._pruner: Pruner | None = None
        if settings is None:
            return
        check_decoder(self, settings)
        ratio = kv_ratio(settings.policy, settings.shape.layers)
        world, _ = distributed.get_tp_world_rank("attn")
        self._pruner = Pruner(self, settings, ratio, _Ranks() if world > 1 else None)

    def get_input_processor(self) -> Any:
        """LMDeploy's, and what was decided of each picture comes along."""
        processor = super().get_input_processor()
        return processor if self._pruner is None else _InputProcessor(processor)

    def update_model_metas(
        self, past_key_values: Any, inputs_embeds: Any = None, context: Any = None
    ) -> Any:
        """Before each pass: what each sequence will have lost after it."""
        metas = super().update_model_metas(past_key_values, inputs_embeds, context)
        if self._pruner is None:
            return metas
        assert metas is None, "LMDeploy's own model has begun to use model_metas"
        return self._pruner.plan(context)

    def prepare_inputs_for_generation(
        self, past_key_values: Any, inputs_embeds: Any = None, context: Any = None
    ) -> dict[str, Any]:
        """LMDeploy's inputs of a pass, and ours."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            past_key_values, inputs_embeds, context
        )
        return inputs if self._pruner is None else inputs | self._pruner.inputs(context)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """LMDeploy's forward pass, between the pruner's beginning and end."""
        if self._pruner is None:
            return super().forward(*args, **kwargs)
        pages, dropped = kwargs.pop(PAGES_BELOW), kwargs.pop(DROPPED, None)
        self._pruner.begin(kwargs["attn_metadata"], pages, dropped)
        return self._pruner.end(super().forward(*args, **kwargs))

    # CUDA graphs of decode: static buffers, filled before each replay.

    def make_buffers_cudagraph(
        self, graph_meta: Any, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Allocate what a captured graph will read."""
        buffers: dict[str, torch.Tensor] = super().make_buffers_cudagraph(
            graph_meta, *args, **kwargs
        )
        if self._pruner is not None:
            lengths, pages = buffers["kv_seqlens"], buffers["block_offsets"]
            buffers[DROPPED] = torch.zeros_like(lengths)
            buffers[PAGES_BELOW] = pages.new_zeros(len(pages), pages.shape[1] * self._pruner.ratio)
        return buffers

    def fill_buffers_cudagraph(self, graph_meta: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Copy a step's inputs to where the graph reads them; lanes that pad it read block 0."""
        inputs: dict[str, Any] = super().fill_buffers_cudagraph(graph_meta, *args, **kwargs)
        if self._pruner is not None:
            for name in (DROPPED, PAGES_BELOW):
                buffer, given = graph_meta.input_buffers[name], kwargs[name]
                buffer[len(given) :].zero_()
                buffer[tuple(map(slice, given.shape))] = given
                inputs[name] = buffer
        return inputs


class _InputProcessor(BaseModelInputProcessor):  # type: ignore[misc] # LMDeploy's is untyped
    """Carries `PicturePlan`s from a request's pictures to its `MultiModalData`."""

    def __init__(self, processor: Any) -> None:
        """Wrap the model's own."""
        self._processor = processor

    def preprocess_input(
        self, input_ids: Any, input_multimodals: Any = None, **kwargs: Any
    ) -> PreprocessInputResult:
        """LMDeploy's result, one entry for each picture in the order given."""
        plans = [picture.get(KEY) for picture in input_multimodals or ()]
        result = self._processor.preprocess_input(input_ids, input_multimodals, **kwargs)
        if any(plans):
            for plan, data in zip(plans, result.input_multimodals["image"], strict=True):
                if plan is not None:
                    data.meta = (data.meta or {}) | {KEY: plan}
        return result


class _Ranks:
    """The tensor-parallel group of attention."""

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        world, _ = distributed.get_tp_world_rank("attn")
        parts = [torch.empty_like(tensor) for _ in range(world)]
        distributed.all_gather(parts, tensor, group=distributed.get_tp_group("gpu", "attn"))
        return torch.cat(parts, dim=dim)

    def broadcast(self, tensor: torch.Tensor) -> None:
        group = distributed.get_tp_group("gpu", "attn")
        first = torch.distributed.get_global_rank(group, 0)
        distributed.broadcast(tensor, first, group=group)


class PrunedQwen2VL(PrunedModel, Qwen2VLForConditionalGeneration):  # type: ignore[misc] # untyped
    """Qwen2-VL."""


class PrunedQwen2_5VL(PrunedModel, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc] # untyped
    """Qwen2.5-VL."""


class PrunedLlava(PrunedModel, LlavaForConditionalGeneration):  # type: ignore[misc] # untyped
    """LLaVA-1.5."""


class PrunedInternVL(PrunedModel, InternVLForConditionalGeneration):  # type: ignore[misc] # untyped
    """InternVL3 in Hugging Face layout."""
