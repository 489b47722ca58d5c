"""Where this backend reaches into LMDeploy, and what it cannot work with.

LMDeploy's own doors come first: a map of model classes that its workers read, the methods and input
processors that such a class may have, per-sequence values that it carries from pass to pass. The
points below are the few functions that are wrapped, the methods that our classes override, and
what is read. Attributes that LMDeploy sets in a constructor have no point: where they are read,
what they hold is checked.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Iterable
from functools import cache
from typing import Any

from ep_backends.lmdeploy.families import FAMILIES
from ep_core.errors import UnsupportedError
from ep_core.patching import AttachPoint, check_point, missing_parameters
from ep_core.settings import Settings

TESTED = "0.18.0"

# of a decoder layer's forward pass
LAYER_ARGUMENTS = ("hidden_states", "rotary_pos_emb", "past_key_value", "residual", "attn_metadata")

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
    "preprocess": AttachPoint(
        f"{_ASYNC}.preprocess",
        ("messages", "session_id", "gen_config"),
        "decides what each picture keeps, or refuses the request with a message",
        _NO_PLUGINS,
        "an input processor sees a request's sampling parameters and can refuse it",
    ),
    "build_engine": AttachPoint(
        "lmdeploy.pytorch.engine.engine:Engine.__init__",
        ("model_path", "engine_config"),
        "a request takes the blocks that its kept tokens need",
        "blocks are counted by the length of the sequence, for all layers alike",
        "a cache layout can say how many tokens a block holds in each group of layers",
    ),
    "group_layers": AttachPoint(
        "lmdeploy.pytorch.engine.model_agent.agent:build_block_cache_plan",
        ("model_config", "cache_config", "world_size", "request_collector"),
        "layers below K get more pages for a block than the others",
        "CacheBackend.build_block_layout chooses a layout by the device, not by the model",
        "a model can choose its block-cache layout",
    ),
}

_PUBLIC = "a public function or property"
_FIELDS = "a public dataclass, by these fields"
_SEQUENCE = "lmdeploy.pytorch.messages:SchedulerSequence"
_BLOCKS = "lmdeploy.pytorch.paging.block_manager"
_LAYOUT = "lmdeploy.pytorch.engine.cache_engine.layout"
_RANKS = "lmdeploy.pytorch.distributed"


def _used(
    target: str, parameters: str, why: str, upstream: str = _PUBLIC, remove_when: str = "never"
) -> AttachPoint:
    return AttachPoint(target, tuple(parameters.split()), why, upstream, remove_when)


# called, read or made as they are
USED = (
    *(
        _used(
            f"lmdeploy.pytorch.models.{target}.forward",
            " ".join(LAYER_ARGUMENTS),
            "forward hooks on the decoder's layers drop the tokens",
            "torch's own hooks; the parameters are LMDeploy's convention",
            "a decoder calls a method between two layers",
        )
        for target in sorted({each for family in FAMILIES.values() for each in family.decoders})
    ),
    _used(
        "lmdeploy.pytorch.models.patch:update_custom_module_map",
        "module_map_path",
        "workers read our classes from ModelConfig.custom_module_map",
        "official",
    ),
    _used("lmdeploy.pytorch.nn.linear.utils:QKVMixin.split_qkv", "x", "the queries before RoPE"),
    _used(f"{_RANKS}:get_tp_world_rank", "layer_type", "how many ranks decide together"),
    _used(f"{_RANKS}:get_tp_group", "device layer_type", "which ranks they are"),
    _used(f"{_RANKS}:all_gather", "tensor_list tensor group", "heads of other ranks"),
    _used(f"{_RANKS}:broadcast", "tensor src group", "one choice for all ranks"),
    _used(
        "lmdeploy.pytorch.config:override_hf_config",
        "hf_config hf_overrides",
        "the configuration that the engine will have",
    ),
    _used(
        "lmdeploy.pytorch.config:ModelConfig.from_hf_config",
        "hf_config model_path",
        "what LMDeploy will make of it",
    ),
    _used("lmdeploy.pytorch.engine.engine:Engine.model_config", "", "carries the policy"),
    _used(
        f"{_BLOCKS}:DefaultBlockManager.num_required_blocks",
        "obj prealloc_size",
        "replaced on a pruned engine's own: sequences take blocks by what they hold",
    ),
    _used(f"{_SEQUENCE}.num_all_ids", "", "the tokens that need blocks"),
    _used(f"{_SEQUENCE}.block_size", "", "the tokens of a block"),
    _used(
        _SEQUENCE,
        "history_multimodals kv_token_limit logical_blocks",
        "which blocks a sequence has and needs",
        _FIELDS,
    ),
    _used(
        "lmdeploy.serve.managers:SessionManager.remove",
        "session",
        "a refused request leaves nothing behind",
    ),
    _used(
        "lmdeploy.serve.core.async_engine:PreprocessedRequest",
        "session inputs input_token_len gen_config",
        "the prompt that is planned",
        _FIELDS,
    ),
    _used(
        "lmdeploy.messages:GenerationConfig",
        "logprob_start_len return_ppl",
        "what a request needs of every token of its prompt",
        _FIELDS,
    ),
    _used(
        "lmdeploy.pytorch.multimodal.data_type:MultiModalData",
        "start end meta",
        "where a picture is in its prompt; carries the plan",
        _FIELDS,
    ),
    _used(
        "lmdeploy.pytorch.model_inputs:StepContext",
        "input_ids q_seqlens kv_seqlens sum_kv_seqlen is_decoding model_metas input_multimodals "
        "attn_metadata cache_config",
        "what a forward pass computes",
        _FIELDS,
    ),
    _used(
        "lmdeploy.pytorch.models.utils.cudagraph:CudaGraphMeta",
        "input_buffers",
        "static buffers of decode",
        _FIELDS,
    ),
    _used(
        "lmdeploy.pytorch.engine.cache_engine.plan:BlockCachePlan",
        "layout",
        "the layout of the cache is replaced",
        _FIELDS,
    ),
    _used(
        f"{_LAYOUT}:PackedBlockCacheLayout",
        "tensor_specs num_layers",
        "each group of layers has its cache in LMDeploy's own layout",
        _FIELDS,
    ),
    _used(f"{_LAYOUT}:CachePool", "tensor entry_axis", "the memory of a group", _FIELDS),
    _used(f"{_LAYOUT}:CacheAllocation", "pools tensor_views", "the cache as a whole", _FIELDS),
)

# importing it starts CUDA, which is the workers' to do
IN_WORKERS = (
    _used(
        "lmdeploy.pytorch.backends.cuda.attention.default:TritonAttentionMetadata",
        "block_offsets q_start_loc q_seqlens kv_start_loc kv_seqlens kv_flatten_size cu_seqlens_q "
        "cu_seqlens_k max_q_seqlen max_kv_seqlen",
        "layers >= K attend with the lengths of the kept tokens",
        _FIELDS,
        "attention metadata can be made for a group of layers",
    ),
)

# of sessions of ours (`entropyprune run`, the conformance suite), never of a server
IN_SESSIONS = (
    _used(
        "lmdeploy.pytorch.strategies.ar.sequence:ARSequenceStrategy.update_running",
        "running",
        "replaced on a session's own engine: what it knows of a sequence after a pass",
        "LMDeploy's outputs do not tell it",
        "they do",
    ),
    _used(
        _SEQUENCE,
        "model_meta engine_events logical_blocks",
        "kept tokens, preemptions and blocks of a sequence",
        _FIELDS,
    ),
    _used(f"{_SEQUENCE}.session_id", "", "whose sequence it is"),
    _used(f"{_BLOCKS}:BaseBlockManager.get_num_free_gpu_blocks", "", "blocks in use"),
    _used(f"{_ASYNC}.generate", "request", "the answer"),
    _used(
        "lmdeploy.vl.model.base:VisionModel.to_pytorch_with_input_ids",
        "messages",
        "a prompt that comes as token ids",
    ),
)


# our classes that stand in for LMDeploy's, and the classes whose methods they override
OVERRIDDEN = {
    "ep_backends.lmdeploy.models:PrunedModel": (
        "lmdeploy.pytorch.models.utils.model:DeployModelMixin",
        "lmdeploy.pytorch.models.utils.cudagraph:CudaGraphMixin",
    ),
    "ep_backends.lmdeploy.models:InputProcessor": (
        "lmdeploy.pytorch.engine.input_process:BaseModelInputProcessor",
    ),
    "ep_backends.lmdeploy.kv:GroupedLayout": (f"{_LAYOUT}:PackedBlockCacheLayout",),
}


def overrides() -> tuple[AttachPoint, ...]:
    """A point for each method of these classes of ours, read off the classes."""
    classes = tuple(
        _used(base, "", "a class of ours stands in for it")
        for bases in OVERRIDDEN.values()
        for base in bases
    )
    if any(check_point(point).state == "FAILED" for point in classes):
        return classes  # ours cannot even be imported
    points = []
    for target, bases in OVERRIDDEN.items():
        for name, ours in vars(pkgutil.resolve_name(target)).items():
            if not inspect.isfunction(ours) or name.startswith("_"):
                continue
            # a method that overrides nothing any more is looked for in vain
            owners = (base for base in bases if name in vars(pkgutil.resolve_name(base)))
            parameters = list(inspect.signature(ours).parameters.values())[1:]
            named = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
            points.append(
                _used(
                    f"{next(owners, bases[0])}.{name}",
                    " ".join(named),
                    (inspect.getdoc(ours) or "").partition("\n")[0],
                    "official: what a class in LMDeploy's place may have",
                )
            )
    return (*classes, *points)


def at_start() -> tuple[AttachPoint, ...]:
    """The points that are checked before pruning is switched on in a process."""
    return (*HOOKED.values(), *USED, *overrides())


def points() -> tuple[AttachPoint, ...]:
    """All of them."""
    return (*at_start(), *IN_WORKERS, *IN_SESSIONS)


@cache
def warn_untested() -> None:
    """Say once a process that this version of LMDeploy was not tested."""
    from lmdeploy.version import __version__

    if __version__ != TESTED:
        logging.getLogger("entropyprune").warning(
            "LMDeploy %s was not tested with pruning, %s was; every place where it is touched "
            "looks as it should",
            __version__,
            TESTED,
        )


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
    "enable_return_routed_experts": (
        (False,),
        "experts are reported for each token, and dropped ones have none in layers >= K; leave out "
        "--enable-return-routed-experts",
    ),
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


def check_model(config: Any, settings: Settings) -> None:
    """Refuse a model that cannot be pruned in LMDeploy.

    Args:
        config: LMDeploy's `ModelConfig`.
        settings: what to prune.

    Raises:
        UnsupportedError: and which models work.
    """
    from lmdeploy.pytorch.models.module_map import MODULE_MAP

    family, facts = settings.family, settings.config
    architectures: list[str] = facts.get("architectures") or ["a class without a name"]
    # as LMDeploy looks for the class
    mapped: str = (facts.get("auto_map") or {}).get("AutoModelForCausalLM", architectures[0])
    architecture = mapped.rpartition(".")[-1]
    tested = FAMILIES.get(family.model_type)
    if architecture not in MODULE_MAP or (tested and architecture != tested.architecture):
        known = ", ".join(each.architecture for each in FAMILIES.values())
        raise UnsupportedError(
            f"{family.name} as {architecture} is not supported in LMDeploy; tested are {known}"
        )
    if config.sliding_window > 0:
        raise UnsupportedError(
            f"the model attends in a sliding window of {config.sliding_window} tokens, which "
            "pruning would shift; use a model without one"
        )
    if settings.decoder.query_norm and "queries" in settings.selector.needs:
        raise UnsupportedError(
            f"method {settings.policy.method!r} reads queries, and the decoder normalises its "
            "queries after the projection, where LMDeploy has no hook for them yet; use "
            "method=set-entropy, or a model whose decoder is Qwen2 or Llama"
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


def check_decoder(model: Any, theirs: Any, layers: Any, settings: Settings) -> None:
    """Refuse a decoder whose layers cannot be hooked as they are.

    Args:
        model: LMDeploy's model, built.
        theirs: the same as LMDeploy's own class has it, without our mixin.
        layers: its decoder's.
        settings: what to prune.

    Raises:
        UnsupportedError: naming what does not fit.
    """
    check_points(IN_WORKERS)
    from lmdeploy.pytorch.backends.cuda.attention.default import TritonAttentionImpl
    from lmdeploy.pytorch.models.utils.cudagraph import CudaGraphMixin, PiecewiseCudaGraphMixin
    from lmdeploy.pytorch.models.utils.model import DeployModelMixin

    name = type(model).__mro__[2].__name__  # behind the mixin
    if not all(isinstance(model, base) for base in (DeployModelMixin, CudaGraphMixin)):
        raise UnsupportedError(f"{name} has not the methods that pruning overrides")
    if theirs.update_model_metas.__func__ is not DeployModelMixin.update_model_metas:
        raise UnsupportedError(
            f"{name} keeps values of its own for each sequence (update_model_metas), which were "
            "never tested together with pruning"
        )
    if len(layers) != settings.shape.layers:
        raise UnsupportedError(
            f"the decoder has {len(layers)} layers, its configuration says {settings.shape.layers}"
        )
    for kind in {type(layer) for layer in layers}:
        if missing := missing_parameters(kind.forward, LAYER_ARGUMENTS):
            raise UnsupportedError(
                f"{kind.__name__} takes no {missing[0]}: its tokens cannot be cut"
            )
    for layer in layers:
        attention = getattr(getattr(layer, "self_attn", None), "attn_fwd", None)
        if attention is None:
            raise UnsupportedError(
                f"{type(layer).__name__} has no attention through the KV cache (self_attn.attn_fwd)"
            )
        impl = attention.impl
        if isinstance(impl, TritonAttentionImpl) and type(impl) is not TritonAttentionImpl:
            raise UnsupportedError(f"attention by {type(impl).__name__} was never tested")
    projection = getattr(layers[settings.layer - 1].self_attn, "qkv_proj", None)
    if "queries" in settings.selector.needs and not hasattr(projection, "split_qkv"):
        raise UnsupportedError(
            f"{type(layers[0]).__name__} has no self_attn.qkv_proj to read queries from; use "
            "method=set-entropy"
        )
    if isinstance(model, PiecewiseCudaGraphMixin):
        raise UnsupportedError("piecewise CUDA graphs of prefill fix how many tokens a layer gets")
