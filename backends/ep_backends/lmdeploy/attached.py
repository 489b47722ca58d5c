"""What pruning hangs on LMDeploy's objects, each under a name of its own.

A request's way: the client's wish stands beside a picture in its message (`wish_in`); the plan of
the prompt goes with LMDeploy's record of each picture into the engine (`plan_on`); what a sequence
has behind it is carried from pass to pass (`state_in`); one forward pass has its `Step`
(`step_of`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ep_backends.shared.requests import FIELD
from ep_core.compaction import PassUnit
from ep_core.errors import EntropyPruneError
from ep_core.plan import RequestPlan

if TYPE_CHECKING:
    from ep_backends.lmdeploy.prefill import Step
    from ep_backends.lmdeploy.settings import LMDeploySettings

PLAN = "entropyprune_plan"
STATE = "entropyprune_state"
STEP = "entropyprune_step"
SETTINGS = "entropyprune_settings"

PICTURE_TYPES = ("image", "image_url", "image_data")  # of a message's parts


@dataclass(frozen=True)
class SequenceState:
    """What a sequence has behind it; LMDeploy's `model_metas` carry it from pass to pass.

    Attributes:
        plan: of its prompt, from its first picture that loses tokens on.
        passes: of prefill that it took so far.
        ranked: its units that lost tokens, or which of their tokens stayed, for a session that asks
            for the details; else empty.
    """

    plan: RequestPlan | None = None
    passes: int = 0
    ranked: tuple[PassUnit | list[int], ...] = ()

    @property
    def dropped(self) -> int:
        """Tokens that layers >= K do not hold once the prompt is prefilled."""
        return 0 if self.plan is None else self.plan.dropped

    def kept(self) -> list[list[int]]:
        """Of each unit in `ranked`, the indices of the tokens that stayed; reads the device."""
        return [unit if isinstance(unit, list) else unit.chosen.tolist() for unit in self.ranked]

    def __reduce__(self) -> tuple[Any, ...]:
        # no tensor of a device goes to a process that has none
        return SequenceState, (self.plan, self.passes, tuple(self.kept()))


def wish_in(part: Mapping[str, Any]) -> Any:
    """What a client asks of pruning in a part of a message, beside a picture or in it, or None."""
    picture = part.get(part.get("type", ""))
    inside = picture.get(FIELD) if isinstance(picture, Mapping) else None
    return part.get(FIELD, inside)


def attach_plan(picture: dict[str, Any], plan: RequestPlan) -> None:
    """Hang the plan of a prompt on one of its pictures: on its inputs, or on its `meta` later."""
    picture[PLAN] = plan


def plan_on(picture: Mapping[str, Any] | None) -> RequestPlan | None:
    """The plan that `attach_plan` hung there, or None."""
    plan: RequestPlan | None = (picture or {}).get(PLAN)
    return plan


def plan_among(multimodals: Mapping[str, Iterable[Any]] | None) -> RequestPlan | None:
    """The plan of a sequence, from its `MultiModalData` by kind: each of them has it.

    Raises:
        EntropyPruneError: the plan does not speak of the picture that it hangs on.
    """
    for picture in (each for data in (multimodals or {}).values() for each in data):
        plan = plan_on(picture.meta)
        if plan is None:
            continue
        if not any(picture.start <= one.unit.start < picture.end for one in plan.units):
            raise EntropyPruneError(
                f"LMDeploy moved a picture to [{picture.start}, {picture.end}) after its prompt "
                "was planned; please report it"
            )
        return plan
    return None


def state_in(model_meta: Mapping[str, Any] | None) -> SequenceState:
    """The state of a sequence; of a new one where LMDeploy has none."""
    state: SequenceState = (model_meta or {}).get(STATE) or SequenceState()
    return state


def step_of(context: Any) -> Step:
    """The pass that LMDeploy's `StepContext` stands for.

    Raises:
        EntropyPruneError: LMDeploy computes a pass that it did not announce.
    """
    step: Step | None = getattr(context, STEP, None)
    if step is None:
        raise EntropyPruneError(
            "LMDeploy runs the model without update_model_metas before; please report it"
        )
    return step


def settings_of(engine: Any) -> LMDeploySettings | None:
    """The settings of an `AsyncEngine`, or None for one that does not prune."""
    settings: LMDeploySettings | None = getattr(engine, SETTINGS, None)
    return settings
