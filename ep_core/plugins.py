"""Finding plugins and what they provide: one route for our own and everyone else's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

import pluggy

from ep_core import hookspecs
from ep_core.adapter import ModelAdapter
from ep_core.backend import BackendSpec
from ep_core.errors import PluginError, UnsupportedError
from ep_core.selection import Selector

ENV_BLOCK = "ENTROPYPRUNE_BLOCK"
BUILT_IN = ("selectors", "adapters", "backends")  # our own entry points

T = TypeVar("T")


@dataclass(frozen=True)
class Registry:
    """Everything that plugins provide, by name."""

    backends: Mapping[str, BackendSpec]
    adapters: Mapping[str, ModelAdapter]
    selectors: Mapping[str, Selector]
    providers: Mapping[str, str]

    def backend(self, name: str) -> BackendSpec:
        """The backend of that name, or `PluginError` with those there are."""
        return _find(self.backends, name, "backend")

    def selector(self, name: str) -> Selector:
        """The selector of that name, or `PluginError` with those there are."""
        return _find(self.selectors, name, "method")

    def adapter(self, model_type: str) -> ModelAdapter:
        """The adapter of that model type, or `UnsupportedError` with those there are."""
        if model_type not in self.adapters:
            raise UnsupportedError(
                f"no adapter for model type {model_type!r}; there are "
                f"{', '.join(sorted(self.adapters))} (docs/adapters.md shows how to write one)"
            )
        return self.adapters[model_type]


@cache
def registry() -> Registry:
    """What the installed plugins provide, loaded once.

    Plugins named in `ENTROPYPRUNE_BLOCK` (comma separated entry point names) are not imported.
    """
    names = os.environ.get(ENV_BLOCK, "").split(",")
    return collect(load_plugins(blocked=[name.strip() for name in names if name.strip()]))


def load_plugins(blocked: Collection[str] = ()) -> pluggy.PluginManager:
    """Load the entry points of group `entropyprune`; a broken one costs one warning."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in blocked:
        manager.set_blocked(name)
    entries = sorted(set(entry_points(group=hookspecs.PROJECT)))
    for name in set(blocked) - {entry.name for entry in entries}:
        warnings.warn(f"{ENV_BLOCK} names {name!r}, which is no plugin here", stacklevel=2)
    for entry in entries:
        if manager.is_blocked(entry.name):
            continue
        # two packages may choose one entry point name; what they provide is what must differ
        name = f"{entry.name} ({entry.value})" if manager.has_plugin(entry.name) else entry.name
        try:
            manager.register(entry.load(), name=name)
            manager.check_pending()
        except (Exception, SystemExit) as error:  # a stranger's import must not stop us
            if manager.has_plugin(name):
                manager.unregister(name=name)
            _warn_left_out(name, error)
    return manager


def collect(manager: pluggy.PluginManager) -> Registry:
    """Ask every plugin what it provides; two providers of one name are refused."""
    providers: dict[str, str] = {}

    def gather(hook: pluggy.HookCaller, key: Callable[[Any], str], kind: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for implementation in hook.get_hookimpls():
            plugin = implementation.plugin_name
            provide: Callable[[], Any] = implementation.function
            try:
                items: list[Any] = list(provide())
                names = [key(item) for item in items]
            except Exception as error:  # a stranger's code can raise anything
                _warn_left_out(plugin, error)
                continue
            for name, item in zip(names, items, strict=True):
                if name in found:
                    first = providers[f"{kind} {name}"]
                    stranger = first if plugin in BUILT_IN else plugin
                    raise PluginError(
                        f"{kind} {name!r} is provided by plugins {first!r} and {plugin!r}; block "
                        f"one, as in {ENV_BLOCK}={stranger}"
                    )
                found[name] = item
                providers[f"{kind} {name}"] = plugin
        return found

    return Registry(
        backends=gather(manager.hook.entropyprune_backends, lambda spec: spec.name, "backend"),
        adapters=gather(
            manager.hook.entropyprune_adapters, lambda adapter: adapter.model_type, "adapter"
        ),
        selectors=gather(
            manager.hook.entropyprune_selectors, lambda selector: selector.name, "selector"
        ),
        providers=providers,
    )


def _warn_left_out(plugin: str, error: BaseException) -> None:
    warnings.warn(f"entropyprune plugin {plugin!r} is left out: {error!r}", stacklevel=3)


def _find(items: Mapping[str, T], name: str, kind: str) -> T:
    if name not in items:
        raise PluginError(f"unknown {kind} {name!r}; there are {', '.join(sorted(items))}")
    return items[name]
