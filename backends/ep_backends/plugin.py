"""Registers the backends that ship with entropyprune; imports none of their engines."""

from __future__ import annotations

from ep_core.backend import Backend, BackendSpec
from ep_core.hookspecs import hookimpl


def _transformers() -> Backend:
    from ep_backends.transformers.backend import TransformersBackend

    return TransformersBackend()


@hookimpl
def entropyprune_backends() -> list[BackendSpec]:
    """One specification for each engine."""
    return [BackendSpec("transformers", "plain transformers, model.generate", _transformers)]
