"""The errors of the project: each message says what was wrong and what is allowed."""

from __future__ import annotations


class EntropyPruneError(ValueError):
    """Base of every error that a user's input or setup can cause; always one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class PolicyError(EntropyPruneError):
    """A pruning policy that cannot be read or does not fit the model."""


class BudgetError(PolicyError):
    """A budget that is impossible for a span; the message says what is possible.

    Attributes:
        min_tokens: with this `min_tokens` a policy of the same budget fits the same spans; None
            where the budget fits nothing. Only a reader who sets the policy can use it, so the
            message leaves it to `for_policy`.
    """

    def __init__(self, message: str, min_tokens: int | None = None) -> None:
        super().__init__(message)
        self.min_tokens = min_tokens

    def for_policy(self) -> BudgetError:
        """The same error for a reader who sets the policy, with `min_tokens` as another way out."""
        if self.min_tokens is None:
            return self
        advice = f"; min_tokens={self.min_tokens} leaves spans of so many tokens whole"
        return BudgetError(f"{self}{advice}", self.min_tokens)


class UnsupportedError(EntropyPruneError):
    """A model, engine feature or option that cannot be pruned; the message names it."""


class PluginError(EntropyPruneError):
    """Two plugins that provide the same name, or a name that no plugin provides."""
