"""What a client asks of pruning for its request, and what a server plans for it.

Each engine has a field of its own for it (`docs/sglang.md`, `docs/lmdeploy.md`); its value is read
here: `"off"`, or an object with a budget such as `{"keep": 64}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ep_core.backend import Request
from ep_core.budget import BUDGETS, FlopsReduction
from ep_core.errors import PolicyError, UnsupportedError
from ep_core.family import Config
from ep_core.plan import PlannedUnit, Reason, RequestPlan, Unit
from ep_core.policy import PruningPolicy
from ep_core.settings import Settings

FIELD = "entropyprune"  # of a request, whatever engine it goes to
BUDGET_KEYS = tuple(key for key, budget in BUDGETS.items() if budget is not FlopsReduction)
EXAMPLE = '{"entropyprune": {"keep": 64}}, {"entropyprune": "off"}'


def server_settings(policy: PruningPolicy, config: Config) -> Settings:
    """Settle a policy for a model in a server.

    Args:
        policy: as it was set.
        config: config.json of the checkpoint.

    Raises:
        EntropyPruneError: there is no such family, layer or method, or no server can run it.
    """
    settings = Settings.of(policy, config)
    if "attention" in settings.selector.needs:
        raise UnsupportedError(
            f"method {policy.method!r} reads attention maps, which a server's fused kernels do not "
            "give; use transformers with attn_implementation='eager'"
        )
    return settings


@dataclass(frozen=True)
class Wish:
    """What a request asks of pruning.

    Attributes:
        policy: the policy to prune by, None for no pruning.
        own: did the request choose the budget?
        details: does it want the kept tokens and slot counts? A session of ours asks for them.
    """

    policy: PruningPolicy | None
    own: bool = False
    details: bool = False


def read_wish(asked: Any, server: PruningPolicy, *, details: bool = False) -> Wish:
    """Read the field of a request.

    Args:
        asked: "off", False, an object with a budget, or None for nothing.
        server: the server's policy.
        details: does a session of ours ask, and no client? It may ask for `details`, which make an
            engine wait for its device, and its 1 is one token: no JSON writer made it of 1.0.

    Raises:
        PolicyError: it cannot be read.
    """
    if asked is None:
        return Wish(server)
    if asked is False or asked == "off":
        return Wish(None, own=True)
    if not isinstance(asked, Mapping):
        raise PolicyError(f"entropyprune={asked!r} cannot be read; examples are {EXAMPLE}")
    fields = dict(asked)
    detailed = bool(fields.pop("details", False)) if details else False
    if not fields:
        return Wish(server, details=detailed)
    if unknown := [key for key in fields if key not in BUDGET_KEYS]:
        raise PolicyError(
            f"a request cannot set {unknown[0]!r}, only {', '.join(BUDGET_KEYS)}; examples are "
            f"{EXAMPLE}"
        )
    for key, value in fields.items():
        if value == 1 and not isinstance(value, float | bool) and not details:
            # JSON writers turn 1.0, every token, into 1, one token
            raise PolicyError(
                f"{key}=1 is one token to some JSON writers and every token to others; a share is "
                f'below 1, as in {{"{key}": 0.5}}, and "off" keeps every token'
            )
    kept = {key: value for key, value in server.to_json().items() if key not in BUDGETS}
    return Wish(PruningPolicy.from_json(kept | fields), own=True, details=detailed)


def session_wish(request: Request, pruned: bool) -> Any:
    """What a session's request puts into the field: its budget, and that it wants the details.

    Args:
        request: of `ep_core.backend`.
        pruned: has the engine a policy?

    Raises:
        UnsupportedError: the request has a budget, and the engine no policy.
    """
    if isinstance(request.budget, str):
        return "off" if pruned else None
    if not pruned:
        if request.budget is not None:
            raise UnsupportedError("a request has a budget only where the server has a policy")
        return None
    own = {} if request.budget is None else {request.budget.key: request.budget.value}
    return own | {"details": True}


def plan_prompt(
    settings: Settings, units: Sequence[Unit], wishes: Sequence[Wish], prompt_tokens: int
) -> RequestPlan:
    """Plan a prompt in a server.

    A unit that the server's budget does not fit stays whole: the client did not choose the budget.

    Args:
        settings: the server's.
        units: of the prompt, in order.
        wishes: of each unit.
        prompt_tokens: length of the prompt.

    Raises:
        BudgetError: a budget that the request itself chose does not fit a unit.
    """
    # the last token of the prompt must stay, whatever part of it is planned first
    if not units or units[-1].stop >= prompt_tokens:
        return settings.plan(units, prompt_tokens)
    planned: dict[Unit, PlannedUnit] = {}
    whole: list[Reason] = []
    # units with the same wish together: a budget in FLOPs is one for all of them
    for wish in dict.fromkeys(wishes):
        own = [unit for unit, other in zip(units, wishes, strict=True) if other == wish]
        if wish.policy is None:
            part = RequestPlan.whole(own, prompt_tokens, Reason.OFF)
        else:
            part = settings.plan(own, prompt_tokens, policy=wish.policy, lenient=not wish.own)
        planned |= zip(own, part.units, strict=True)
        whole += [] if part.reason is None else [part.reason]
    return RequestPlan.of(
        [planned[unit] for unit in units], prompt_tokens, next(iter(whole), Reason.KEEPS_ALL)
    )
