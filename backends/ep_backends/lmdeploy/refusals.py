"""What cannot run with pruning in LMDeploy: arguments of the engine, models, decoders."""

from __future__ import annotations

import importlib
from typing import Any

from ep_backends.lmdeploy.families import FAMILIES
from ep_backends.lmdeploy.ledger import LAYER_ARGUMENTS, LEDGER
from ep_core.errors import UnsupportedError
from ep_core.patching import missing_parameters
from ep_core.settings import Settings

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
    LEDGER.require(LEDGER.check("in_workers"))
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
