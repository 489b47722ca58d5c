"""Registered with SGLang in every process of a server, before anything else.

Nothing set means nothing is patched. `ENTROPYPRUNE` is what turns pruning on; the same policy in
`--json-model-override-args` is put there by the launcher, so that its workers find it.
"""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import msgspec

from ep_backends.budgets import KEY, server_settings
from ep_backends.shared.metrics import Metrics
from ep_backends.shared.refusals import StartRefused, refusing
from ep_core.errors import EntropyPruneError, PolicyError, UnsupportedError
from ep_core.patching import check_point
from ep_core.plugins import registry
from ep_core.policy import ENV, PruningPolicy
from ep_core.settings import Settings

_handed_over: str | None = None  # what this process put into ENTROPYPRUNE for its workers
# Text-only traffic may lose this share of its token capacity, so that pictures gain the rest.
TEXT_CAPACITY_LOSS = 0.1


def register() -> None:
    """Called when SGLang loads us; with nothing set, only the argument hooks are there."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    for step, hook in _STEPS.items():
        register_resolution_hook(step)(hook)
    if PruningPolicy.from_environment() is not None:
        install()


def install() -> None:
    """Check every attach point, then wrap those that need it, once in a process.

    Raises:
        UnsupportedError: a point is not as it was in the version that this was written for.
    """
    from sglang.srt.mem_cache.registry import (
        register_radix_cache_backend,
        registered_radix_cache_backends,
    )
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.version import __version__

    from ep_backends.sglang.kv import RADIX_CACHE, build_radix_cache
    from ep_backends.sglang.ledger import HOOKED, POINTS, TESTED

    if RADIX_CACHE in registered_radix_cache_backends():
        return
    failed = [status for status in map(check_point, POINTS) if status.state == "FAILED"]
    if failed:
        raise UnsupportedError(
            f"this SGLang ({__version__}, tested is {TESTED}) does not fit: {failed[0].target}: "
            f"{failed[0].detail}; run entropyprune doctor"
        )
    register_radix_cache_backend(RADIX_CACHE, build_radix_cache)
    for name, hook in _hooks().items():
        target = HOOKED[name].target.replace(":", ".")
        HookRegistry.register(target, hook, HookType.AROUND)


def _hooks() -> dict[str, Callable[..., Any]]:
    from ep_backends.sglang.kv import free_kept_slots, reserve_kept

    return {
        "derive_pools": derive_pools,
        "build_attention": build_attention,
        "free_kept": free_kept_slots,
        "reserve": reserve_kept,
        "admit": admit,
        "report_once": report_once,
    }


def verify() -> None:
    """Stop a process that runs a model while a hook of ours did not take: SGLang only logs that.

    Raises:
        StartRefused: naming the first one.
    """
    from ep_backends.sglang.ledger import HOOKED

    for name, hook in _hooks().items():
        if not _wraps(pkgutil.resolve_name(HOOKED[name].target), hook):
            raise StartRefused(f"the hook on {HOOKED[name].target} did not take; see SGLang's log")


def _wraps(function: Any, hook: Callable[..., Any]) -> bool:
    """Is `hook` among the wrappers that SGLang's registry put around a function?"""
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


# Resolution of the server's arguments, in the launcher.


def read_policy(server_args: Any, previous: Callable[[Any], None]) -> None:
    """First step: take the policy from wherever it was set; choose what it needs by default."""
    global _handed_over
    if _handed_over is not None and os.environ.get(ENV) == _handed_over:
        del os.environ[ENV]  # it was for an earlier engine of this process
    _handed_over = None
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    arguments = resolving_view(server_args)
    with refusing():
        policy = _policy(arguments.json_model_override_args)
    if policy is not None:
        from ep_backends.sglang.kv import RADIX_CACHE
        from ep_backends.sglang.ledger import ATTENTION

        with refusing():
            install()
        from sglang.srt.plugins.hook_registry import HookRegistry

        HookRegistry.apply_hooks()
        fields: dict[str, Any] = {"disable_prefill_cuda_graph": True}
        if arguments.radix_cache_backend is None:
            fields["radix_cache_backend"] = RADIX_CACHE
        backends = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
        if not any(getattr(arguments, name) for name in backends):
            on_cpu = arguments.device == "cpu"
            fields["attention_backend"] = ATTENTION[1] if on_cpu else ATTENTION[0]
        declare_resolution(server_args, KEY, **fields)
    previous(server_args)


def size_pools(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Before the cache's arguments are checked: how many kept tokens there is room for."""
    if os.environ.get(ENV):
        from sglang.srt.arg_groups.model_override_base import model_config_of
        from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

        with refusing():
            settings = settings_of(model_config_of(server_args))
        if resolving_view(server_args).swa_full_tokens_ratio is None:
            ratio = kept_ratio(settings.policy, settings.shape.layers)
            declare_resolution(server_args, KEY, swa_full_tokens_ratio=ratio)
    previous(server_args)


def refuse_arguments(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Last step: refuse what cannot work, whoever set it."""
    previous(server_args)
    if os.environ.get(ENV):
        from sglang.srt.arg_groups.overrides import resolving_view

        from ep_backends.sglang.ledger import check_arguments

        with refusing():
            check_arguments(resolving_view(server_args))


_STEPS = {
    "handle_missing_default_values": read_policy,
    "handle_cache_compatibility": size_pools,
    "validate_deepep_v2_dispatch_token_budget": refuse_arguments,  # whatever it checks: the last
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
    assert isinstance(policy.layer, int)
    share, k = 1 - TEXT_CAPACITY_LOSS, policy.layer
    ratio = share * k / (layers - share * (layers - k))
    kept = policy.budget.value
    return round(max(ratio, kept if isinstance(kept, float) else 0.0), 3)


def _policy(override: str) -> PruningPolicy | None:
    """The policy in the environment or in `--json-model-override-args`; then in both."""
    policy = PruningPolicy.from_environment()
    try:
        override_args = json.loads(override or "{}")
    except ValueError:  # SGLang itself says what is wrong with it
        return policy
    value = override_args.get(KEY) if isinstance(override_args, dict) else None
    if value is None:
        return policy
    read = PruningPolicy.parse if isinstance(value, str) else PruningPolicy.from_json
    asked = read(value)
    if policy is not None and policy != asked:
        raise PolicyError(
            f"{ENV} says {policy}, --json-model-override-args says {asked}; set one of them"
        )
    if policy is None:
        global _handed_over
        # the space tells it from the same policy set by the user later on
        os.environ[ENV] = _handed_over = f" {asked}"
    return asked


# Hooks, in the processes that run the model.


def settings_of(config: Any) -> Any:
    """What pruning needs to know of a server, from SGLang's `ModelConfig`; made once.

    Raises:
        EntropyPruneError: the model, the method or the budget does not work here.
    """
    from ep_backends.sglang.ledger import check_model
    from ep_backends.sglang.requests import check_budget

    if isinstance(settings := getattr(config, KEY, None), Settings):
        return settings
    policy = PruningPolicy.from_environment()
    assert policy is not None
    facts = config.hf_config.to_dict() | {"text_config": config.hf_text_config.to_dict()}
    check_model(config, registry().family(facts["model_type"]), facts)
    check_budget(policy)
    settings = server_settings(policy, facts)
    setattr(config, KEY, settings)
    return settings


def derive_pools(original: Callable[..., None], config: Any) -> None:
    """Around `ModelConfig._derive_hybrid_model`: layers from K on get their own KV pool."""
    original(config)
    if not os.environ.get(ENV) or config.is_draft_model:
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
    if not os.environ.get(ENV) or model_runner.is_draft_worker:
        return original(model_runner=model_runner)
    if model_runner.kv_cache_dtype != model_runner.dtype:
        raise StartRefused(
            f"the checkpoint asks for a KV cache in {model_runner.kv_cache_dtype}, which was never "
            "tested with pruning; give one that does not"
        )
    from sglang.srt.runtime_context import get_parallel

    from ep_backends.sglang.attention import PrunedAttention
    from ep_backends.sglang.ledger import check_decoder
    from ep_backends.sglang.prefill import Prefill, decoder_layers

    verify()
    settings = settings_of(config)
    if not config.is_hybrid_swa:
        raise StartRefused("the model has one KV pool: its configuration was made without pruning")
    check_decoder(decoder_layers(model_runner.model), settings.layer)
    built = []

    def build(runner: Any) -> Any:
        built.append(original(model_runner=runner))
        return built[-1].attn_backend

    attention = PrunedAttention(model_runner, settings.layer, build)
    attention.prefill_attention_backend_str = built[0].prefill_attention_backend_str
    attention.decode_attention_backend_str = built[0].decode_attention_backend_str
    Prefill(model_runner.model, attention, settings, get_parallel().attn_tp_group)
    return msgspec.structs.replace(built[0], attn_backend=attention)


def admit(
    original: Callable[..., None], scheduler: Any, req: Any, is_retracted: bool = False
) -> None:
    """Around `Scheduler._add_request_to_queue`: plan a request before it looks for a prefix."""
    if not is_retracted and req.to_finish is None:
        try:
            _plan(scheduler, req)
        except EntropyPruneError as error:
            setattr(req, KEY, None)
            req.set_finish_with_abort(str(error))
    original(scheduler, req, is_retracted)


def _plan(scheduler: Any, req: Any) -> None:
    from ep_backends.sglang.requests import fit, plan_of, plan_request

    inputs, plan = req.multimodal_inputs, plan_of(req)
    planned = plan is None and inputs is not None
    if planned:
        plan = plan_request(req, inputs, settings_of(scheduler.model_config))
        setattr(req, KEY, plan)
        setattr(inputs, KEY, plan)
        if plan.namespace:
            req.extra_key = f"{req.extra_key or ''}|{KEY}:{plan.namespace}"
        # a list, because that is what SGLang's request-level values are
        req.customized_info = (req.customized_info or {}) | {KEY: [plan.info]}
    chunked = scheduler.chunked_prefill_size is not None and scheduler.chunked_prefill_size > 0
    fit(req, plan, slots=scheduler.token_to_kv_pool_allocator.size_swa, chunked=chunked)
    metrics = _metrics_of(scheduler)
    if planned and plan is not None and metrics is not None:
        metrics.count(plan.info["visual_tokens"], plan.info["kept"], plan.reason)


def _metrics_of(scheduler: Any) -> Metrics | None:
    """The scheduler's counters, or None where SGLang keeps none; made when first asked for."""
    if not scheduler.metrics_collector_context.current_scheduler_metrics_enabled:
        return None
    found: Metrics | None = getattr(scheduler, "_entropyprune_metrics", None)
    if found is None:  # SGLang has told prometheus_client where to by now
        found = Metrics(scheduler.metrics_collector.labels)
        scheduler._entropyprune_metrics = found
    return found


def report_once(original: Callable[..., bool], streamer: Any, key: str) -> bool:
    """Around the streamer's question whether a key has one value for a request."""
    return key == KEY or original(streamer, key)
