"""The policy of one engine on its way to the engine's processes, and what it settles there.

Once an engine is started, its policy has one carrier: `hf_overrides`, which LMDeploy hands to every
process of the engine and writes into the model's configuration. The environment and `activate` are
read before, once (`plugin.policy_for`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ep_backends.shared.capacity import TEXT_CAPACITY_LOSS
from ep_backends.shared.requests import FIELD, server_settings
from ep_core.budget import Keep
from ep_core.family import Config
from ep_core.policy import PruningPolicy
from ep_core.settings import Settings


@dataclass(frozen=True)
class LMDeploySettings:
    """What pruning needs to know of one engine: settled once in each of its processes.

    Attributes:
        core: the policy settled for the model.
        details: do workers tell which tokens stayed? For sessions of ours.
    """

    core: Settings
    details: bool = False

    @classmethod
    def of(
        cls, policy: PruningPolicy, config: Config, *, details: bool = False
    ) -> LMDeploySettings:
        """Settle a policy for a model.

        Args:
            policy: as it was set.
            config: config.json of the checkpoint.
            details: as above.

        Raises:
            EntropyPruneError: there is no such family, layer or method, or no server can run it.
        """
        return cls(server_settings(policy, config), details)

    @cached_property
    def ratio(self) -> int:
        """Tokens of a KV block in layers < K for each of its tokens in layers >= K.

        A ratio r makes a block `(L - K + r K) / L` times as large, which is what text-only requests
        lose. r is the largest that keeps this loss within `TEXT_CAPACITY_LOSS`, at least 2, and not
        more than a fraction that is kept anyway can use.
        """
        layer, layers, budget = self.core.layer, self.core.shape.layers, self.core.policy.budget
        ratio = math.floor(1 + TEXT_CAPACITY_LOSS / (1 - TEXT_CAPACITY_LOSS) * layers / layer)
        if isinstance(budget, Keep) and isinstance(budget.value, float):
            ratio = min(ratio, math.ceil(1 / budget.value))
        return max(2, ratio)


class EnginePolicy(str):
    """What was decided for one engine: its policy as text, or "" for no pruning.

    It travels in the engine's `hf_overrides`. A process that unpickles a policy is activated by
    that before it starts anything, even if it imports nothing of ours. A text, because LMDeploy
    logs these values and transformers writes them as JSON.

    Attributes:
        details: see `LMDeploySettings`.
    """

    details: bool
    _settings: LMDeploySettings | None

    def __new__(cls, policy: PruningPolicy | str, *, details: bool = False) -> EnginePolicy:
        """Make one of a policy or its text."""
        made = super().__new__(cls, str(policy))
        made.details, made._settings = details, None
        return made

    def settle(self, hf_config: Any) -> LMDeploySettings:
        """The settings of the engine, made when they are first asked for.

        Args:
            hf_config: the checkpoint's configuration, overrides included.
        """
        if self._settings is None:
            policy = PruningPolicy.parse(str(self))
            self._settings = LMDeploySettings.of(policy, hf_config.to_dict(), details=self.details)
        return self._settings

    def __deepcopy__(self, memo: Any) -> EnginePolicy:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (str(self), self.details)


def _unpickle(policy: str, details: bool) -> EnginePolicy:
    from ep_backends.lmdeploy.plugin import activate

    if policy:
        activate()
    return EnginePolicy(policy, details=details)


def settings_in(hf_config: Any) -> LMDeploySettings | None:
    """The settings of an engine, in any of its processes; None for one that does not prune.

    Args:
        hf_config: the configuration that LMDeploy gives to the process.
    """
    policy = getattr(hf_config, FIELD, None)
    return policy.settle(hf_config) if isinstance(policy, EnginePolicy) and policy else None
