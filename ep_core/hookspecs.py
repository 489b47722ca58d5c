"""The hooks of entropyprune. Plugins return frozen values and never act.

A plugin is a module or object with functions of these names, marked with `hookimpl`, and named
in the entry point group `entropyprune`:

    # my_package/pruning.py
    from ep_core.hookspecs import hookimpl
    from ep_core.selectors import Selector, top_k

    @hookimpl
    def entropyprune_selectors():
        norm = lambda inputs, k: top_k(-inputs.hidden.float().norm(dim=1), k)
        return [Selector("low-norm", "smallest hidden norm", frozenset({"hidden"}), norm)]

    # pyproject.toml of my_package
    [project.entry-points.entropyprune]
    my_package = "my_package.pruning"
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from ep_core.backend import BackendSpec
    from ep_core.family import Family
    from ep_core.selection import Selector

PROJECT = "entropyprune"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def entropyprune_backends() -> Iterable[BackendSpec]:
    """Engines that can prune.

    Example: `return [BackendSpec("my-engine", "one line about it", load)]`, where `load()`
    imports the engine and returns a `Backend`; it runs only when the backend is used.
    """
    raise AssertionError("a specification is never called")


@hookspec
def entropyprune_families() -> Iterable[Family]:
    """Model families, one for each `model_type` of a checkpoint's config.json.

    Example: `return [Family(model_type="my_vlm", ...)]`.
    """
    raise AssertionError("a specification is never called")


@hookspec
def entropyprune_selectors() -> Iterable[Selector]:
    """Pruning methods, chosen by `method=NAME` in a policy.

    Example: `return [Selector("low-norm", "smallest hidden norm", frozenset({"hidden"}), f)]`.
    """
    raise AssertionError("a specification is never called")
