"""LMDeploy's models with pruning, built by its workers in place of its own (`module_map`).

No forward pass is written anew: a mixin wraps the doors that LMDeploy's models have. Without a
policy in the model's configuration it does nothing. `PrunedX` for an architecture X is made when it
is first asked for, from LMDeploy's own map of model classes.
"""

from __future__ import annotations

import pkgutil
from typing import Any

import torch
from lmdeploy.pytorch import distributed
from lmdeploy.pytorch.engine.input_process import BaseModelInputProcessor, PreprocessInputResult
from lmdeploy.pytorch.nn import Attention
from torch import nn

from ep_backends.lmdeploy.attached import attach_plan, plan_on
from ep_backends.lmdeploy.prefill import DROPPED, PAGES_BELOW, Pruner
from ep_backends.lmdeploy.refusals import check_decoder
from ep_backends.lmdeploy.settings import settings_in
from ep_core.errors import UnsupportedError

_Model: Any = object  # behind the mixin: a class of LMDeploy's, which is untyped


class PrunedModel(_Model):  # type: ignore[misc] # as the line above says
    """Mixed in front of a class of LMDeploy's."""

    def __init__(self, config: Any, ctx_mgr: Any, *args: Any, **kwargs: Any) -> None:
        """Build the model, then attach to its decoder.

        Args:
            config: the checkpoint's, with the policy where there is one.
            ctx_mgr: LMDeploy's `StepContextManager`.
            args, kwargs: more arguments of LMDeploy's model.
        """
        super().__init__(config, ctx_mgr, *args, **kwargs)
        settings = settings_in(config)
        self._pruner: Pruner | None = None
        if settings is None:
            return
        layers = _decoder_layers(self)
        check_decoder(self, super(), layers, settings.core)
        world, _ = distributed.get_tp_world_rank("attn")
        ranks = _Ranks() if world > 1 else None
        self._pruner = Pruner(layers, settings, ctx_mgr.current_context, ranks)

    def get_input_processor(self) -> Any:
        """What was decided of a prompt stays with its pictures."""
        processor = super().get_input_processor()
        return processor if self._pruner is None else InputProcessor(processor)

    def update_model_metas(
        self, past_key_values: Any, inputs_embeds: Any = None, context: Any = None
    ) -> Any:
        """Plans a pass on host integers; says what each sequence has behind it afterwards."""
        if self._pruner is None:
            return super().update_model_metas(past_key_values, inputs_embeds, context)
        return self._pruner.plan(context)

    def prepare_inputs_for_generation(
        self, past_key_values: Any, inputs_embeds: Any = None, context: Any = None
    ) -> dict[str, Any]:
        """Adds what layers below and from K on need to the inputs of a pass."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            past_key_values, inputs_embeds, context
        )
        return inputs if self._pruner is None else inputs | self._pruner.inputs(context)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Gives each layer its metadata, and dropped tokens a row of the output again."""
        if self._pruner is None:
            return super().forward(*args, **kwargs)
        return self._pruner.forward(super().forward, *args, **kwargs)

    # CUDA graphs of decode: static buffers, filled before each replay.

    def make_buffers_cudagraph(
        self, graph_meta: Any, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Allocates what a captured graph will read."""
        buffers: dict[str, torch.Tensor] = super().make_buffers_cudagraph(
            graph_meta, *args, **kwargs
        )
        if self._pruner is not None:
            lengths, pages = buffers["kv_seqlens"], buffers["block_offsets"]
            buffers[DROPPED] = torch.zeros_like(lengths)
            width = pages.shape[1] * self._pruner.settings.ratio
            buffers[PAGES_BELOW] = pages.new_zeros(len(pages), width)
        return buffers

    def fill_buffers_cudagraph(self, graph_meta: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Copies a step's inputs to where the graph reads them; padding lanes read block 0."""
        inputs: dict[str, Any] = super().fill_buffers_cudagraph(graph_meta, *args, **kwargs)
        if self._pruner is not None:
            for name in (DROPPED, PAGES_BELOW):
                buffer, given = graph_meta.input_buffers[name], kwargs[name]
                buffer[len(given) :].zero_()
                buffer[tuple(map(slice, given.shape))] = given
                inputs[name] = buffer
        return inputs


class InputProcessor(BaseModelInputProcessor):  # type: ignore[misc] # LMDeploy's is untyped
    """Carries the plan of a prompt from its pictures' inputs to their `MultiModalData`."""

    def __init__(self, processor: Any) -> None:
        """Wrap the model's own."""
        self._processor = processor

    def preprocess_input(
        self, input_ids: Any, input_mms: Any = None, **kwargs: Any
    ) -> PreprocessInputResult:
        """Keeps the plan of a prompt beside its pictures."""
        plan = next(filter(None, map(plan_on, input_mms or ())), None)
        result = self._processor.preprocess_input(input_ids, input_mms, **kwargs)
        if plan is not None:
            for pictures in result.input_multimodals.values():
                for data in pictures:
                    data.meta = dict(data.meta or {})
                    attach_plan(data.meta, plan)
        return result


def _decoder_layers(model: Any) -> Any:
    """The language model's layers: the module list whose layers attend through the KV cache."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            attention = getattr(module[0], "self_attn", None)
            if isinstance(getattr(attention, "attn_fwd", None), Attention):
                return module
    raise UnsupportedError(f"{type(model).__name__} has no decoder layers that pruning knows")


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


def __getattr__(name: str) -> Any:
    """The class `PrunedX`: LMDeploy's class of architecture X behind the mixin.

    A name that LMDeploy maps to something else than a class stands for that.
    """
    from lmdeploy.pytorch.models.module_map import MODULE_MAP

    architecture = name.removeprefix("Pruned")
    if name == architecture or architecture not in MODULE_MAP:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    theirs = pkgutil.resolve_name(MODULE_MAP[architecture])
    if isinstance(theirs, type):
        theirs = type(name, (PrunedModel, theirs), {"__module__": __name__})
    globals()[name] = theirs
    return theirs
