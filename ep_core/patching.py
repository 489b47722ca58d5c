"""Reaching into a host safely: check before, apply, be able to undo, say what was done.

An `AttachPoint` is a ledger entry and stands beside the code that uses it. `check_point` looks at
the installed host without changing it, `Patches` applies and reverses changes.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Self

from ep_core.errors import UnsupportedError

_MISSING = object()


@dataclass(frozen=True)
class AttachPoint:
    """One place where a backend depends on the inside of its host.

    Attributes:
        target: `"package.module:Qualified.name"` of a callable or a property.
        parameters: parameters that the target must take, by name.
        why: what the backend needs there.
        upstream: whether the host offers an official way, as far as is known.
        remove_when: what would make this entry unnecessary.
    """

    target: str
    parameters: tuple[str, ...]
    why: str
    upstream: str
    remove_when: str


@dataclass(frozen=True)
class PointStatus:
    """An attach point as found: `ok` with what it is for, or `FAILED` with a reason."""

    target: str
    state: Literal["ok", "FAILED"]
    detail: str

    def __str__(self) -> str:
        return f"{self.state}: {self.detail}"


def check_point(point: AttachPoint) -> PointStatus:
    """Resolve an attach point and compare its signature, changing nothing."""
    module_name, _, path = point.target.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
        for name in path.split("."):
            target = getattr(target, name)
    except Exception as error:  # importing a host can raise anything: a missing driver, say
        return PointStatus(point.target, "FAILED", f"not found: {error}")
    if isinstance(target, property):
        return PointStatus(point.target, "ok", point.why)
    if not callable(target):
        return PointStatus(point.target, "FAILED", "it is no callable any more")
    missing = missing_parameters(target, point.parameters)
    if missing:
        return PointStatus(
            point.target, "FAILED", f"its signature no longer takes {', '.join(missing)}"
        )
    return PointStatus(point.target, "ok", point.why)


def missing_parameters(target: Callable[..., Any], names: tuple[str, ...]) -> list[str]:
    """Which of the named parameters a callable does not take by name."""
    parameters = inspect.signature(target).parameters.values()
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return [name for name in names if name not in by_name]


class Patches:
    """Changes to a host that are undone together, last first.

    Use as a context manager or call `undo`. Undoing twice does nothing.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def replace(
        self,
        owner: object,
        name: str,
        make: Callable[[Callable[..., Any]], Callable[..., Any]],
        *,
        parameters: tuple[str, ...] = (),
    ) -> None:
        """Replace the callable `owner.name` by `make(original)`.

        An attribute that `owner` only inherits is shadowed, and the shadow is removed on undo.

        Raises:
            UnsupportedError: the attribute is missing or does not take the named parameters.
        """
        original = getattr(owner, name, None)
        where = f"{type(owner).__name__}.{name}"
        if not callable(original):
            raise UnsupportedError(f"cannot attach to {where}: there is no such callable")
        if missing := missing_parameters(original, parameters):
            raise UnsupportedError(f"cannot attach to {where}: it takes no {', '.join(missing)}")
        own = vars(owner).get(name, _MISSING)
        setattr(owner, name, make(original))
        self.add(lambda: delattr(owner, name) if own is _MISSING else setattr(owner, name, own))

    def add(self, undo: Callable[[], object]) -> None:
        """Register how to reverse a change that was made through a door of the host's own."""
        self._stack.callback(undo)

    def undo(self) -> None:
        """Reverse every change, last first; one that fails does not stop the others."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()
