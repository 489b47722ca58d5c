"""entropyprune core: which visual tokens a vision-language model may drop, whatever the engine."""

from ep_core.budget import DecoderShape, FlopsReduction, Keep, LayerAverage
from ep_core.entropy import matrix_entropy
from ep_core.errors import (
    BudgetError,
    EntropyPruneError,
    PluginError,
    PolicyError,
    UnsupportedError,
)
from ep_core.policy import PruningPolicy
from ep_core.selection import Selector, SpanInputs

__all__ = [
    "BudgetError",
    "DecoderShape",
    "EntropyPruneError",
    "FlopsReduction",
    "Keep",
    "LayerAverage",
    "PluginError",
    "PolicyError",
    "PruningPolicy",
    "Selector",
    "SpanInputs",
    "UnsupportedError",
    "matrix_entropy",
]
