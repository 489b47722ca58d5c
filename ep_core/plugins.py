"""Finding plugins and what they provide: one route for our own and everyone else's."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

import pluggy

from ep_core import hookspecs
from ep_core.backend import BackendSpec
from ep_core.errors import PluginError, UnsupportedError
from ep_core.family import Family
from ep_core.selection import Selector

ENV_BLOCK = "ENTROPYPRUNE_BLOCK"
OURS = ("selectors", "adapters", "backends")  # our own entry points

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """What plugins provide through one hook.

    Attributes:
        name: of one, for people.
        type: of each item.
        key: the item's attribute that must differ between plugins.
    """

    name: str
    type: type
    key: str

    def checked(self, items: Any) -> list[Any]:
        """The items as a list; TypeError where one is something else."""
        found = list(items)
        for item in found:
            if not isinstance(item, self.type):
                raise TypeError(f"{item!r} is no {self.type.__name__}")
        return found


# by the field of `Registry`; the hook is called entropyprune_FIELD
KINDS = {
    "backends": Kind("backend", BackendSpec, "name"),
    "families": Kind("family", Family, "model_type"),
    "selectors": Kind("selector", Selector, "name"),
}


@dataclass(frozen=True)
class Registry:
    """Everything that plugins provide, by name."""

    backends: Mapping[str, BackendSpec]
    families: Mapping[str, Family]
    selectors: Mapping[str, Selector]
    providers: Mapping[str, str]

    def backend(self, name: str) -> BackendSpec:
        """The backend of that name, or `PluginError` with those there are."""
        return _find(self.backends, name, "backend")

    def selector(self, name: str) -> Selector:
        """The selector of that name, or `PluginError` with those there are."""
        return _find(self.selectors, name, "method")

    def family(self, model_type: str) -> Family:
        """The family of that model type, or `UnsupportedError` with those there are."""
        if model_type not in self.families:
            raise UnsupportedError(
                f"model type {model_type!r} is no family that can be pruned; there are "
                f"{', '.join(sorted(self.families))} (docs/adapters.md shows how to add one)"
            )
        return self.families[model_type]


@cache
def registry() -> Registry:
    """What the installed plugins provide, loaded once.

    Plugins named in `ENTROPYPRUNE_BLOCK` (comma separated entry point names) are not imported.
    """
    names = os.environ.get(ENV_BLOCK, "").split(",")
    return collect(load_plugins(blocked=[name.strip() for name in names if name.strip()]))


def new_manager() -> pluggy.PluginManager:
    """A manager that knows the hooks and no plugin."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def load_plugins(blocked: Collection[str] = ()) -> pluggy.PluginManager:
    """Load the entry points of group `entropyprune`; a broken one costs one warning."""
    manager = new_manager()
    for name in blocked:
        manager.set_blocked(name)
    entries = sorted(set(entry_points(group=hookspecs.PROJECT)))
    times = Counter(entry.name for entry in entries)
    # two packages may choose one entry point name; what they provide is what must differ
    names = [e.name if times[e.name] == 1 else f"{e.name}:{e.value}" for e in entries]
    for name in set(blocked) - {*names, *times}:
        warnings.warn(f"{ENV_BLOCK} names {name!r}, which is no plugin here", stacklevel=2)
    for name, entry in zip(names, entries, strict=True):
        if manager.is_blocked(name) or manager.is_blocked(entry.name):
            continue
        try:
            manager.register(entry.load(), name=name)
            manager.check_pending()
        except (Exception, SystemExit) as error:  # a stranger's import must not stop us
            if manager.has_plugin(name):
                manager.unregister(name=name)
            _warn_left_out(name, error)
    return manager


def collect(manager: pluggy.PluginManager) -> Registry:
    """Call the hooks; two providers of one name are refused."""
    found: dict[str, dict[str, Any]] = {field: {} for field in KINDS}
    providers: dict[str, list[str]] = {}
    for field, kind in KINDS.items():
        hook = getattr(manager.hook, f"{hookspecs.PROJECT}_{field}")
        for item, plugins in _call(manager, hook, kind):
            name = getattr(item, kind.key)
            label = f"{kind.name} {name}"
            if name in found[field]:
                both = list({*providers[label], *plugins})
                both.sort(key=lambda plugin: (plugin not in OURS, plugin))
                raise PluginError(
                    f"{kind.name} {name!r} is provided twice, by {' and '.join(map(repr, both))}; "
                    f"block one, as in {ENV_BLOCK}={both[-1]}"
                )
            found[field][name] = item
            providers[label] = plugins
    return Registry(**found, providers={label: names[0] for label, names in providers.items()})


def _call(
    manager: pluggy.PluginManager, hook: pluggy.HookCaller, kind: Kind
) -> list[tuple[Any, list[str]]]:
    """What a hook gives, each item with the name of its plugin, or of all that gave this object.

    pluggy calls it. A plugin that breaks is left out: an implementation by the guard around it, a
    wrapper by calling again without it.
    """
    origin: defaultdict[int, list[str]] = defaultdict(list)
    for implementation in hook.get_hookimpls():
        if not (implementation.wrapper or implementation.hookwrapper):
            guard = _guarded(implementation, kind, origin)
            setattr(implementation, "function", guard)  # noqa: B010 # final for type checkers only

    def items(without: Sequence[object]) -> list[Any]:
        results = manager.subset_hook_caller(hook.name, without)()
        return [item for result in results for item in kind.checked(result)]

    def works(without: Sequence[object]) -> bool:
        try:
            items(without)
        except Exception:  # a stranger's wrapper can raise anything
            return False
        return True

    removed: list[object] = []
    while True:
        wrappers = [
            one
            for one in hook.get_hookimpls()
            if (one.wrapper or one.hookwrapper) and one.plugin not in removed
        ]
        # what no implementation gave was added by a wrapper
        added = [one.plugin_name for one in wrappers]
        try:
            return [(item, origin.get(id(item), added)) for item in items(removed)]
        except Exception as error:
            if not wrappers:
                raise  # none of the plugins did it
            to_blame = [one for one in wrappers if works([*removed, one.plugin])]
            for one in to_blame[:1] or wrappers:
                _warn_left_out(one.plugin_name, error)
                removed.append(one.plugin)


def _guarded(
    implementation: pluggy.HookImpl, kind: Kind, origin: defaultdict[int, list[str]]
) -> Callable[[], list[Any] | None]:
    """A hook's implementation that runs once, tells where its items are from, and cannot raise."""
    original, plugin = implementation.function, implementation.plugin_name

    @cache
    def provided() -> list[Any] | None:
        try:
            found = kind.checked(original())
        except Exception as error:  # a stranger's code can raise anything
            _warn_left_out(plugin, error)
            return None  # no result, to pluggy
        for item in found:
            origin[id(item)].append(plugin)
        return found

    def provide() -> list[Any] | None:
        found = provided()
        return None if found is None else list(found)  # a wrapper may change its list

    return provide


def _warn_left_out(plugin: str, error: BaseException) -> None:
    warnings.warn(f"entropyprune plugin {plugin!r} is left out: {error!r}", stacklevel=3)


def _find(items: Mapping[str, T], name: str, kind: str) -> T:
    if name not in items:
        raise PluginError(f"unknown {kind} {name!r}; there are {', '.join(sorted(items))}")
    return items[name]
