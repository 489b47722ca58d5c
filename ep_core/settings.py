"""What pruning needs to know of one loaded model: settled once a process, read everywhere in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ep_core.budget import DecoderShape, FlopsReduction
from ep_core.errors import BudgetError, PolicyError, UnsupportedError
from ep_core.family import FULL_ATTENTION, Config, Decoder, Family
from ep_core.plan import PlannedUnit, Reason, RequestPlan, Unit
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy
from ep_core.selection import Selector


@dataclass(frozen=True)
class Settings:
    """A policy settled for a model.

    Attributes:
        policy: its layer is a number.
        family: of the model.
        decoder: its language model.
        selector: the policy's method.
        config: config.json of the checkpoint.
    """

    policy: PruningPolicy
    family: Family
    decoder: Decoder
    selector: Selector
    config: Config

    @classmethod
    def of(cls, policy: PruningPolicy, config: Config) -> Settings:
        """Settle a policy for a model.

        Args:
            policy: as it was set.
            config: config.json of the checkpoint.

        Raises:
            EntropyPruneError: there is no such family, layer or method, or the decoder has layers
                that no engine prunes.
        """
        family = registry().family(config["model_type"])
        decoder = family.decoder(config)
        if other := decoder.layer_kinds - {FULL_ATTENTION}:
            raise UnsupportedError(
                f"a decoder with {', '.join(sorted(other))} is not supported; supported is "
                f"{FULL_ATTENTION} in every layer"
            )
        policy = policy.at_layer(family.default_layer, decoder.shape.layers)
        settings = cls(policy, family, decoder, registry().selector(policy.method), config)
        least = 1 + max(decoder.adds_after, default=-1)
        if settings.layer < least:
            raise PolicyError(
                f"layer={settings.layer} does not work for {family.name}, which adds features of "
                f"its pictures up to the input of layer {least}; use layer={least} or more, or auto"
            )
        return settings

    @property
    def layer(self) -> int:
        """K, the first layer that sees the kept tokens only."""
        return int(self.policy.layer)

    @property
    def shape(self) -> DecoderShape:
        """Sizes of the language model."""
        return self.decoder.shape

    def plan(
        self,
        units: Sequence[Unit],
        prompt_tokens: int,
        *,
        policy: PruningPolicy | None = None,
        lenient: bool = False,
    ) -> RequestPlan:
        """Plan a prompt.

        Args:
            units: the prompt's, in order.
            prompt_tokens: length of the prompt.
            policy: another one than the server's, with the server's layer.
            lenient: a unit that the budget does not fit, as keep=128 does not fit one of 64 tokens,
                stays whole and does not switch off the others. For prompts of people who did not
                choose the budget.

        Raises:
            BudgetError: the budget does not fit a unit, and what would.
        """
        mine = policy is None
        policy = policy or self.policy
        if not units:
            return RequestPlan.whole((), prompt_tokens, Reason.NO_PICTURES)
        if units[-1].stop >= prompt_tokens:
            return RequestPlan.whole(units, prompt_tokens, Reason.ENDS_INSIDE)
        # a budget in FLOPs is one for all units; an error speaks of all that it does not fit
        joint = not lenient or isinstance(policy.budget, FlopsReduction)
        planned: list[PlannedUnit] = []
        fits = True
        for group in [units] if joint else [[unit] for unit in units]:
            try:
                counts = self.counts(group, prompt_tokens, policy)
            except BudgetError as error:
                if not lenient:
                    raise error.for_policy() if mine else error from None
                counts, fits = [len(unit) for unit in group], False
            planned += [PlannedUnit(*pair) for pair in zip(group, counts, strict=True)]
        whole = Reason.KEEPS_ALL if fits else Reason.DOES_NOT_FIT
        return RequestPlan.of(planned, prompt_tokens, whole)

    def counts(
        self, units: Sequence[Unit], prompt_tokens: int, policy: PruningPolicy | None = None
    ) -> list[int]:
        """Tokens kept of each unit by its budget; those of at most `min_tokens` stay whole.

        Args:
            units: the prompt's, in order.
            prompt_tokens: length of the prompt.
            policy: another one than the server's, with the server's layer.

        Raises:
            BudgetError: the budget does not fit a unit, and what would.
        """
        policy = policy or self.policy
        lengths = [len(unit) for unit in units]
        large = [n for n in lengths if n > policy.min_tokens]
        counts = policy.budget.tokens(
            large, layer=self.layer, shape=self.shape, other_tokens=prompt_tokens - sum(large)
        )
        given = iter(counts)
        return [next(given) if n > policy.min_tokens else n for n in lengths]
