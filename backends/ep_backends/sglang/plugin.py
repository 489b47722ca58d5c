"""Registered with SGLang in every process of a server, before anything else.

With no policy set, hooks around steps of SGLang's argument resolution look for one and change
nothing. With one, the launcher hands it to the processes that it starts; there `install` puts hooks
around the functions that `ledger.toml` says are wrapped, by SGLang's own registry.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

import msgspec

from ep_backends.sglang.arguments import RADIX_CACHE, STEPS, Orders, check_arguments, orders
from ep_backends.sglang.requests import check_budget
from ep_backends.shared.refusals import StartRefused, refusing
from ep_backends.shared.requests import server_settings
from ep_core.settings import Settings

_ATTRIBUTE = "_entropyprune_settings"


def register() -> None:
    """Called when SGLang loads us."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    for step, hook in STEPS.items():
        register_resolution_hook(step)(hook)
    if Orders.read() is not None:
        install()


def install() -> None:
    """Check every place where we reach into SGLang, then put the hooks on, once in a process.

    Raises:
        UnsupportedError: a place is not as it was in the version that this was written for.
    """
    from sglang.srt.mem_cache.registry import (
        register_radix_cache_backend,
        registered_radix_cache_backends,
    )
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from ep_backends.sglang.ledger import LEDGER, probe

    if RADIX_CACHE in registered_radix_cache_backends():
        return
    LEDGER.require(probe())
    LEDGER.warn_if_untested()
    from ep_backends.sglang.kv import build_radix_cache

    register_radix_cache_backend(RADIX_CACHE, build_radix_cache)
    for target, hook in LEDGER.wrappers():
        HookRegistry.register(target.replace(":", "."), hook, HookType.AROUND)


def verify() -> None:
    """Stop a process that runs a model while a hook of ours did not take: SGLang only logs that.

    Raises:
        StartRefused: naming the first one.
    """
    from ep_backends.sglang.ledger import LEDGER

    for target, hook in LEDGER.wrappers():
        if not _wraps(pkgutil.resolve_name(target), hook):
            raise StartRefused(f"the hook on {target} did not take; see SGLang's log")


def _wraps(function: Any, hook: Callable[..., Any]) -> bool:
    """Is `hook` among the wrappers that SGLang's registry put around a function?"""
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


# Hooks where a model is loaded.


def settings_of(config: Any) -> Settings:
    """What pruning needs to know of a model; settled once for SGLang's `ModelConfig`.

    Raises:
        EntropyPruneError: the model, the method or the budget does not work here.
    """
    from ep_backends.sglang.families import check_checkpoint, check_model

    found: Settings | None = getattr(config, _ATTRIBUTE, None)
    if found is None:
        facts = config.hf_config.to_dict() | {"text_config": config.hf_text_config.to_dict()}
        check_checkpoint(facts)
        policy = orders().policy
        check_budget(policy)
        found = server_settings(policy, facts)
        check_model(config, found)
        setattr(config, _ATTRIBUTE, found)
    return found


def derive_pools(original: Callable[..., None], config: Any) -> None:
    """Around `ModelConfig._derive_hybrid_model`: layers from K on get their own KV pool."""
    original(config)
    if Orders.read() is None or config.is_draft_model:
        return
    with refusing():
        settings = settings_of(config)
    config.is_hybrid_swa = True
    config.sliding_window_size = None
    config.full_attention_layer_ids = list(range(settings.layer))
    config.swa_attention_layer_ids = list(range(settings.layer, settings.shape.layers))


def build_attention(original: Callable[..., Any], *, model_runner: Any) -> Any:
    """Around `build_attention_backends`: two instances, and the hooks on the decoder."""
    config = model_runner.model_config
    if Orders.read() is None or model_runner.is_draft_worker:
        return original(model_runner=model_runner)
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.runtime_context import get_parallel

    from ep_backends.sglang.attention import PrunedAttention
    from ep_backends.sglang.families import check_decoder
    from ep_backends.sglang.prefill import LayerHooks, decoder_layers

    verify()
    with refusing():
        # the launcher has done so, but a step of SGLang's could have come after ours
        check_arguments(resolving_view(model_runner.server_args))
    if model_runner.kv_cache_dtype != model_runner.dtype:
        raise StartRefused(
            f"the checkpoint asks for a KV cache in {model_runner.kv_cache_dtype}, which was never "
            "tested with pruning; give one that does not"
        )
    if not config.is_hybrid_swa:
        raise StartRefused("the model has one KV pool: its configuration was made without pruning")
    with refusing():
        settings = settings_of(config)
        layers = decoder_layers(model_runner.model)
        check_decoder(layers, settings.layer)
    built = []

    def build(runner: Any) -> Any:
        built.append(original(model_runner=runner))
        return built[-1].attn_backend

    attention = PrunedAttention(model_runner, settings.layer, build)
    group, read = get_parallel().attn_tp_group, layers[settings.layer - 1].self_attn
    heads = read.q_size // read.head_dim, read.head_dim
    ranks = group if group.world_size > 1 else None
    LayerHooks(attention, settings.selector, settings.layer, heads, ranks).attach(layers)
    return msgspec.structs.replace(built[0], attn_backend=attention)
