"""Changing a host so that it can be undone: look before, replace, put back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

from ep_core.errors import UnsupportedError

_MISSING = object()


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
