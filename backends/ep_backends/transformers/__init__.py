"""Visual-token pruning in plain transformers models.

from ep_backends.transformers import enable

with enable(model, "layer=2,keep=0.25") as pruning:
    model.generate(**inputs)
    print(pruning.records)
"""

from ep_backends.transformers.pruning import Pruning, enable

__all__ = ["Pruning", "enable"]
