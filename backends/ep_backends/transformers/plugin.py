"""Registers the transformers backend; imports nothing of transformers."""

from __future__ import annotations

from ep_core.backend import Backend, BackendSpec
from ep_core.hookspecs import hookimpl


def _load() -> Backend:
    from ep_backends.transformers.backend import TransformersBackend

    return TransformersBackend()


@hookimpl
def entropyprune_backends() -> list[BackendSpec]:
    """Plain transformers: `model.generate` in this process."""
    return [BackendSpec("transformers", "plain transformers, model.generate", _load)]
