"""Where this backend reaches into SGLang, and whether the installed version fits.

SGLang's own doors come first: a plugin entry point, hooks on its argument resolution, a registered
prefix cache, a tree component, an attention backend, hooks on named functions. What is wrapped or
called is listed below with its reason; what our subclasses override is read off them; what is only
read of SGLang's objects stands in `READ`.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType

from ep_backends.sglang.arguments import FINE, OFF, STEPS
from ep_backends.sglang.families import LAYER_INPUTS
from ep_core.patching import AttachPoint, PointStatus, check_point, missing_parameters

TESTED = "0.5.23"

_TWO_POOLS = "hybrid models have two pools; nothing official asks for them in another model"
_OFFICIAL = "official"
_NEVER = "never"


@dataclass(frozen=True)
class Read:
    """Attributes of a class of SGLang's, or of its objects, that are read as they are.

    Attributes:
        owner: `"package.module:Class"`.
        names: of the attributes.
        why: what they are read for.
    """

    owner: str
    names: tuple[str, ...]
    why: str


# wrapped through SGLang's HookRegistry, by the functions of `plugin.hooks`
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
    "make_batch": AttachPoint(
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
        ("batch", "model_runner"),
        "the batch of a forward pass carries what was decided about its requests",
        "a batch carries a request's pictures, and forgets them before the first layer",
        "a batch carries its requests, or a field for plugins",
    ),
    "make_replay_view": AttachPoint(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner:build_replay_fb_view",
        ("forward_batch",),
        "so does the view by which a decode graph is prepared",
        "a view has the fields that SGLang's own attention backends read",
        "a view carries its batch",
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

# called, or relied on as they are
CALLED = (
    AttachPoint(
        "sglang.srt.arg_groups.resolution_hooks:register_resolution_hook",
        ("name",),
        "reads the policy, chooses defaults and refuses what cannot work, before anything starts",
        _OFFICIAL,
        _NEVER,
    ),
    AttachPoint(
        "sglang.srt.arg_groups.overrides:declare_resolution",
        ("server_args", "source"),
        "how a resolution hook sets an argument",
        "official for SGLang's own hooks",
        _NEVER,
    ),
    AttachPoint(
        "sglang.srt.arg_groups.overrides:resolving_view",
        ("server_args",),
        "how a resolution hook reads arguments",
        "official for SGLang's own hooks",
        _NEVER,
    ),
    AttachPoint(
        "sglang.srt.arg_groups.model_override_base:model_config_of",
        ("server_args",),
        "the model, before anything starts",
        "used by SGLang's own hooks",
        _NEVER,
    ),
    AttachPoint(
        "sglang.srt.plugins.hook_registry:HookRegistry.register",
        ("target", "hook", "hook_type"),
        "how a function is wrapped",
        _OFFICIAL,
        _NEVER,
    ),
    AttachPoint(
        "sglang.srt.plugins.hook_registry:HookRegistry.apply_hooks",
        (),
        "puts hooks on in the launcher, which loads plugins before it reads its arguments",
        "public method",
        _NEVER,
    ),
    AttachPoint(
        "sglang.srt.model_loader.utils:get_resolved_model_impl",
        ("model_config",),
        "a model that SGLang would run with transformers' code is refused before anything starts",
        "public function",
        _NEVER,
    ),
    AttachPoint(
        "sglang.srt.mem_cache.registry:register_radix_cache_backend",
        ("name", "factory"),
        "the prefix cache that knows about dropped tokens",
        _OFFICIAL,
        _NEVER,
    ),
    AttachPoint(
        "sglang.srt.mem_cache.registry:registered_radix_cache_backends",
        (),
        "installs once in a process",
        _OFFICIAL,
        _NEVER,
    ),
    AttachPoint(
        "sglang.srt.mem_cache.registry:create_unified_radix_cache",
        ("ctx", "cache_class"),
        "makes SGLang's own tree with our class and component",
        "public function",
        _NEVER,
    ),
    AttachPoint(
        "sglang.srt.mem_cache.kv_index_translator:KVIndexTranslator",
        ("req_to_token", "token_to_kv_pool_allocator", "token_to_kv_pool", "page_size", "device"),
        "each attention instance reads slots through one of its own",
        "made by SGLang's model runner",
        "an attention backend can be chosen for each group of layers",
    ),
    AttachPoint(
        "sglang.srt.mem_cache.kv_index_translator:KVIndexTranslator.bind_own_plan",
        ("forward_batch",),
        "binds a view of a batch to the kept pool",
        "made for batches that are not the scheduler's",
        "an attention backend can be chosen for each group of layers",
    ),
    *(
        AttachPoint(
            f"sglang.srt.layers.layer_boundary.residual.batch:{name}",
            parameters,
            why,
            "used by SGLang's own models",
            "layers take and return complete hidden states",
        )
        for name, parameters, why in [
            ("start", ("forward_batch",), "a batch without a model, for `Backend.select`"),
            (
                "fold",
                ("hidden_states", "forward_batch"),
                "completes the residual before tokens are dropped",
            ),
            (
                "set_written",
                ("hidden_states", "forward_batch"),
                "hands the kept tokens' hidden states on",
            ),
        ]
    ),
    AttachPoint(
        "sglang.srt.layers.attention.graph_utils:padded_extend_real_tokens",
        ("q", "forward_batch"),
        "takes rows beyond global_num_token_non_padded_cpu for padding, so that is kept right",
        "a field of the batch that SGLang's own padding sets",
        "layers are given the number of their tokens",
    ),
    *(
        AttachPoint(
            f"sglang.srt.models.{layer}.forward",
            LAYER_INPUTS,
            "layers from K on get the kept tokens, by these inputs",
            "forward hooks are official; the order of a layer's inputs is convention",
            "SGLang offers token dropping inside the decoder",
        )
        for layer in ("qwen2:Qwen2DecoderLayer", "llama:LlamaDecoderLayer")
    ),
)

_BATCH = "sglang.srt.model_executor.forward_batch_info"
_SCHEDULING = "sglang.srt.managers.schedule_batch"
_ALLOCATOR = "sglang.srt.mem_cache.allocator.swa:SWATokenToKVPoolAllocator"
_TREE = "sglang.srt.mem_cache.unified_cache"

READ = (
    Read(
        "sglang.srt.server_args:ServerArgs",
        (
            *("device", "json_model_override_args", "swa_full_tokens_ratio", "attention_backend"),
            *("prefill_attention_backend", "decode_attention_backend", "cuda_graph_config"),
            *("disable_prefill_cuda_graph", *FINE, *OFF),
        ),
        "arguments that are chosen, or refused",
    ),
    Read(
        "sglang.srt.configs.model_config:ModelConfig",
        (
            *("hf_config", "hf_text_config", "is_draft_model", "model_impl", "context_len"),
            *("is_hybrid_swa", "sliding_window_size"),
            *("full_attention_layer_ids", "swa_attention_layer_ids"),
        ),
        "the model, and its groups of layers",
    ),
    Read(
        "sglang.srt.model_executor.model_runner:ModelRunner",
        (
            *("model", "model_config", "server_args", "is_draft_worker", "dtype", "kv_cache_dtype"),
            *("token_to_kv_pool", "req_to_token_pool", "token_to_kv_pool_allocator"),
            *("kv_index_translator", "page_size", "device"),
        ),
        "what the attention instances are built for",
    ),
    Read(
        "sglang.srt.model_executor.model_runner_components.attention_backend_setup"
        ":AttentionBackends",
        ("attn_backend",),
        "the server's own attention backend",
    ),
    Read(
        "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
        (
            *("data_type", "kv_cache_dtype", "extend_dummy_seqs_capped_by_req_pool"),
            *("prefill_attention_backend_str", "decode_attention_backend_str"),
        ),
        "what both attention instances say alike",
    ),
    Read(
        "sglang.srt.layers.attention.base_attn_backend:SharedReadEnds",
        ("max_of",),
        "the later of two instances' last reads",
    ),
    Read(
        "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool",
        ("full_kv_pool", "swa_kv_pool", "full_to_swa_index_mapping", "size_swa", "start_layer"),
        "the two pools, and the mapping from one's slots to the other's",
    ),
    Read(
        "sglang.srt.mem_cache.memory_pool:ReqToTokenPool",
        ("req_to_token",),
        "the slots of each request's tokens",
    ),
    Read(
        "sglang.srt.layers.radix_attention:RadixAttention",
        ("layer_id", "sliding_window_size"),
        "which instance a layer attends by",
    ),
    Read(
        "sglang.srt.models.qwen2:Qwen2DecoderLayer",
        ("self_attn",),
        "the attention of a decoder layer",
    ),
    Read(
        "sglang.srt.models.qwen2:Qwen2Attention",
        ("attn", "qkv_proj", "q_size", "head_dim"),
        "queries before RoPE are the first columns of the projection",
    ),
    Read(
        f"{_BATCH}:ForwardBatch",
        (
            *("forward_mode", "req_pool_indices", "req_pool_indices_cpu", "out_cache_loc"),
            *("seq_lens", "seq_lens_cpu", "seq_lens_sum", "extend_num_tokens", "extend_start_loc"),
            *("extend_prefix_lens", "extend_prefix_lens_cpu"),
            *("extend_seq_lens", "extend_seq_lens_cpu", "global_num_token_non_padded_cpu"),
        ),
        "the tokens of a forward pass",
    ),
    Read(f"{_BATCH}:ForwardMode", ("EXTEND", "is_extend", "is_decode"), "the kind of a pass"),
    Read(f"{_SCHEDULING}:ScheduleBatch", ("reqs",), "the requests of a forward pass"),
    Read(
        f"{_SCHEDULING}:Req",
        (
            *("origin_input_ids", "multimodal_inputs", "sampling_params", "extra_key", "kv"),
            *("customized_info", "session", "beam_group", "return_hidden_states"),
            *("return_logprob", "logprob_start_len", "to_finish", "set_finish_with_abort"),
        ),
        "what a request asks for, where it is, how it is refused",
    ),
    Read(
        f"{_SCHEDULING}:ReqKvInfo",
        ("req_pool_idx", "holds_kv", "cache_protected_len", "kv_allocated_len"),
        "which slots are a request's own",
    ),
    Read(f"{_SCHEDULING}:MultimodalInputs", ("mm_items",), "the pictures of a request"),
    Read(
        f"{_SCHEDULING}:MultimodalDataItem",
        ("offsets", "is_image"),
        "where the pictures are in the prompt",
    ),
    Read(
        "sglang.srt.sampling.sampling_params:SamplingParams",
        ("custom_params", "n", "max_new_tokens", "min_new_tokens"),
        "what a request asks of pruning, and how long its answer may be",
    ),
    Read(
        "sglang.srt.managers.scheduler:Scheduler",
        (
            *("model_config", "chunked_prefill_size", "token_to_kv_pool_allocator"),
            *("metrics_collector", "metrics_collector_context"),
        ),
        "admission and counters",
    ),
    Read(
        "sglang.srt.observability.metrics_collector:SchedulerMetricsCollectorContext",
        ("current_scheduler_metrics_enabled",),
        "does this process keep counters?",
    ),
    Read(
        "sglang.srt.observability.metrics_collector:SchedulerMetricsCollector",
        ("labels",),
        "labels of the counters",
    ),
    Read(
        _ALLOCATOR,
        (
            *("size_full", "size_swa", "full_available_size", "swa_available_size"),
            *("full_to_swa_index_mapping", "swa_attn_allocator"),
        ),
        "free slots of both pools, and the mapping",
    ),
    Read(
        "sglang.srt.mem_cache.allocator.token:TokenToKVPoolAllocator",
        ("free",),
        "dropped slots go back to their pool",
    ),
    Read(
        "sglang.srt.mem_cache.prefill_budget:SWAPrefillBudget",
        ("allocator", "tree_cache", "total_offset"),
        "room for another prompt",
    ),
    Read(
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache",
        (
            *("tree_core", "req_to_token_pool", "token_to_kv_pool_allocator"),
            *("swa_evictable_size", "swa_protected_size"),
        ),
        "the prefix tree and its memory",
    ),
    Read(
        f"{_TREE}.unified_tree_core:UnifiedTreeCore",
        ("evictable_device_leaves", "eviction_strategy"),
        "which leaf is evicted next",
    ),
    Read(
        "sglang.srt.mem_cache.evict_policy:EvictionStrategy",
        ("get_priority",),
        "which leaf is evicted next",
    ),
    Read(
        f"{_TREE}.unified_tree_core:UnifiedTreeNode",
        ("id", "parent", "component_data"),
        "a node of the prefix tree",
    ),
    Read(
        f"{_TREE}.components.base:ComponentData",
        ("value", "metadata"),
        "kept slots of a node",
    ),
    Read(
        f"{_TREE}.components.swa:SWAComponent",
        ("cache", "tree_core", "component_type"),
        "the kept pool's side of the prefix tree",
    ),
    Read(f"{_TREE}.component_type:ComponentType", ("SWA",), "the kept pool's side of the tree"),
    Read(
        "sglang.srt.mem_cache.base_prefix_cache:MatchPrefixParams",
        ("key", "req"),
        "a request's look into the prefix cache",
    ),
    Read(
        "sglang.srt.mem_cache.base_prefix_cache:MatchResult",
        ("device_prefix_len",),
        "where a hit ends",
    ),
    Read(
        "sglang.srt.mem_cache.registry:TreeCacheBuildContext",
        ("params", "model_config"),
        "what the prefix cache is made of",
    ),
    Read(
        "sglang.srt.mem_cache.cache_init_params:CacheInitParams",
        ("component_registry_override", "sliding_window_size"),
        "our component in the prefix cache",
    ),
    Read(
        "sglang.srt.distributed.parallel_state:GroupCoordinator",
        ("world_size", "all_gather", "broadcast"),
        "one decision for all tensor-parallel ranks",
    ),
    Read(
        "sglang.srt.runtime_context:ParallelContext",
        ("attn_tp_group",),
        "the tensor-parallel ranks of the decoder",
    ),
    Read("sglang.srt.plugins.hook_registry:HookType", ("AROUND",), "how a function is wrapped"),
    Read(
        "sglang.srt.entrypoints.engine:Engine",
        ("loop", "tokenizer_manager", "async_generate", "shutdown"),
        "the offline engine, for sessions",
    ),
    Read(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager",
        ("abort_request", "get_internal_state", "get_loads"),
        "giving a request up, the scheduler's state, slots in use: for sessions",
    ),
    Read(
        "sglang.srt.managers.load_snapshot:LoadSnapshot",
        ("num_used_tokens",),
        "slots in use, for sessions",
    ),
)


# By the class of ours that extends one of SGLang's: what is new in it. Whatever else it defines
# redefines something of SGLang's, which must be there.
NEW: Mapping[str, frozenset[str]] = {
    "PrunedAttention": frozenset(
        {"slots", "drop", "begin_kept_layers", "pack_rows", "_decode_view", "_view", "_bind"}
    ),
    "PrunedBatch": frozenset({"pruning"}),
    "KeptBudget": frozenset({"_cut"}),
    "KeptComponent": frozenset({"_age"}),
    "KeptRadixCache": frozenset({"_free_dropped", "_describe"}),
}


def probe() -> list[PointStatus]:
    """Check everything in this file against the installed SGLang, which is not changed."""
    statuses = [check_point(point) for point in (*CALLED, *HOOKED.values())]
    statuses += map(check_read, READ)
    statuses.append(check_last_step())
    try:
        statuses += [check_redefined(*found) for found in redefined()]
    except Exception as error:  # a class that one of ours extends is gone
        statuses.append(PointStatus("the classes that are extended", "FAILED", str(error)))
    return statuses


def redefined() -> Iterator[tuple[type, str]]:
    """Each class of ours that extends one of SGLang's, with each name that it defines."""
    from ep_backends.sglang.attention import PrunedAttention
    from ep_backends.sglang.batch import PrunedBatch
    from ep_backends.sglang.kv import KeptBudget, KeptComponent, KeptRadixCache

    for ours in (PrunedAttention, PrunedBatch, KeptBudget, KeptComponent, KeptRadixCache):
        for name in vars(ours):
            if not name.startswith(("__", "_abc_")):
                yield ours, name


def check_redefined(ours: type, name: str) -> PointStatus:
    """Does SGLang's class have what ours redefines, and nothing by the name of what is new?"""
    (base,) = ours.__bases__
    target = f"{base.__module__}:{base.__name__}.{name}"
    member, host = vars(ours)[name], inspect.getattr_static(base, name, None)
    if name in NEW[ours.__name__]:
        if host is None:
            return PointStatus(target, "ok", f"new in {ours.__name__}; SGLang has nothing like it")
        return PointStatus(target, "FAILED", f"{ours.__name__} has another of the same name")
    why = (inspect.getdoc(member) or "").partition("\n")[0] if callable(member) else "a setting"
    if host is None and not hasattr(base, name):
        return PointStatus(target, "FAILED", f"not found; {ours.__name__} redefines it: {why}")
    if isinstance(member, FunctionType):
        own = [p for p in inspect.signature(member).parameters.values() if p.name != "self"]
        by_name = tuple(p.name for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if not callable(host):
            return PointStatus(target, "FAILED", "it is no callable any more")
        if missing := missing_parameters(host, by_name):
            return PointStatus(
                target, "FAILED", f"its signature no longer takes {', '.join(missing)}"
            )
    elif isinstance(member, property) != isinstance(host, property):
        return PointStatus(target, "FAILED", "it is no property any more")
    return PointStatus(target, "ok", why)


def check_read(read: Read) -> PointStatus:
    """Has a class these attributes, or give its methods them to its objects?"""
    module, _, name = read.owner.partition(":")
    target = f"{read.owner}.{{{', '.join(read.names)}}}"
    try:
        owner = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing a host can raise anything: a missing driver, say
        return PointStatus(target, "FAILED", f"not found: {error}")
    missing = {name for name in read.names if not hasattr(owner, name)}
    for each in inspect.getmro(owner)[:-1]:
        missing -= _given_to_objects(each) if missing else set()
    if missing:
        return PointStatus(target, "FAILED", f"it has no {', '.join(sorted(missing))} any more")
    return PointStatus(target, "ok", read.why)


def _given_to_objects(owner: type) -> set[str]:
    """Attributes that a class declares, or that its own methods set."""
    methods = [inspect.unwrap(m) for m in vars(owner).values() if inspect.isfunction(m)]
    return {
        *inspect.get_annotations(owner),
        *(
            str(step.argval)
            for method in methods
            for step in dis.get_instructions(method)
            if step.opname == "STORE_ATTR"
        ),
    }


def check_last_step() -> PointStatus:
    """Is the step at which arguments are refused SGLang's last one?"""
    target = "sglang.srt.arg_groups.pipeline:run_resolution_pipeline"
    last = list(STEPS)[-1]
    try:
        from sglang.srt.arg_groups.pipeline import run_resolution_pipeline

        steps = re.findall(r"run_hook\((\w+)", inspect.getsource(run_resolution_pipeline))
    except Exception as error:  # as above
        return PointStatus(target, "FAILED", f"not found: {error}")
    if steps[-1:] != [last]:
        behind = steps[steps.index(last) + 1 :] if last in steps else ["all of them"]
        return PointStatus(
            target, "FAILED", f"steps come behind {last}, where arguments are refused: {behind}"
        )
    return PointStatus(target, "ok", f"{last} is the last step; arguments are refused there")
