"""Visual-token pruning inside the engines that people already run.

import entropyprune

with entropyprune.enable(model, "layer=2,keep=0.25") as pruning:
    model.generate(**inputs)
    print(pruning.records)

The command line is `python -m entropyprune`. Importing this module imports no engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ep_backends.transformers import Pruning, enable
    from ep_core import EntropyPruneError, PruningPolicy

__version__ = "0.1.0"

__all__ = ["EntropyPruneError", "Pruning", "PruningPolicy", "__version__", "enable"]

_HOMES = {
    "EntropyPruneError": "ep_core",
    "Pruning": "ep_backends.transformers",
    "PruningPolicy": "ep_core",
    "enable": "ep_backends.transformers",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            f"{__name__}.{name} needs transformers; run pip install '{__name__}[transformers]'"
        ) from None


def __dir__() -> list[str]:
    return __all__
