"""Where this backend reaches into LMDeploy, and what it cannot work with.

LMDeploy's own doors come first: a map of model classes that its workers read, the methods and input
processors that such a class may have, per-sequence values that it carries from pass to pass. The
points below are what the doors rely on, and the few functions that are wrapped.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from ep_core.errors import UnsupportedError
from ep_core.family import Config, Family
from ep_core.patching import AttachPoint, check_point, missing_parameters
from ep_core.settings import Settings

TESTED = "0.18.0"

_ASYNC = "lmdeploy.serve.core.async_engine:AsyncEngine"
_NO_PLUGINS = "LMDeploy has no plugins"

# wrapped by functions of ours, in each process that a policy reaches
HOOKED = {
    "build_pytorch": AttachPoint(
        f"{_ASYNC}._build_pytorch",
        ("model_path", "backend_config", "speculative_config"),
        "settles the policy and refuses what cannot work before anything is loaded",
        _NO_PLUGINS,
        "an engine can be given checks of its configuration",
    ),
    "build_turbomind": AttachPoint(
        f"{_ASYNC}._build_turbomind",
        ("model_path", "backend_config"),
        "TurboMind has no place to prune at: says so instead of serving without",
        "the TurboMind engine is compiled, its vision encoder too",
        "TurboMind can prune",
    ),
    "launch_servers": AttachPoint(
        "lmdeploy.serve.openai.launch_server:launch_server",
        ("backend_config",),
        "refuses --dp: its servers start in processes that import nothing of ours",
        _NO_PLUGINS,
        "such a process can be told to import something",
    ),
    "configure": AttachPoint(
        "lmdeploy.pytorch.config:ModelConfig.from_pretrained",
        ("pretrained_model_name_or_path", "hf_overrides"),
        "gives the model configuration, which goes to every worker, the map of our classes",
        "PytorchEngineConfig.custom_module_map is documented, but does not reach ModelConfig",
        "the engine's custom_module_map is the one that workers read",
    ),
    "plan_request": AttachPoint(
        f"{_ASYNC}.preprocess",
        ("messages", "session_id", "gen_config"),
        "decides what each picture keeps, or refuses the request with a message",
        _NO_PLUGINS,
        "an input processor sees a request's sampling parameters and can refuse it",
    ),
    "required_blocks": AttachPoint(
        "lmdeploy.pytorch.paging.block_manager.default_block_manager"
        ":DefaultBlockManager.num_required_blocks",
        ("obj", "prealloc_size"),
        "a request takes the blocks that its kept tokens need",
        "blocks are counted by the length of the sequence, for all layers alike",
        "a cache layout can say how many tokens a block holds in each group of layers",
    ),
    "grouped_plan": AttachPoint(
        "lmdeploy.pytorch.engine.model_agent.agent:build_block_cache_plan",
        ("model_config", "cache_config", "world_size", "request_collector"),
        "layers below K get more pages for a block than the others",
        "CacheBackend.build_block_layout chooses a layout by the device, not by the model",
        "a model can choose its block-cache layout",
    ),
}

_MIXIN = "lmdeploy.pytorch.models.utils.model:DeployModelMixin"
_GRAPH = "lmdeploy.pytorch.models.utils.cudagraph:CudaGraphMixin"
_LAYER = ("hidden_states", "rotary_pos_emb", "past_key_value", "residual", "attn_metadata")
_OFFICIAL = "official: what a model class in custom_module_map may have"

# relied on as they are
USED = (
    AttachPoint(
        "lmdeploy.pytorch.models.patch:update_custom_module_map",
        ("module_map_path",),
        "workers read our classes from ModelConfig.custom_module_map",
        "official",
        "never",
    ),
    *(
        AttachPoint(f"{owner}.{name}", parameters, why, _OFFICIAL, "never")
        for owner, name, parameters, why in (
            (_MIXIN, "update_model_metas", ("context",), "plans a pass on host integers"),
            (_MIXIN, "prepare_inputs_for_generation", ("context",), "adds inputs to a pass"),
            (_MIXIN, "get_input_processor", (), "pictures keep what was decided of them"),
            (_GRAPH, "make_buffers_cudagraph", ("graph_meta",), "static buffers of our inputs"),
            (_GRAPH, "fill_buffers_cudagraph", ("graph_meta",), "fills them before a replay"),
        )
    ),
    *(
        AttachPoint(
            f"lmdeploy.pytorch.models.{target}.forward",
            _LAYER,
            "forward hooks on the decoder's layers drop the tokens",
            "torch's own hooks; the parameters are LMDeploy's convention",
            "a decoder calls a method between two layers",
        )
        for target in (
            "qwen2:Qwen2DecoderLayer",
            "qwen2_vl:Qwen2DecoderLayer",
            "llama:LlamaDecoderLayer",
        )
    ),
    AttachPoint(
        "lmdeploy.pytorch.nn.linear.utils:QKVMixin.split_qkv",
        ("x",),
        "the queries before RoPE",
        "public method of a layer",
        "never",
    ),
    AttachPoint(
        "lmdeploy.pytorch.engine.cache_engine.layout:PackedBlockCacheLayout",
        ("tensor_specs", "num_layers"),
        "each group of layers has its cache in LMDeploy's own layout",
        "public dataclass",
        "never",
    ),
    AttachPoint(
        "lmdeploy.pytorch.multimodal.data_type:MultiModalData",
        ("start", "end", "meta"),
        "where a picture is in its prompt",
        "public dataclass",
        "never",
    ),
)

# importing it starts CUDA, which is the workers' to do
IN_WORKERS = (
    AttachPoint(
        "lmdeploy.pytorch.backends.cuda.attention.default:TritonAttentionMetadata",
        (
            "block_offsets",
            *("q_start_loc", "q_seqlens", "kv_start_loc", "kv_seqlens", "kv_flatten_size"),
            *("cu_seqlens_q", "cu_seqlens_k", "max_q_seqlen", "max_kv_seqlen"),
        ),
        "layers >= K attend with the lengths of the kept tokens",
        "public dataclass",
        "attention metadata can be made for a group of layers",
    ),
)

AT_START = (*HOOKED.values(), *USED)
POINTS = (*AT_START, *IN_WORKERS)

# arguments of the engine that must have one of these values, and what is said of another one
_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "device_type": (("cuda",), "pruning was tested with CUDA only; leave out --device"),
    "quant_policy": ((0,), "a quantised KV cache was never tested; leave out --quant-policy"),
    "enable_prefix_caching": (
        (False,),
        "a cached prefix does not say which tokens layers >= K hold; leave out "
        "--enable-prefix-caching",
    ),
    "dp": ((1,), "data parallelism was never tested; leave out --dp"),
    "ep": ((1,), "expert parallelism was never tested; leave out --ep"),
    "enable_microbatch": ((False,), "micro batches split a pass; leave out --enable-microbatch"),
    "enable_eplb": ((False,), "expert load balancing was never tested; leave out --enable-eplb"),
    "adapters": ((None, {}), "LoRA adapters were never tested; leave out --adapters"),
    "role": (("Hybrid",), "disaggregated prefill was never tested; leave out --role"),
    "kv_transfer_config": (
        (None,),
        "KV connectors move blocks that hold less than they expect; leave out --kv-transfer-config",
    ),
    "dllm_block_length": (
        (None,),
        "diffusion models are not pruned: --dllm-block-length",
    ),
    "empty_init": ((False,), "an engine that loads later was never tested; leave out --empty-init"),
    "language_model_only": ((False,), "there are no pictures; leave out --language-model-only"),
}


def check_arguments(engine_config: Any, speculative_config: Any) -> None:
    """Refuse what cannot work together with pruning.

    Args:
        engine_config: LMDeploy's `PytorchEngineConfig`.
        speculative_config: LMDeploy's `SpeculativeConfig`, or None.

    Raises:
        UnsupportedError: naming the first one, and what to change.
    """
    from lmdeploy.pytorch import envs

    for name, (allowed, reason) in _ARGUMENTS.items():
        value = getattr(engine_config, name)
        if getattr(value, "name", value) not in allowed and value not in allowed:
            raise UnsupportedError(f"{name}={value}: {reason}")
    if speculative_config is not None:
        raise UnsupportedError(
            "speculative decoding was never tested with pruning; leave out --speculative-algorithm"
        )
    if engine_config.custom_module_map is not None:
        raise UnsupportedError(
            "custom_module_map would be overwritten: pruning brings its own; leave it out"
        )
    if (engine_config.hf_overrides or {}).get("memory_model_path") is not None:
        raise UnsupportedError(
            "a memory model (memory_model_path) shares the KV blocks of the pruned one, which hold "
            "less than it expects; leave it out of hf_overrides"
        )
    if _has_flash_attention_3():
        raise UnsupportedError(
            "attention by flash-attention 3 was never tested with pruning; uninstall it, and "
            "LMDeploy takes its Triton kernels"
        )
    if envs.enable_decode_torch_compile:
        raise UnsupportedError(
            "LMDEPLOY_ENABLE_DECODE_TORCH_COMPILE compiles decode without the hooks; unset it"
        )


def _has_flash_attention_3() -> bool:
    """Would LMDeploy take it? Without asking for the device, which would start CUDA here."""
    try:
        importlib.import_module("lmdeploy.pytorch.third_party.flash_attn_interface")
    except Exception:  # of a compiled package: anything
        return False
    return True


def check_model(config: Any, family: Family, facts: Config) -> None:
    """Refuse a model that pruning does not know in LMDeploy.

    Args:
        config: LMDeploy's `ModelConfig`.
        family: of the model's family.
        facts: the checkpoint's config.json.

    Raises:
        UnsupportedError: and which models work.
    """
    from ep_backends.lmdeploy.module_map import MODULE_MAP

    architectures: list[str] = facts.get("architectures") or ["a class without a name"]
    # as LMDeploy looks for the class
    architecture = (facts.get("auto_map") or {}).get("AutoModelForCausalLM", architectures[0])
    if architecture not in MODULE_MAP:
        raise UnsupportedError(
            f"{family.name} as {architecture} is not supported in LMDeploy; supported are "
            f"{', '.join(MODULE_MAP)}"
        )
    if config.sliding_window > 0:
        raise UnsupportedError(
            f"the model attends in a sliding window of {config.sliding_window} tokens, which "
            "pruning would shift; use a model without one"
        )
    if family.decoder(facts).query_norm:
        raise UnsupportedError(
            "the decoder normalises its queries after the projection, where LMDeploy has no hook "
            "for them yet; use a model whose decoder is Qwen2 or Llama"
        )


def check_points(points: Iterable[AttachPoint]) -> None:
    """Refuse an LMDeploy in which an attach point is not as it was.

    Raises:
        UnsupportedError: naming the first that does not fit.
    """
    from lmdeploy.version import __version__

    failed = [status for status in map(check_point, points) if status.state == "FAILED"]
    if failed:
        raise UnsupportedError(
            f"this LMDeploy ({__version__}, tested is {TESTED}) does not fit: {failed[0].target}: "
            f"{failed[0].detail}; run entropyprune doctor"
        )


def check_decoder(model: Any, settings: Settings) -> None:
    """Refuse a decoder whose layers cannot be hooked as they are.

    Args:
        model: LMDeploy's model, built.
        settings: what to prune.

    Raises:
        UnsupportedError: naming what does not fit.
    """
    check_points(IN_WORKERS)
    from lmdeploy.pytorch.backends.cuda.attention.default import TritonAttentionImpl
    from lmdeploy.pytorch.models.utils.cudagraph import PiecewiseCudaGraphMixin

    from ep_backends.lmdeploy.prefill import decoder_layers

    layers = decoder_layers(model)
    if len(layers) != settings.shape.layers:
        raise UnsupportedError(
            f"the decoder has {len(layers)} layers, its configuration says {settings.shape.layers}"
        )
    kind = type(layers[0])
    if missing := missing_parameters(kind.forward, _LAYER):
        raise UnsupportedError(f"{kind.__name__} takes no {missing[0]}: its tokens cannot be cut")
    attention = layers[0].self_attn.attn_fwd.impl
    if isinstance(attention, TritonAttentionImpl) and type(attention) is not TritonAttentionImpl:
        raise UnsupportedError(
            f"attention by {type(attention).__name__} was never tested with pruning"
        )
    if isinstance(model, PiecewiseCudaGraphMixin):
        raise UnsupportedError("piecewise CUDA graphs of prefill fix how many tokens a layer gets")
