"""Planting what another version of a host may have changed, to see that a ledger notices."""

import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from ep_core.ledger import AttachPoint, Extension, Ledger, check_extension


def changes(ledger: Ledger) -> list[Any]:
    """Parameters `(point, change)` for each change that a point has to notice."""
    return [
        pytest.param(point, change, id=f"{group}-{point.target}-{change}")
        for group, points in ledger.points.items()
        for point in points
        for change, applies in {
            "gone": True,
            "takes less": point.takes,
            "has less": point.reads,
        }.items()
        if applies
    ]


@contextmanager
def planted(point: AttachPoint, change: str) -> Iterator[None]:
    """The host with one target changed; a method that a base class has as well stays a method."""
    path, _, name = point.target.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(path)
    with pytest.MonkeyPatch.context() as patch:
        if change == "gone":
            for each in inspect.getmro(owner) if isinstance(owner, type) else (owner,):
                if name in vars(each) and each is not object:
                    patch.delattr(each, name)
            if hasattr(owner, name):  # as `__init__` of every class
                patch.setattr(owner, name, None)
        elif change == "takes less":
            patch.setattr(owner, name, lambda self, other: None)
        else:
            patch.setattr(owner, name, type(name, (), {}))
        yield


def redefined(extension: Extension) -> Iterator[tuple[type, str]]:
    """Each name that a class of ours redefines, with the host's class that has it."""
    for status in check_extension(extension):
        base, _, name = status.target.rpartition(".")
        if name not in extension.new:
            yield pkgutil.resolve_name(base), name


@contextmanager
def renamed(base: type, name: str) -> Iterator[None]:
    """A host's class, and its bases, with another name in the place of this one."""
    with pytest.MonkeyPatch.context() as patch:
        for each in inspect.getmro(base):
            if name in vars(each):
                patch.setattr(each, f"{name}_of_nodes", vars(each)[name], raising=False)
                patch.delattr(each, name)
        yield


def extending(package: ModuleType, host: str) -> set[str]:
    """Every class in a package of ours that inherits from one of a host's, as `module:Class`."""
    names = [f"{package.__name__}.{file.name}" for file in pkgutil.iter_modules(package.__path__)]
    return {
        f"{own.__module__}:{own.__name__}"
        for module in map(import_module, names)
        for own in vars(module).values()
        if isinstance(own, type) and own.__module__ == module.__name__
        if any(base.__module__.split(".")[0] == host for base in own.__bases__)
    }
