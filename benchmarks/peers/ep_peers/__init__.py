"""Other pruning methods behind entropyprune's hook, so that they are compared in one engine.

Each is written from its paper's formula, as a choice of tokens at the input of layer K. What a
method does beside that choice (merging, recycling, several stages) is left out; its file says so.
"""

from ep_core.hookspecs import hookimpl
from ep_core.selectors import Selector
from ep_peers import baselines, dart, divprune, fastv, max_volume, sparsevlm, visionzip


@hookimpl
def entropyprune_selectors() -> list[Selector]:
    """One selector for each method."""
    return [
        *baselines.SELECTORS,
        fastv.SELECTOR,
        sparsevlm.SELECTOR,
        dart.SELECTOR,
        divprune.SELECTOR,
        max_volume.SELECTOR,
        visionzip.SELECTOR,
    ]
