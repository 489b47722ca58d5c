"""Turning pruning on in a process that starts LMDeploy engines, and in their workers."""

from __future__ import annotations

import copy
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

from ep_backends.lmdeploy.attached import SETTINGS
from ep_backends.lmdeploy.ledger import LEDGER
from ep_backends.lmdeploy.settings import EnginePolicy, LMDeploySettings, settings_in
from ep_backends.shared.refusals import refusing
from ep_backends.shared.requests import FIELD
from ep_core.errors import PolicyError, UnsupportedError
from ep_core.patching import Patches
from ep_core.policy import ENV, PruningPolicy

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


def is_active() -> bool:
    """Is pruning switched on for the engines that this process starts?"""
    return _active is not None


def _install() -> Patches:
    LEDGER.require(LEDGER.check("wrapped", "used", "extended"))
    LEDGER.warn_if_untested()
    patches = Patches()
    patches.add(_forget)
    try:
        for target, wrapper in LEDGER.wrappers():
            _wrap(patches, target, wrapper)
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


def policy_for(overrides: Mapping[str, Any] | None) -> EnginePolicy | None:
    """The policy of an engine, from wherever it was set, or None.

    Args:
        overrides: the engine's `hf_overrides`. An `EnginePolicy` in them is the last word.

    Raises:
        PolicyError: it cannot be read, or two of them differ.
    """
    value = (overrides or {}).get(FIELD)
    if isinstance(value, EnginePolicy):
        return value
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
    return next(map(EnginePolicy, given.values()), None)


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

    from ep_backends.lmdeploy.refusals import check_arguments, check_model

    with refusing():
        policy = policy_for(getattr(backend_config, "hf_overrides", None))
        if policy:
            # a copy, because the caller may use theirs again
            backend_config = copy.copy(backend_config or PytorchEngineConfig())
            check_arguments(backend_config, speculative_config)
            overrides = {k: v for k, v in (backend_config.hf_overrides or {}).items() if k != FIELD}
            hf_config = copy.deepcopy(engine.hf_cfg)
            override_hf_config(hf_config, overrides)
            settings = LMDeploySettings.of(
                PruningPolicy.parse(policy), hf_config.to_dict(), details=policy.details
            )
            check_model(ModelConfig.from_hf_config(hf_config, model_path), settings.core)
            setattr(engine, SETTINGS, settings)
            settled = EnginePolicy(settings.core.policy, details=settings.details)
            backend_config.hf_overrides = overrides | {FIELD: settled}
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
        if policy_for(getattr(backend_config, "hf_overrides", None)):
            raise UnsupportedError(
                "the TurboMind engine was chosen, and it has no place to prune at; choose the "
                "PyTorch engine: --backend pytorch, or backend_config=PytorchEngineConfig(...)"
            )
    return original(engine, model_path=model_path, backend_config=backend_config, **kwargs)


def launch_servers(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around `launch_server`, which starts servers for `--dp` in processes of their own."""
    from ep_backends.lmdeploy.refusals import check_arguments

    config = inspect.signature(original).bind(*args, **kwargs).arguments["backend_config"]
    with refusing():
        if policy_for(config.hf_overrides):
            check_arguments(config, None)
    return original(*args, **kwargs)


def configure(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around `ModelConfig.from_pretrained`: our classes go along to each worker."""
    from ep_backends.lmdeploy import module_map

    given = inspect.signature(original).bind(*args, **kwargs)
    overrides: dict[str, Any] = given.arguments.get("hf_overrides") or {}
    with refusing():
        policy = policy_for(overrides)
        if policy and policy is not overrides.get(FIELD):
            raise UnsupportedError(
                "the engine was started by itself, where nothing decides what its requests keep; "
                "start it through lmdeploy.pipeline, AsyncEngine or the server"
            )
    if policy:
        config = original(*args, **kwargs)
        config.custom_module_map = str(Path(module_map.__file__).resolve())
        return config
    if policy is not None:  # a session's word that nothing is pruned: LMDeploy need not see it
        given.arguments["hf_overrides"] = {k: v for k, v in overrides.items() if k != FIELD} or None
    _forget_classes()
    return original(*given.args, **given.kwargs)


def build_engine(original: Callable[..., None], engine: Any, *args: Any, **kwargs: Any) -> None:
    """Around `Engine.__init__`, in the process of the scheduler: count blocks by kept tokens."""
    from lmdeploy.pytorch.paging.block_manager import DefaultBlockManager

    from ep_backends.lmdeploy.kv import required_blocks

    original(engine, *args, **kwargs)
    settings = settings_in(engine.model_config.hf_config)
    if settings is None:
        return
    manager = engine.scheduler.block_manager
    with refusing():
        if type(manager) is not DefaultBlockManager:
            raise UnsupportedError(
                f"blocks are counted by {type(manager).__name__}; pruning works with "
                "DefaultBlockManager, the one of models without sliding windows"
            )
    manager.num_required_blocks = partial(
        required_blocks, manager.num_required_blocks, settings.ratio
    )


# In each worker.


def group_layers(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `build_block_cache_plan`: more pages for the layers below K."""
    from ep_backends.lmdeploy.kv import grouped

    plan = original(model_config, *args, **kwargs)
    settings = settings_in(model_config.hf_config)
    return plan if settings is None else grouped(plan, settings.core.layer, settings.ratio)
