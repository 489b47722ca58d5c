"""What SGLang loads: `activate` runs in every process of a server, before anything else.

Nothing set means nothing is patched. `ENTROPYPRUNE` is what turns pruning on; the same policy in
`--json-model-override-args` is put there by the launcher, so that its workers find it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from ep_core.errors import EntropyPruneError, PolicyError, UnsupportedError
from ep_core.patching import check_point
from ep_core.plugins import registry
from ep_core.policy import ENV, PruningPolicy

_FROM_JSON = "ENTROPYPRUNE_FROM_JSON"  # set where ENTROPYPRUNE came from --json-model-override-args
_KEY = "entropyprune"
# Text-only traffic may lose this share of its token capacity, so that pictures gain the rest.
TEXT_CAPACITY_LOSS = 0.1


class StartRefused(UnsupportedError, SystemExit):
    """Pruning cannot work with what was asked.

    An error for programs, and one line instead of a traceback where a command line meets it.
    """

    def __init__(self, message: str) -> None:
        SystemExit.__init__(self, f"entropyprune: error: {message}")

    def __str__(self) -> str:
        return str(self.code)


def activate() -> None:
    """SGLang's plugin entry point (group `sglang.srt.plugins`).

    SGLang logs what a plugin raises and goes on, except `SystemExit`.
    """
    try:
        policy = PruningPolicy.from_environment()
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

        for step, hook in _STEPS.items():
            register_resolution_hook(step)(hook)
        if policy is not None:
            install()
    except Exception as error:
        if os.environ.get(ENV):
            raise SystemExit(f"entropyprune: error: {error}") from error
        raise


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

    from ep_backends.sglang.kv import RADIX_CACHE, build_radix_cache, free_kept_slots
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
    hooks: dict[str, Callable[..., Any]] = {
        "derive_pools": derive_pools,
        "build_attention": build_attention,
        "free_kept": free_kept_slots,
        "admit": admit,
        "report_once": report_once,
    }
    for name, point in HOOKED.items():
        HookRegistry.register(_dotted(point.target), hooks[name], HookType.AROUND)


def verify() -> None:
    """Stop a server whose hooks did not all take: SGLang only logs that.

    Raises:
        StartRefused: naming the first one.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    from ep_backends.sglang.ledger import HOOKED

    for point in HOOKED.values():
        if _dotted(point.target) not in HookRegistry._patched:
            raise StartRefused(f"the hook on {point.target} did not take; see SGLang's log")


def _dotted(target: str) -> str:
    return target.replace(":", ".")


# Resolution of the server's arguments, in the launcher.


def read_policy(server_args: Any, previous: Callable[[Any], None]) -> None:
    """First step: take the policy from wherever it was set; choose what it needs by default."""
    if os.environ.pop(_FROM_JSON, None):  # an earlier engine of this process
        os.environ.pop(ENV, None)
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    arguments = resolving_view(server_args)
    policy = _policy(arguments.json_model_override_args)
    if policy is not None:
        from ep_backends.sglang.kv import RADIX_CACHE
        from ep_backends.sglang.ledger import ATTENTION

        try:
            install()
        except UnsupportedError as error:
            _refuse(error)
        from sglang.srt.plugins.hook_registry import HookRegistry

        HookRegistry.apply_hooks()
        fields: dict[str, Any] = {"disable_prefill_cuda_graph": True}
        if arguments.radix_cache_backend is None:
            fields["radix_cache_backend"] = RADIX_CACHE
        backends = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
        if not any(getattr(arguments, name) for name in backends):
            on_cpu = arguments.device == "cpu"
            fields["attention_backend"] = ATTENTION[1] if on_cpu else ATTENTION[0]
        declare_resolution(server_args, _KEY, **fields)
    previous(server_args)


def size_pools(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Before the cache's arguments are checked: how many kept tokens there is room for."""
    if os.environ.get(ENV):
        from sglang.srt.arg_groups.model_override_base import model_config_of
        from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

        try:
            settings = settings_of(model_config_of(server_args))
        except EntropyPruneError as error:
            _refuse(error)
        if resolving_view(server_args).swa_full_tokens_ratio is None:
            ratio = kept_ratio(settings.policy, settings.shape.layers)
            declare_resolution(server_args, _KEY, swa_full_tokens_ratio=ratio)
    previous(server_args)


def refuse_arguments(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Last step: refuse what cannot work, whoever set it."""
    previous(server_args)
    if os.environ.get(ENV):
        from sglang.srt.arg_groups.overrides import resolving_view

        from ep_backends.sglang.ledger import check_arguments

        try:
            check_arguments(resolving_view(server_args))
        except UnsupportedError as error:
            _refuse(error)


_STEPS = {
    "handle_missing_default_values": read_policy,
    "handle_cache_compatibility": size_pools,
    "handle_other_validations": refuse_arguments,
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
    try:
        policy = PruningPolicy.from_environment()
        value = json.loads(override or "{}").get(_KEY)
        if value is None:
            return policy
        asked = PruningPolicy.parse(value) if isinstance(value, str) else None
        asked = asked or PruningPolicy.from_json(value)
        if policy is not None and policy != asked:
            raise PolicyError(
                f"{ENV} says {policy}, --json-model-override-args says {asked}; set one of them"
            )
    except EntropyPruneError as error:
        _refuse(error)
    if policy is None:
        os.environ[ENV], os.environ[_FROM_JSON] = str(asked), "1"
    return asked


def _refuse(error: Exception) -> NoReturn:
    raise StartRefused(str(error)) from None


# Hooks, in the processes that run the model.


def settings_of(config: Any) -> Any:
    """What pruning needs to know of a server, from SGLang's `ModelConfig`; made once.

    Raises:
        EntropyPruneError: the model, the method or the budget does not work here.
    """
    from ep_backends.sglang.ledger import check_model
    from ep_backends.sglang.requests import Settings, check_budget

    if isinstance(settings := getattr(config, _KEY, None), Settings):
        return settings
    policy = PruningPolicy.from_environment()
    assert policy is not None
    facts = config.hf_config.to_dict() | {"text_config": config.hf_text_config.to_dict()}
    adapter = registry().adapter(facts["model_type"])
    check_model(config, adapter, facts)
    shape = adapter.decoder_shape(facts)
    policy = policy.at_layer(adapter.default_layer, shape.layers)
    check_budget(policy)
    settings = Settings(policy, adapter, shape, registry().selector(policy.method))
    setattr(config, _KEY, settings)
    return settings


def derive_pools(original: Callable[..., None], config: Any) -> None:
    """Around `ModelConfig._derive_hybrid_model`: layers from K on get their own KV pool."""
    original(config)
    if not os.environ.get(ENV) or config.is_draft_model:
        return
    verify()
    try:
        settings = settings_of(config)
    except EntropyPruneError as error:
        _refuse(error)
    config.is_hybrid_swa = True
    config.sliding_window_size = None
    config.full_attention_layer_ids = list(range(settings.layer))
    config.swa_attention_layer_ids = list(range(settings.layer, settings.shape.layers))


def build_attention(original: Callable[..., Any], *, model_runner: Any) -> Any:
    """Around `build_attention_backends`: two instances, and the hooks on the decoder."""
    config = model_runner.model_config
    if not hasattr(config, _KEY) or model_runner.is_draft_worker:
        return original(model_runner=model_runner)
    from sglang.srt.runtime_context import get_parallel

    from ep_backends.sglang.attention import PrunedAttention
    from ep_backends.sglang.ledger import check_decoder
    from ep_backends.sglang.prefill import Prefill, decoder_layers

    verify()
    settings = settings_of(config)
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
            req.set_finish_with_abort(str(error))
    original(scheduler, req, is_retracted)


def _plan(scheduler: Any, req: Any) -> None:
    from ep_backends.sglang.metrics import metrics_of
    from ep_backends.sglang.requests import KEY, fit, plan_of, plan_request

    inputs = req.multimodal_inputs
    plan = plan_of(inputs)
    if plan is None and inputs is not None:
        plan = plan_request(req, inputs, settings_of(scheduler.model_config))
        setattr(inputs, KEY, plan)
        if plan.namespace:
            req.extra_key = f"{req.extra_key or ''}|{KEY}:{plan.namespace}"
        req.customized_info = (req.customized_info or {}) | {KEY: [plan.info]}
        if (metrics := metrics_of(scheduler)) is not None:
            metrics.count(plan)
    chunked = scheduler.chunked_prefill_size is not None and scheduler.chunked_prefill_size > 0
    fit(req, plan, slots=scheduler.token_to_kv_pool_allocator.size_swa, chunked=chunked)


def report_once(original: Callable[..., bool], streamer: Any, key: str) -> bool:
    """Around the streamer's question whether a key has one value for a request."""
    return key == _KEY or original(streamer, key)
