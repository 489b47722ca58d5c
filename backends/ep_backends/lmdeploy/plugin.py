"""Turning pruning on in a process that starts LMDeploy engines, and in their workers."""

from __future__ import annotations

import copy
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from ep_backends.budgets import KEY, server_settings
from ep_backends.shared.refusals import refusing
from ep_core.errors import PolicyError, UnsupportedError
from ep_core.family import Config
from ep_core.patching import Patches
from ep_core.policy import ENV, PruningPolicy
from ep_core.settings import Settings

_active: Patches | None = None
_policy: PruningPolicy | None = None  # given to `activate`


def activate(policy: str | PruningPolicy | None = None) -> Patches:
    """Prune in the engines that this process starts from now on.

    Args:
        policy: such as "layer=2,keep=128". An engine's `hf_overrides={"entropyprune": ...}` is
            another way, the variable `ENTROPYPRUNE` a third; two that differ are refused.

    Returns:
        what `undo()` takes back, for engines that are started afterwards.

    Raises:
        UnsupportedError: this LMDeploy is not as pruning needs it.
        PolicyError: the policy cannot be read.
    """
    global _active, _policy
    given = PruningPolicy.parse(policy) if isinstance(policy, str) else policy
    if _active is None:
        _active = _install()
    _policy = given or _policy
    return _active


def _install() -> Patches:
    from ep_backends.lmdeploy.ledger import AT_START, HOOKED, check_points

    check_points(AT_START)
    from ep_backends.lmdeploy.kv import required_blocks
    from ep_backends.lmdeploy.requests import plan_request

    patches = Patches()
    patches.add(_forget)
    wrappers: dict[str, Callable[..., Any]] = {
        "build_pytorch": build_pytorch,
        "build_turbomind": build_turbomind,
        "launch_servers": launch_servers,
        "configure": configure,
        "plan_request": plan_request,
        "required_blocks": required_blocks,
        "grouped_plan": grouped_plan,
    }
    try:
        for name, point in HOOKED.items():
            _wrap(patches, point.target, wrappers[name])
    except BaseException:
        patches.undo()
        raise
    return patches


def _wrap(patches: Patches, target: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function by `wrapper(original, ...)`, a class method by a static one."""
    path, _, name = target.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(path)
    bound = isinstance(vars(owner).get(name), classmethod)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        return staticmethod(replacement) if bound else replacement

    patches.replace(owner, name, make)


def _forget() -> None:
    """Back to the state before `activate`."""
    global _active, _policy
    _active = _policy = None
    _forget_classes()


def _forget_classes() -> None:
    """LMDeploy keeps a custom module map for every later engine of the process."""
    from lmdeploy.pytorch.models.module_map import CUSTOM_MODULE_MAP

    from ep_backends.lmdeploy.module_map import MODULE_MAP

    for name, ours in MODULE_MAP.items():
        if CUSTOM_MODULE_MAP.get(name) == ours:
            del CUSTOM_MODULE_MAP[name]


# Starting an engine.


def policy_for(overrides: Mapping[str, Any] | None) -> PruningPolicy | None:
    """The policy of an engine, from wherever it was set.

    Args:
        overrides: the engine's `hf_overrides`.

    Raises:
        PolicyError: it cannot be read, or two of them differ.
    """
    value = (overrides or {}).get(KEY)
    own = None
    if value is not None:
        own = (
            PruningPolicy.parse(value) if isinstance(value, str) else PruningPolicy.from_json(value)
        )
    found = {
        "hf_overrides": own,
        "activate()": _policy,
        ENV: PruningPolicy.from_environment(),
    }
    given = {where: policy for where, policy in found.items() if policy is not None}
    if len(set(given.values())) > 1:
        differing = ", ".join(f"{where} says {policy}" for where, policy in given.items())
        raise PolicyError(f"{differing}; set one of them")
    return next(iter(given.values()), None)


class Carried(str):
    """A policy in an engine's `hf_overrides`: what goes to its other processes with them.

    A process that receives it is activated before it starts anything, even if it never imports us.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: Any) -> Carried:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (str(self),)


def _arrive(policy: str) -> Carried:
    activate()
    return Carried(policy)


def build_pytorch(
    original: Callable[..., Any],
    engine: Any,
    model_path: str,
    backend_config: Any = None,
    speculative_config: Any = None,
    **kwargs: Any,
) -> Any:
    """Around `AsyncEngine._build_pytorch`: settle the policy, refuse what cannot work."""
    from lmdeploy import PytorchEngineConfig
    from lmdeploy.pytorch.config import ModelConfig, override_hf_config

    from ep_backends.lmdeploy.ledger import check_arguments, check_model

    with refusing():
        policy = policy_for(getattr(backend_config, "hf_overrides", None))
        if policy is not None:
            # a copy, because the caller may use theirs again
            backend_config = copy.copy(backend_config or PytorchEngineConfig())
            check_arguments(backend_config, speculative_config)
            overrides = {k: v for k, v in (backend_config.hf_overrides or {}).items() if k != KEY}
            hf_config = copy.deepcopy(engine.hf_cfg)
            override_hf_config(hf_config, overrides)
            facts = hf_config.to_dict()
            settings = settings_for(policy, facts)
            check_model(ModelConfig.from_hf_config(hf_config, model_path), settings.family, facts)
            setattr(engine, KEY, settings)
            backend_config.hf_overrides = overrides | {KEY: Carried(settings.policy)}
    return original(
        engine,
        model_path=model_path,
        backend_config=backend_config,
        speculative_config=speculative_config,
        **kwargs,
    )


def build_turbomind(
    original: Callable[..., Any], engine: Any, model_path: str, backend_config: Any, **kwargs: Any
) -> Any:
    """Around `AsyncEngine._build_turbomind`: it cannot prune."""
    with refusing():
        if policy_for(getattr(backend_config, "hf_overrides", None)) is not None:
            raise UnsupportedError(
                "the TurboMind engine was chosen, and it has no place to prune at; choose the "
                "PyTorch engine: --backend pytorch, or backend_config=PytorchEngineConfig(...)"
            )
    return original(engine, model_path=model_path, backend_config=backend_config, **kwargs)


def launch_servers(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around `launch_server`, which starts servers for `--dp` in processes of their own."""
    from ep_backends.lmdeploy.ledger import check_arguments

    config = inspect.signature(original).bind(*args, **kwargs).arguments["backend_config"]
    with refusing():
        if policy_for(config.hf_overrides) is not None:
            check_arguments(config, None)
    return original(*args, **kwargs)


def configure(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around `ModelConfig.from_pretrained`: our classes go along to each worker."""
    from ep_backends.lmdeploy import module_map

    config = original(*args, **kwargs)
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    overrides = given.get("hf_overrides") or {}
    if isinstance(overrides.get(KEY), Carried):
        config.custom_module_map = str(Path(module_map.__file__).resolve())
        return config
    with refusing():
        if policy_for(overrides) is not None:
            raise UnsupportedError(
                "the engine was started by itself, so that nobody decides what its requests keep; "
                "start it through lmdeploy.pipeline, AsyncEngine or the server"
            )
    _forget_classes()
    return config


def settings_for(policy: PruningPolicy, facts: Config) -> Settings:
    """What pruning needs to know of a server.

    Args:
        policy: as it was set.
        facts: the checkpoint's configuration.

    Raises:
        EntropyPruneError: there is no such family, no such layer or no such method.
    """
    return server_settings(policy, facts)


def settings_of(hf_config: Any) -> Settings | None:
    """The same from the configuration that a worker gets; None where there is no policy."""
    value = getattr(hf_config, KEY, None)
    if value is None:
        return None
    return settings_for(PruningPolicy.parse(str(value)), hf_config.to_dict())


# In each worker.


def grouped_plan(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `build_block_cache_plan`."""
    from ep_backends.lmdeploy.kv import group_layers, kv_ratio

    plan = original(model_config, *args, **kwargs)
    settings = settings_of(model_config.hf_config)
    if settings is None:
        return plan
    ratio = kv_ratio(settings.policy, settings.shape.layers)
    return group_layers(plan, settings.layer, ratio)
