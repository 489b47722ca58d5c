"""What the pictures of one request keep: host integers, decided before anything is computed.

Shared by the backends of engines that serve. A request may set its own budget or switch pruning
off, in whatever field its engine has for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ep_core.backend import Request
from ep_core.budget import BUDGETS, FlopsReduction
from ep_core.errors import BudgetError, PolicyError, UnsupportedError
from ep_core.family import Config
from ep_core.policy import PruningPolicy
from ep_core.settings import Settings
from ep_core.spans import VisualSpan, plan

KEY = "entropyprune"  # in requests, answers, and the names of attributes
BUDGET_KEYS = [key for key, budget in BUDGETS.items() if budget is not FlopsReduction]
EXAMPLE = '{"entropyprune": {"keep": 64}}, {"entropyprune": "off"}'

OFF = "switched off by the request"
LOGPROBS = "the request asks for logprobs of its prompt"
ENDS_INSIDE = "the prompt ends inside a picture, and its last token must stay"
KEEPS_ALL = "the budget keeps every token"
DOES_NOT_FIT = "the server's budget does not fit the picture"


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


def wish_of(request: Request, pruned: bool) -> Any:
    """What a session's request asks for, as `policy_of` reads it: its budget, and the details.

    Args:
        request: of `ep_core.backend`.
        pruned: has the server a policy?

    Raises:
        UnsupportedError: it has a budget, and the server no policy.
    """
    if isinstance(request.budget, str):
        return "off" if pruned else None
    if not pruned:
        if request.budget is not None:
            raise UnsupportedError("a request has a budget only where the server has a policy")
        return None
    own = {} if request.budget is None else {request.budget.key: request.budget.value}
    return own | {"details": True}


def policy_of(asked: Any, server: PruningPolicy) -> tuple[PruningPolicy | None, bool]:
    """The policy that a request asks for, None for none, and whether it wants the details.

    Args:
        asked: "off", False, an object with a budget, `details` or both, or None for nothing.
        server: the server's policy.

    Raises:
        PolicyError: it cannot be read.
    """
    if asked is None:
        return server, False
    if asked in ("off", False):
        return None, False
    if not isinstance(asked, Mapping):
        raise PolicyError(f"entropyprune={asked!r} cannot be read; examples are {EXAMPLE}")
    fields = dict(asked)
    detailed = fields.pop("details", False)
    if not isinstance(detailed, bool):
        raise PolicyError(f"details={detailed!r} is not allowed; use true or false")
    if not fields:
        return server, detailed
    if unknown := [key for key in fields if key not in BUDGET_KEYS]:
        raise PolicyError(
            f"a request cannot set {unknown[0]!r}, only {', '.join(BUDGET_KEYS)} and details; "
            f"examples are {EXAMPLE}"
        )
    kept = {key: value for key, value in server.to_json().items() if key not in BUDGETS}
    return PruningPolicy.from_json(kept | fields), detailed


def keep_of(
    policy: PruningPolicy, spans: Sequence[VisualSpan], settings: Settings, prompt_tokens: int
) -> tuple[list[int], str | None]:
    """Tokens kept of each picture, and why nothing is dropped, or None.

    A picture that the server's budget does not fit, as keep=128 does not fit one of 64 tokens,
    stays whole: who asks about it did not choose the budget.

    Args:
        policy: the server's, or one that the request asks for.
        spans: the pictures, at least one.
        settings: the server's.
        prompt_tokens: length of the prompt.

    Raises:
        BudgetError: a budget that the request itself chose does not fit.
    """
    # each picture by itself, so that one that does not fit does not switch off the others
    joint = isinstance(policy.budget, FlopsReduction)
    keep: list[int] = []
    fits = True
    for group in [spans] if joint else [[span] for span in spans]:
        try:
            keep += plan(
                policy,
                group,
                layer=settings.layer,
                shape=settings.shape,
                prompt_tokens=prompt_tokens,
            )
        except BudgetError:
            if policy != settings.policy:
                raise
            keep += map(len, group)
            fits = False
    if sum(keep) < sum(map(len, spans)):
        return keep, None
    return keep, KEEPS_ALL if fits else DOES_NOT_FIT
