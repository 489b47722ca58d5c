"""Finding plugins and what they provide: one route for our own and everyone else's."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from importlib.metadata import entry_points
from itertools import chain
from typing import Any, TypeVar

import pluggy

from ep_core import hookspecs
from ep_core.adapter import ModelAdapter
from ep_core.backend import BackendSpec
from ep_core.errors import PluginError, UnsupportedError
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

    def checked(self, returned: Any) -> list[Any]:
        """The items that a hook returned; TypeError where it is something else."""
        items: list[Any] = list(returned)
        for item in items:
            if not isinstance(item, self.type):
                raise TypeError(f"{item!r} is no {self.type.__name__}")
        return items


# by the field of `Registry`; the hook is called entropyprune_FIELD
KINDS = {
    "backends": Kind("backend", BackendSpec, "name"),
    "adapters": Kind("adapter", ModelAdapter, "model_type"),
    "selectors": Kind("selector", Selector, "name"),
}


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


class PluginManager(pluggy.PluginManager):
    """pluggy's manager, in which a plugin that breaks costs one warning and stops no other.

    Attributes:
        provided: each item that a hook has returned, behind the name of its plugin.
    """

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.add_hookspecs(hookspecs)
        self.provided: list[tuple[str, object]] = []

    def register(self, plugin: object, name: str | None = None) -> str | None:
        """Register a plugin with a guard around each of its hooks; None where it is blocked."""
        name = name or self.get_canonical_name(plugin)
        guarded = _Guarded(plugin)
        for attribute in dir(plugin):
            options: Any = self.parse_hookimpl_opts(plugin, attribute)
            if options is None:
                continue
            function = getattr(plugin, attribute)
            field = (options["specname"] or attribute).removeprefix(f"{hookspecs.PROJECT}_")
            old_style = options["hookwrapper"]
            if field not in KINDS:
                guard = function  # for pluggy to refuse
            elif options["wrapper"] or old_style:
                guard = self._wrapper(name, KINDS[field], function, old_style)
                options |= {"wrapper": True, "hookwrapper": False}
            else:
                guard = self._implementation(name, KINDS[field], function)
            setattr(guarded, attribute, hookspecs.hookimpl(**options)(guard))
        return super().register(guarded, name)

    def _implementation(
        self, plugin: str, kind: Kind, function: Callable[[], Any]
    ) -> Callable[[], list[Any] | None]:
        @wraps(function)
        def provide() -> list[Any] | None:
            try:
                items = kind.checked(function())
            except Exception as error:  # a stranger's code can raise anything
                _warn_left_out(plugin, error)
                return None  # no result, to pluggy
            self.provided += [(plugin, item) for item in items]
            return items

        return provide

    def _wrapper(
        self, plugin: str, kind: Kind, function: Callable[[], Any], old_style: bool
    ) -> Callable[[], Generator[None, list[list[Any]], list[list[Any]]]]:
        @wraps(function)
        def wrap() -> Generator[None, list[list[Any]], list[list[Any]]]:
            try:
                wrapper = function()
                next(wrapper)
            except Exception as error:  # a stranger's code can raise anything
                _warn_left_out(plugin, error)
                return (yield)
            results = yield
            try:
                changed = [kind.checked(items) for items in _finish(wrapper, results, old_style)]
            except Exception as error:
                _warn_left_out(plugin, error)
                return results
            known = {id(item) for _, item in self.provided}
            self.provided += [
                (plugin, item) for items in changed for item in items if id(item) not in known
            ]
            return changed

        return wrap


@dataclass
class _Guarded:
    """Stands for a plugin in pluggy's manager; the same plugin twice is the same."""

    plugin: object


def _finish(
    wrapper: Generator[None, Any, Any], results: list[list[Any]], old_style: bool
) -> list[list[Any]]:
    """What a wrapper that waits at its `yield` makes of the results; those stay as they are."""
    copy: Any = [list(items) for items in results]
    given = pluggy.Result.from_call(lambda: copy) if old_style else copy
    try:
        wrapper.send(given)
    except StopIteration as end:
        made: list[list[Any]] = given.get_result() if old_style else end.value
        return made
    raise RuntimeError("a wrapper yields once")


def load_plugins(blocked: Collection[str] = ()) -> PluginManager:
    """Load the entry points of group `entropyprune`; a broken one costs one warning."""
    manager = PluginManager()
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


def collect(manager: PluginManager) -> Registry:
    """Call the hooks; two providers of one name are refused."""
    found: dict[str, dict[str, Any]] = {field: {} for field in KINDS}
    providers: dict[str, str] = {}

    def plugins_of(item: object) -> list[str]:
        return [plugin for plugin, provided in manager.provided if provided is item]

    for field, kind in KINDS.items():
        for item in chain.from_iterable(getattr(manager.hook, f"{hookspecs.PROJECT}_{field}")()):
            name = getattr(item, kind.key)
            if name in found[field]:
                both = {*plugins_of(found[field][name]), *plugins_of(item)}
                *_, last = plugins = sorted(both, key=lambda plugin: (plugin not in OURS, plugin))
                raise PluginError(
                    f"{kind.name} {name!r} is provided twice, by {' and '.join(map(repr, plugins))}"
                    f"; block one, as in {ENV_BLOCK}={last}"
                )
            found[field][name] = item
            providers[f"{kind.name} {name}"] = plugins_of(item)[0]
    return Registry(**found, providers=providers)


def _warn_left_out(plugin: str, error: BaseException) -> None:
    warnings.warn(f"entropyprune plugin {plugin!r} is left out: {error!r}", stacklevel=3)


def _find(items: Mapping[str, T], name: str, kind: str) -> T:
    if name not in items:
        raise PluginError(f"unknown {kind} {name!r}; there are {', '.join(sorted(items))}")
    return items[name]
