"""Where this backend reaches into SGLang, and what it cannot work with.

SGLang's own doors come first: a plugin entry point, hooks on its argument resolution, a registered
prefix cache, a tree component, hooks on named functions. The points below are those hooks and what
the doors rely on.
"""

from __future__ import annotations

import os
from typing import Any

from ep_core.errors import UnsupportedError
from ep_core.family import Family
from ep_core.patching import AttachPoint, missing_parameters

TESTED = "0.5.23"
ATTENTION = ("triton", "torch_native")
GLUE_GRAPH = "SGLANG_ENABLE_METADATA_GLUE_GRAPH"

_TREE = "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache"
_TWO_POOLS = "hybrid models have two pools; nothing official asks for them in another model"

# wrapped through SGLang's HookRegistry, by the functions of plugin.py
HOOKED = {
    "derive_pools": AttachPoint(
        "sglang.srt.configs.model_config:ModelConfig._derive_hybrid_model",
        (),
        "layers from K on get a KV pool of their own, of kept tokens",
        _TWO_POOLS,
        "a model config can ask for two groups of layers",
    ),
    "build_attention": AttachPoint(
        "sglang.srt.model_executor.model_runner_components.attention_backend_setup"
        ":build_attention_backends",
        ("model_runner",),
        "layers from K on attend through an instance of their own; the decoder's hooks go on",
        "register_attention_backend adds a kind, but cannot wrap the one that was chosen",
        "an attention backend can be chosen for each group of layers",
    ),
    "free_kept": AttachPoint(
        "sglang.srt.mem_cache.allocator.swa:SWATokenToKVPoolAllocator._free_swa_pages",
        ("free_index", "start_pos"),
        "slots of dropped tokens are already free",
        "frees of both pools assume one slot in each for every token",
        "free_swa skips slots that map to none, as its set-shaped path does for larger pages",
    ),
    "reserve": AttachPoint(
        "sglang.srt.mem_cache.allocator.swa:SWATokenToKVPoolAllocator.create_prefill_budget",
        ("tree_cache", "num_mixed_decode_tokens"),
        "a budget for a pool without windows: running answers take more of it, prompts may be cut",
        "official for allocators of one's own; SGLang chooses the class by the model",
        "a pool without a window reserves what running requests will need",
    ),
    "admit": AttachPoint(
        "sglang.srt.managers.scheduler:Scheduler._add_request_to_queue",
        ("req", "is_retracted"),
        "a request's policy and plan are settled before it looks for a cached prefix",
        "Scheduler._create_generation_req is an extension point, but comes before the pictures",
        "there is an extension point for requests that are complete",
    ),
    "report_once": AttachPoint(
        "sglang.srt.managers.scheduler_components.output_streamer"
        ":SchedulerOutputStreamer.is_request_level_customized_info_key",
        ("key",),
        "meta_info['entropyprune'] is one value for a request, not one for each token",
        "official for subclasses of the streamer, which need a subclass of the scheduler",
        "request-level keys can be registered",
    ),
}

# relied on as they are
USED = (
    AttachPoint(
        "sglang.srt.arg_groups.resolution_hooks:register_resolution_hook",
        ("name",),
        "reads the policy, chooses defaults and refuses what cannot work, before anything starts",
        "official",
        "never",
    ),
    AttachPoint(
        "sglang.srt.model_loader.utils:get_resolved_model_impl",
        ("model_config",),
        "a model that SGLang would run with transformers' code is refused before anything starts",
        "public function",
        "never",
    ),
    AttachPoint(
        "sglang.srt.arg_groups.overrides:declare_resolution",
        ("server_args", "source"),
        "how a resolution hook sets an argument",
        "official for SGLang's own hooks",
        "never",
    ),
    AttachPoint(
        "sglang.srt.mem_cache.registry:register_radix_cache_backend",
        ("name", "factory"),
        "the prefix cache that knows about dropped tokens",
        "official",
        "never",
    ),
    AttachPoint(
        "sglang.srt.mem_cache.registry:create_unified_radix_cache",
        ("ctx", "cache_class"),
        "makes SGLang's own tree with our class and component",
        "public function",
        "never",
    ),
    AttachPoint(
        "sglang.srt.mem_cache.unified_cache.components.swa:SWAComponent.reclaimable_value_len",
        ("node",),
        "a node holds fewer slots of the kept pool than tokens",
        "official: made for components whose values have less behind them than their length",
        "never",
    ),
    AttachPoint(
        "sglang.srt.mem_cache.unified_cache.components.swa:SWAComponent.prepare_for_caching_req",
        ("req", "insert_params", "token_ids_len", "is_finished"),
        "keeps half a picture out of the tree",
        "official",
        "never",
    ),
    AttachPoint(
        "sglang.srt.mem_cache.prefill_budget:SWAPrefillBudget.check_prefill",
        ("extend_input_len", "total_tokens", "max_new_tokens"),
        "admission asks the budget for room in both pools",
        "public class",
        "never",
    ),
    AttachPoint(
        f"{_TREE}._match_tree",
        ("params",),
        "cuts a hit that ends inside a picture back to its start",
        "match validators see a node but not the request",
        "a component's validator is given the request",
    ),
    AttachPoint(
        f"{_TREE}.checkpoint",
        ("req", "up_to"),
        "gives dropped slots back before a request is inserted",
        "public method",
        "never",
    ),
    AttachPoint(
        f"{_TREE}.claim_kv_row",
        ("req",),
        "gives dropped slots back before a request's slots are freed",
        "public method; the first step of every release",
        "there is a callback before a request's slots are freed",
    ),
    AttachPoint(
        f"{_TREE}.swa_transient_size",
        (),
        "keeps SGLang's own leak check right about dropped tokens",
        "public method",
        "never",
    ),
    AttachPoint(
        "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.forward",
        ("q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
        "one layer's attention, sent to the instance that holds its tokens",
        "official: the contract of attention backends",
        "never",
    ),
    AttachPoint(
        "sglang.srt.layers.attention.base_attn_backend"
        ":AttentionBackend.init_forward_metadata_out_graph",
        ("forward_batch", "in_capture"),
        "prepares both instances for a decode graph",
        "official: the contract of attention backends",
        "never",
    ),
    AttachPoint(
        "sglang.srt.layers.layer_boundary.residual.batch:fold",
        ("hidden_states", "forward_batch"),
        "completes the residual before tokens are dropped",
        "used by SGLang's own models",
        "layers take and return complete hidden states",
    ),
    AttachPoint(
        "sglang.srt.layers.layer_boundary.residual.batch:set_written",
        ("hidden_states", "forward_batch"),
        "hands the kept tokens' hidden states on",
        "used by SGLang's own models",
        "layers take and return complete hidden states",
    ),
    AttachPoint(
        "sglang.srt.layers.attention.graph_utils:padded_extend_real_tokens",
        ("q", "forward_batch"),
        "takes rows beyond global_num_token_non_padded_cpu for padding, so that is kept right",
        "a field of the batch that SGLang's own padding sets",
        "layers are given the number of their tokens",
    ),
    AttachPoint(
        "sglang.srt.models.qwen2:Qwen2DecoderLayer.forward",
        ("positions", "hidden_states", "forward_batch"),
        "layers from K on get the kept tokens, by these inputs",
        "forward hooks are official; the order of a layer's inputs is convention",
        "SGLang offers token dropping inside the decoder",
    ),
    AttachPoint(
        "sglang.srt.models.llama:LlamaDecoderLayer.forward",
        ("positions", "hidden_states", "forward_batch"),
        "layers from K on get the kept tokens, by these inputs",
        "forward hooks are official; the order of a layer's inputs is convention",
        "SGLang offers token dropping inside the decoder",
    ),
)

POINTS = (*USED, *HOOKED.values())

# argument -> (values that are fine, why others are not)
FINE: dict[str, tuple[tuple[object, ...], str]] = {
    "pp_size": ((1,), "the layers from K on must be on the same device as layer K"),
    "attn_dp_size": ((1,), "idle ranks of attention data parallelism were never tested"),
    "dcp_size": ((1,), "slots would be spread over ranks"),
    "attn_cp_size": ((1,), "a picture would be spread over ranks"),
    "page_size": ((1,), "dropped tokens free single slots"),
    "kv_cache_dtype": (("auto",), "quantised KV was never tested with pruning"),
    "disaggregation_mode": (("null",), "KV transfer moves one slot for each token and layer"),
    "radix_cache_backend": ((None, "entropyprune"), "pruning brings the prefix cache it needs"),
    "nnodes": ((1,), "each node would read its own policy"),
    "kv_canary": (("none",), "it expects a slot in each pool for every token"),
    "model_impl": (("auto", "sglang"), "the hooks fit SGLang's own models"),
}
OFF: dict[str, str] = {
    "speculative_algorithm": "draft models would see another context than the target",
    "enable_two_batch_overlap": "a batch is split after the tokens to drop were planned",
    "enable_single_batch_overlap": "it was never tested with pruning",
    "enable_mixed_chunk": "a prefill batch would carry decode tokens without their pictures",
    "enable_hierarchical_cache": "host copies hold one slot for each token",
    "enable_unified_memory": "one pool cannot hold two numbers of tokens",
    "enable_lmcache": "it brings a prefix cache of its own",
    "enable_flexkv": "it brings a prefix cache of its own",
    "enable_unified_cache_external_linker": "host copies hold one slot for each token",
    "enable_hisparse": "it brings a KV pool of its own",
    "enable_kv_cache_sharding": "slots would be spread over ranks",
    "enable_page_major_kv_layout": "it brings a KV pool of its own",
    "enable_streaming_session": "a session keeps its KV between turns",
    "enable_session_radix_cache": "it was never tested with pruning",
    "enable_pdmux": "prefill and decode would share the state of one pass",
    "enable_lora": "adapters are applied by the lengths of unpruned requests",
    "lora_paths": "adapters are applied by the lengths of unpruned requests",
    "enable_torch_compile": "a compiled decoder would skip the hooks",
    "enable_layernorm_sp": "a picture would be spread over ranks",
    "enable_prefill_cp": "a picture would be spread over ranks",
    "enable_attn_tp_input_scattered": "a picture would be spread over ranks",
    "dllm_algorithm": "diffusion models have no prefill to prune",
    "is_embedding": "embedding models read every token",
    "use_ray": "workers started by Ray were never tested with pruning",
    "disable_hybrid_swa_memory": "layers from K on need a KV pool of their own",
    "prefill_only_disable_kv_cache": "pruning works on the KV cache",
    "encoder_only": "there is no decoder to prune",
    "language_only": "pictures that arrive from another server were never tested",
    "enable_return_aux_hidden_states": "layers from K on hold fewer tokens than those below",
    "enable_nvidia_megakernel": "it would pass by the attention of the pruned layers",
    "enable_amd_monokernel": "it would pass by the attention of the pruned layers",
    "debug_cuda_graph": "it was never tested with pruning",
    "enable_mis": "it was never tested with pruning",
    "enable_return_routed_experts": "it reads every token in every layer",
}


def check_arguments(arguments: Any) -> None:
    """Refuse server arguments that pruning cannot work with.

    Args:
        arguments: SGLang's arguments after its own resolution.

    Raises:
        UnsupportedError: the flag, the reason and what to do.
    """
    for name, (fine, reason) in FINE.items():
        value = getattr(arguments, name)
        if value not in fine:
            raise _refusal(f"{_flag(name)} {value}", reason)
    for name, reason in OFF.items():
        if getattr(arguments, name):
            raise _refusal(_flag(name), reason)
    graphs = arguments.cuda_graph_config
    if graphs is not None:
        if graphs.prefill.backend != "disabled":
            raise _refusal(
                f"a prefill CUDA graph ({graphs.prefill.backend})",
                "the number of tokens inside the decoder depends on what is dropped",
            )
        if graphs.decode.backend not in ("full", "disabled"):
            raise _refusal(
                f"--cuda-graph-backend-decode {graphs.decode.backend}",
                "it was never tested with pruning",
            )
    if os.environ.get(GLUE_GRAPH, "").lower() in ("1", "true", "yes", "y"):
        raise _refusal(GLUE_GRAPH, "preparing a decode pass reads lengths on the host")
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    chosen = {getattr(arguments, name) for name in names} - {None}
    if unproven := chosen - set(ATTENTION):
        raise UnsupportedError(
            f"attention backend {sorted(unproven)[0]!r} is not proven with pruning; use "
            f"--attention-backend with one of {', '.join(ATTENTION)}"
        )
    if len(chosen) > 1:
        raise UnsupportedError(
            "different attention backends for prefill and decode are not proven with pruning; use "
            f"--attention-backend {ATTENTION[0]} for both"
        )


def check_model(config: Any, family: Family, config_json: dict[str, Any]) -> None:
    """Refuse models that the pools and hooks do not fit.

    Args:
        config: SGLang's `ModelConfig`.
        family: of the model's family.
        config_json: the checkpoint's config.json.

    Raises:
        UnsupportedError: with the property.
    """
    if config.is_hybrid_swa or getattr(config.hf_text_config, "use_sliding_window", False):
        raise UnsupportedError("a decoder with sliding-window attention is not supported")
    if family.decoder(config_json).query_norm:
        raise UnsupportedError("a decoder that normalises its queries is not supported in SGLang")
    from sglang.srt.model_loader.utils import get_resolved_model_impl

    # what was asked for is refused with the arguments; this is SGLang's own fallback
    if config.model_impl in FINE["model_impl"][0] and get_resolved_model_impl(config) != "sglang":
        raise UnsupportedError(
            f"SGLang {TESTED} runs {config.hf_config.architectures[0]} with transformers' model "
            "code, which the hooks do not fit"
        )


def check_decoder(layers: Any, layer: int) -> None:
    """Refuse decoders that the hooks do not fit.

    Raises:
        UnsupportedError: with what the decoder lacks.
    """
    first = layers[0]
    missing = missing_parameters(first.forward, ("positions", "hidden_states", "forward_batch"))
    attention = first.self_attn
    missing += [
        f"self_attn.{name}"
        for name in ("qkv_proj", "q_size", "head_dim")
        if not hasattr(attention, name)
    ]
    if missing:
        raise UnsupportedError(
            f"{type(first).__name__} has no {', '.join(missing)}, which pruning relies on"
        )
    if hasattr(attention, "q_norm"):
        raise UnsupportedError("a decoder that normalises its queries is not supported in SGLang")
    if layers[layer].self_attn.attn.sliding_window_size > 0:
        raise UnsupportedError("a decoder with sliding-window attention is not supported")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refusal(flag: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{flag} does not work with pruning: {reason}; leave it out, or unset ENTROPYPRUNE"
    )
