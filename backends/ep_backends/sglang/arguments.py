"""The server's arguments, in the launcher: where the policy is found, what follows, what cannot be.

SGLang resolves its arguments in named steps, and lets plugins put hooks around them. The first one
reads the policy and hands it to the processes that the launcher starts; the last one refuses what
pruning cannot work with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ep_backends.shared.capacity import TEXT_CAPACITY_LOSS
from ep_backends.shared.refusals import refusing
from ep_backends.shared.requests import FIELD
from ep_core.errors import PolicyError, UnsupportedError
from ep_core.policy import ENV, PruningPolicy

RADIX_CACHE = "entropyprune"  # name under which our prefix cache is registered with SGLang
CUDA_ATTENTION, CPU_ATTENTION = "triton", "torch_native"  # chosen where none was
PROVEN_ATTENTION = (CUDA_ATTENTION, CPU_ATTENTION)

# argument -> (values that are fine, why others are not)
FINE: Mapping[str, tuple[tuple[object, ...], str]] = {
    "pp_size": ((1,), "the layers from K on must be on the same device as layer K"),
    "attn_dp_size": ((1,), "idle ranks of attention data parallelism were never tested"),
    "dcp_size": ((1,), "slots would be spread over ranks"),
    "attn_cp_size": ((1,), "a picture would be spread over ranks"),
    "page_size": ((1,), "dropped tokens free single slots"),
    "kv_cache_dtype": (("auto",), "quantised KV was never tested with pruning"),
    "disaggregation_mode": (("null",), "KV transfer moves one slot for each token and layer"),
    "radix_cache_backend": ((None, RADIX_CACHE), "pruning brings the prefix cache it needs"),
    "nnodes": ((1,), "each node would read its own policy"),
    "kv_canary": (("none",), "it expects a slot in each pool for every token"),
    "model_impl": (("auto", "sglang"), "the hooks fit SGLang's own models"),
}
OFF: Mapping[str, str] = {
    "speculative_algorithm": "draft models would see another context than the target",
    "enable_two_batch_overlap": "half batches attend through backends that know one KV pool",
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
    "enable_pdmux": "its decode batches attend through backends that know one KV pool",
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

# environment variable -> why it must not be set
UNSET: Mapping[str, str] = {
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH": "preparing a decode pass reads lengths on the host",
    "SGLANG_RUST_SERVER": "it was never tested with pruning",
}


@dataclass(frozen=True)
class Orders:
    """What a launcher tells the processes that it starts.

    Attributes:
        policy: what to prune.
        details: may requests ask which tokens were kept? Answering makes the scheduler wait for
            the device, so sessions of ours may, and a server's clients may not.
    """

    policy: PruningPolicy
    details: bool = False

    _ENV = "ENTROPYPRUNE_WORKERS"

    @classmethod
    def read(cls) -> Orders | None:
        """What this process was told, or tells; None for nothing."""
        if (text := os.environ.get(cls._ENV)) is None:
            return None
        fields = json.loads(text)
        return cls(PruningPolicy.from_json(fields["policy"]), fields["details"])

    @classmethod
    def give(cls, orders: Orders | None) -> None:
        """Tell the processes that are started from now on."""
        os.environ.pop(cls._ENV, None)
        if orders is not None:
            fields = {"policy": orders.policy.to_json(), "details": orders.details}
            os.environ[cls._ENV] = json.dumps(fields)


def orders() -> Orders:
    """The orders of a process that has some.

    Raises:
        UnsupportedError: it has none.
    """
    if (found := Orders.read()) is None:
        raise UnsupportedError("this process was not told what to prune; please report it")
    return found


def asked_for(override: str) -> Orders | None:
    """What the environment or `--json-model-override-args` asks for; None for nothing.

    Args:
        override: the argument; its key `entropyprune` is a policy, as text or as an object, which
            may have `details` beside it.

    Raises:
        PolicyError: it cannot be read, or the two places differ.
    """
    policy = PruningPolicy.from_environment()
    unasked = None if policy is None else Orders(policy)
    try:
        arguments = json.loads(override or "{}")
    except ValueError:  # SGLang itself says what is wrong with it
        return unasked
    value = arguments.get(FIELD) if isinstance(arguments, dict) else None
    if value is None:
        return unasked
    details = False
    if isinstance(value, dict):
        details = value.pop("details", False)
        if not isinstance(details, bool):
            raise PolicyError(f"details={details!r} is not allowed; use true or false")
    asked = PruningPolicy.parse(value) if isinstance(value, str) else PruningPolicy.from_json(value)
    if policy is not None and policy != asked:
        raise PolicyError(
            f"{ENV} says {policy}, --json-model-override-args says {asked}; set one of them"
        )
    return Orders(asked, details)


def read_policy(server_args: Any, previous: Callable[[Any], None]) -> None:
    """First step: take the policy from wherever it was set; choose what it needs by default."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    arguments = resolving_view(server_args)
    with refusing():
        asked = asked_for(arguments.json_model_override_args)
    Orders.give(asked)
    if asked is not None:
        from sglang.srt.plugins.hook_registry import HookRegistry

        from ep_backends.sglang.plugin import install

        with refusing():
            install()
        HookRegistry.apply_hooks()
        declare_resolution(server_args, FIELD, **_defaults(arguments))
    previous(server_args)


def _defaults(arguments: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"disable_prefill_cuda_graph": True}
    if arguments.radix_cache_backend is None:
        fields["radix_cache_backend"] = RADIX_CACHE
    if not _attention_backends(arguments):
        on_cpu = arguments.device == "cpu"
        fields["attention_backend"] = CPU_ATTENTION if on_cpu else CUDA_ATTENTION
    return fields


def size_pools(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Before the cache's arguments are checked: how many kept tokens there is room for."""
    if Orders.read() is not None:
        from sglang.srt.arg_groups.model_override_base import model_config_of
        from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

        from ep_backends.sglang.plugin import settings_of

        with refusing():
            settings = settings_of(model_config_of(server_args))
        if resolving_view(server_args).swa_full_tokens_ratio is None:
            ratio = kept_ratio(settings.policy, settings.shape.layers)
            declare_resolution(server_args, FIELD, swa_full_tokens_ratio=ratio)
    previous(server_args)


def refuse_arguments(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Last step: refuse what cannot work, whatever set it."""
    previous(server_args)
    if Orders.read() is not None:
        from sglang.srt.arg_groups.overrides import resolving_view

        with refusing():
            check_arguments(resolving_view(server_args))


# in the order of SGLang's steps; the last of them has no name of its own, so the ledger watches
# that none comes behind it
STEPS: Mapping[str, Callable[[Any, Callable[[Any], None]], None]] = {
    "handle_missing_default_values": read_policy,
    "handle_cache_compatibility": size_pools,
    "validate_deepep_v2_dispatch_token_budget": refuse_arguments,
}


def kept_ratio(policy: PruningPolicy, layers: int) -> float:
    """Slots in the kept pool for each slot in the pool of the layers below K.

    With r kept slots for each of the others, a byte budget holds `r L / (K + r (L - K))` of the
    text tokens that it would hold unpruned. r is chosen so that this is `1 - TEXT_CAPACITY_LOSS`:
    the rest of the memory goes where pictures need it. A fraction that is kept anyway is a lower
    bound: with less, slots below K could never fill.

    Args:
        policy: its layer settled.
        layers: L.
    """
    share, k = float(1 - TEXT_CAPACITY_LOSS), int(policy.layer)
    ratio = share * k / (layers - share * (layers - k))
    kept = policy.budget.value
    return round(max(ratio, kept if isinstance(kept, float) else 0.0), 3)


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
    for name, reason in UNSET.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y"):
            raise _refusal(name, reason)
    chosen = _attention_backends(arguments)
    if unproven := chosen - set(PROVEN_ATTENTION):
        raise UnsupportedError(
            f"attention backend {sorted(unproven)[0]!r} is not proven with pruning; use "
            f"--attention-backend with one of {', '.join(PROVEN_ATTENTION)}"
        )
    if len(chosen) > 1:
        raise UnsupportedError(
            "different attention backends for prefill and decode are not proven with pruning; use "
            f"--attention-backend {CUDA_ATTENTION} for both"
        )


def _attention_backends(arguments: Any) -> set[str]:
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    return {getattr(arguments, name) for name in names} - {None}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refusal(flag: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{flag} does not work with pruning: {reason}; leave it out, or unset ENTROPYPRUNE"
    )
