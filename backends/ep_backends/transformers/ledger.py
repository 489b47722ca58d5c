"""Where this backend reaches into transformers, and what it cannot work with.

Everything is attached through official doors (module hooks, one instance attribute); the points
below are what those doors rely on.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from ep_core.budget import FlopsReduction
from ep_core.errors import UnsupportedError
from ep_core.family import Family
from ep_core.patching import AttachPoint, missing_parameters
from ep_core.policy import PruningPolicy
from ep_core.selectors import Selector

_LAYER_INPUTS = (
    "hidden_states",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "position_embeddings",
)
_DECODER_LAYERS = (
    "transformers.models.llama.modeling_llama:LlamaDecoderLayer",
    "transformers.models.qwen2.modeling_qwen2:Qwen2DecoderLayer",
    "transformers.models.qwen2_vl.modeling_qwen2_vl:Qwen2VLDecoderLayer",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLDecoderLayer",
)

POINTS = (
    *(
        AttachPoint(
            f"{layer}.forward",
            _LAYER_INPUTS,
            "layers >= K get shorter inputs, passed by these names",
            "forward hooks are official; the names of a layer's inputs are convention",
            "transformers offers token dropping inside the decoder",
        )
        for layer in _DECODER_LAYERS
    ),
    AttachPoint(
        "transformers.masking_utils:create_causal_mask",
        ("config", "inputs_embeds", "attention_mask", "past_key_values"),
        "builds the mask of layers >= K with the engine's own rules for each attention kind",
        "public function, used by every model file",
        "layers of one cache may differ in length without a mask of their own",
    ),
    AttachPoint(
        "transformers.cache_utils:Cache.__init__",
        ("layers",),
        "a view of the cache's layers >= K tells the mask builder their length",
        "public constructor",
        "create_causal_mask takes layer_idx in every supported version",
    ),
    AttachPoint(
        "transformers.generation.utils:GenerationMixin.generate",
        ("generation_config", "assistant_model", "custom_generate"),
        "refuses options that pruning cannot work with, before anything runs",
        "none: generate has no validation door",
        "transformers lets a model veto generation options",
    ),
    AttachPoint(
        "transformers.generation.configuration_utils:GenerationConfig.get_generation_mode",
        ("assistant_model",),
        "names the decoding method that a call will use",
        "public method",
        "transformers lets a model veto generation options",
    ),
)

# what else a decoder layer gets with one entry for each token
CUT_ALONG = ("position_embeddings", "position_ids")

ATTENTION = ("sdpa", "eager")
GENERATION_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")

_BY_LAYER = {
    "output_attentions": "layers >= K attend fewer tokens, so attention maps differ in size",
    "output_hidden_states": "layers >= K hold fewer tokens, so hidden states differ in size",
}
_REFUSED_OPTIONS = _BY_LAYER | {
    "prefill_chunk_size": "a chunk may end inside a picture, whose tokens are ranked together",
    "guidance_scale": "it runs a second prompt through the model for each request",
}


def check_decoder(decoder: Any, family: Family, selector: Selector, *, query_norm: bool) -> None:
    """Refuse decoders that the hooks, or the method, do not fit.

    Raises:
        UnsupportedError: with the property, and what is supported.
    """
    config, first = decoder.config, decoder.layers[0]
    if config._attn_implementation not in ATTENTION:
        raise UnsupportedError(
            f"attention implementation {config._attn_implementation!r} is not proven with "
            f"pruning; load the model with attn_implementation set to one of {', '.join(ATTENTION)}"
        )
    if "attention" in selector.needs and config._attn_implementation != "eager":
        raise UnsupportedError(
            f"method {selector.name!r} reads attention maps, which "
            f"{config._attn_implementation!r} does not give; load the model with "
            "attn_implementation='eager'"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None):
        kinds.add("sliding_attention")
    if kinds != {"full_attention"}:
        raise UnsupportedError(
            f"a decoder with {', '.join(sorted(kinds - {'full_attention'}))} is not supported; "
            "supported is full_attention in every layer"
        )
    names = ("hidden_states", "attention_mask", "past_key_values", *CUT_ALONG)
    missing = missing_parameters(first.forward, names)
    attention = getattr(first, "self_attn", None)
    source = "q_norm" if query_norm else "q_proj"
    if not hasattr(attention, source):
        missing.append(f"self_attn.{source}")
    if missing:
        raise UnsupportedError(
            f"{type(first).__name__} has no {', '.join(missing)}, which pruning relies on"
        )
    if hasattr(attention, "q_norm") and not query_norm:
        raise UnsupportedError(
            f"{type(first).__name__} normalises its queries, which the family "
            f"{family.name} does not know of; supported are decoders like Llama, Qwen2 and Qwen3"
        )


def check_inputs(module: nn.Module, decoder: Any, given: dict[str, Any]) -> None:
    """Refuse arguments of a forward call that pruning would make wrong.

    Args:
        module: the base model.
        decoder: its language model.
        given: the call's arguments by name.
    """
    if module.training and torch.is_grad_enabled():
        raise _refusal("training", "a dropped token has no output to learn from")
    for name, reason in _BY_LAYER.items():
        if given.get(name) or any(getattr(m.config, name, False) for m in (module, decoder)):
            raise _refusal(name, reason)
    positions = given.get("position_ids")
    if positions is None or given.get("attention_mask") is not None:
        return
    # without a mask transformers reads packed prompts off the text positions
    text = positions[0] if positions.ndim == 3 and len(positions) == 4 else positions
    if text.ndim == 2 and bool((text.diff(dim=-1) != 1).any()):
        raise _refusal("packed position_ids", "several prompts in one row cannot be told apart")


def check_generation(default: Any, policy: PruningPolicy, arguments: dict[str, Any]) -> None:
    """Refuse options of `generate` that cannot work with pruning.

    Args:
        default: the model's `GenerationConfig`.
        policy: what is pruned.
        arguments: arguments of the call by name.

    Raises:
        UnsupportedError: with the option, the reason and what to do.
    """
    config = copy.deepcopy(arguments.get("generation_config") or default)
    config.update(**{name: value for name, value in arguments.items() if hasattr(config, name)})
    mode = str(config.get_generation_mode(arguments.get("assistant_model")).value)
    if mode not in GENERATION_MODES:
        raise _refusal(mode.replace("_", " "), f"supported are {', '.join(GENERATION_MODES)}")
    if arguments.get("custom_generate") is not None:
        raise _refusal("custom_generate", "a decoding loop that was never tested with pruning")
    if config.cache_implementation not in (None, "dynamic"):
        raise _refusal(
            f"cache_implementation={config.cache_implementation!r}",
            "layers >= K need a cache that is shorter than below: the dynamic cache",
        )
    if config.use_cache is False and isinstance(policy.budget, FlopsReduction):
        raise _refusal(
            "use_cache=False under a flops budget", "the prompt, and so the budget, grows each step"
        )
    for name, reason in _REFUSED_OPTIONS.items():
        if getattr(config, name):
            raise _refusal(name, reason)


def refuse_continuous_batching(method: Callable[..., Any]) -> Callable[..., NoReturn]:
    """What takes the place of transformers' continuous batching while pruning is on."""

    @functools.wraps(method)
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal("continuous batching", "its paged cache has one length for all layers")

    return refuse


def _refusal(what: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} does not work with pruning: {reason}; leave it out, or disable pruning first"
    )
