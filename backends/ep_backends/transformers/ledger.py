"""Where this backend reaches into transformers, and what it cannot work with.

Everything is attached through official doors (module hooks, one instance attribute); the points
below are what those doors rely on.
"""

from __future__ import annotations

import copy
from typing import Any

from ep_core.errors import UnsupportedError
from ep_core.patching import AttachPoint

_LAYER_WHY = "layers >= K get shorter inputs, passed by these names"
_LAYER_UPSTREAM = "forward hooks are official; the names of a layer's inputs are convention"
_LAYER_REMOVE = "transformers offers token dropping inside the decoder"
_LAYER_INPUTS = (
    "hidden_states",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "position_embeddings",
)

POINTS = (
    AttachPoint(
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLDecoderLayer.forward",
        _LAYER_INPUTS,
        _LAYER_WHY,
        _LAYER_UPSTREAM,
        _LAYER_REMOVE,
    ),
    AttachPoint(
        "transformers.models.llama.modeling_llama:LlamaDecoderLayer.forward",
        _LAYER_INPUTS,
        _LAYER_WHY,
        _LAYER_UPSTREAM,
        _LAYER_REMOVE,
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

ATTENTION = ("sdpa", "eager")
GENERATION_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")

_REFUSED_OPTIONS = {
    "prefill_chunk_size": "a chunk may end inside a picture, whose tokens are ranked together",
    "output_attentions": "layers >= K attend fewer tokens, so attention maps differ in size",
    "output_hidden_states": "layers >= K hold fewer tokens, so hidden states differ in size",
}


def check_generation(default: Any, arguments: dict[str, Any]) -> None:
    """Refuse, by name, what cannot work with pruning.

    Args:
        default: the model's `GenerationConfig`.
        arguments: keyword arguments of a `generate` call.

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
    for name, reason in _REFUSED_OPTIONS.items():
        if getattr(config, name):
            raise _refusal(name, reason)


def _refusal(what: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} does not work with pruning: {reason}; leave it out, or disable pruning first"
    )
