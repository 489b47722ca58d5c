"""Registers the backends that ship with entropyprune; imports none of their engines."""

from __future__ import annotations

from ep_backends.lmdeploy import families as lmdeploy
from ep_backends.sglang import families as sglang
from ep_backends.transformers import families as transformers
from ep_core.backend import Backend, BackendSpec
from ep_core.hookspecs import hookimpl


def _transformers() -> Backend:
    from ep_backends.transformers.backend import TransformersBackend

    return TransformersBackend()


def _sglang() -> Backend:
    from importlib.metadata import version

    version("sglang")  # PackageNotFoundError is an ImportError
    from ep_backends.sglang.backend import SGLangBackend

    return SGLangBackend()


def _lmdeploy() -> Backend:
    from importlib.metadata import version

    version("lmdeploy")  # as above
    from ep_backends.lmdeploy.backend import LMDeployBackend

    return LMDeployBackend()


@hookimpl
def entropyprune_backends() -> list[BackendSpec]:
    """One specification for each engine."""
    return [
        BackendSpec(
            "lmdeploy",
            "LMDeploy's PyTorch engine, pipeline and server",
            _lmdeploy,
            {name: family.works for name, family in lmdeploy.FAMILIES.items()},
        ),
        BackendSpec(
            "sglang",
            "SGLang, offline engine and server",
            _sglang,
            {name: family.works for name, family in sglang.FAMILIES.items()},
        ),
        BackendSpec(
            "transformers",
            "plain transformers, model.generate",
            _transformers,
            transformers.FAMILIES,
        ),
    ]
