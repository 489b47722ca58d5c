"""The errors of the project: each message says what was wrong and what is allowed."""

from __future__ import annotations


class EntropyPruneError(ValueError):
    """Base of every error that a user's input or setup can cause; always one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class PolicyError(EntropyPruneError):
    """A pruning policy that cannot be read or does not fit the model."""


class BudgetError(PolicyError):
    """A budget that is impossible for a span; the message says what is possible."""


class UnsupportedError(EntropyPruneError):
    """A model, engine feature or option that cannot be pruned; the message names it."""


class PluginError(EntropyPruneError):
    """Two plugins that provide the same name, or a name that no plugin provides."""
