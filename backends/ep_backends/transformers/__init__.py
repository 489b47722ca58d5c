"""Visual-token pruning in plain transformers models.

from ep_backends.transformers import enable

with enable(model, "layer=2,keep=0.25") as pruning:
    model.generate(**inputs)
    print(pruning.records)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ep_backends.transformers.pruning import Pruning, enable

__all__ = ["Pruning", "enable"]


def __getattr__(name: str) -> object:
    # the table of families is read where transformers is not installed
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.pruning"), name)
