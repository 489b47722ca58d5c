"""What a request's pictures keep, decided before LMDeploy's engine sees it.

A request says what it wants beside each picture, in the part of the message that holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ep_backends.lmdeploy.attached import (
    PICTURE_TYPES,
    attach_plan,
    plan_on,
    settings_of,
    wish_in,
)
from ep_backends.lmdeploy.settings import LMDeploySettings
from ep_backends.shared.metrics import Metrics
from ep_backends.shared.requests import FIELD, Wish, plan_prompt, read_wish
from ep_core.errors import EntropyPruneError, PolicyError
from ep_core.family import Placeholder
from ep_core.plan import Reason, RequestPlan, Run, Unprunable

IMAGE = "image"  # the modality of pictures, as LMDeploy names it


async def preprocess(
    original: Callable[..., Any],
    engine: Any,
    messages: Any,
    session_id: Any,
    gen_config: Any = None,
    **kwargs: Any,
) -> Any:
    """Around `AsyncEngine.preprocess`: plan, count, and refuse a budget that does not fit."""
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    try:
        asked = wishes_in(messages)
    except PolicyError as error:
        raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from None
    request = await original(engine, messages, session_id, gen_config=gen_config, **kwargs)
    settings = settings_of(engine)
    pictures = request.inputs.get("multimodal") or []
    try:
        if settings is None:
            if refused := [wish for wish in asked if wish not in (None, False, "off")]:
                raise PolicyError(f"{FIELD}={refused[0]!r}: this server does not prune")
        elif pictures:
            plan = plan_request(settings, request, pictures, asked)
            attach_plan(request.inputs, plan)  # for a session of ours
            if plan.dropped:
                for picture in pictures:
                    attach_plan(picture, plan)
            if metrics := _metrics_of(engine):
                seen = plan.visual_tokens
                metrics.count(seen, seen - plan.dropped, plan.reason)
    except EntropyPruneError as error:
        engine.session_mgr.remove(request.session)
        raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from None
    return request


def plan_of(request: Any) -> RequestPlan | None:
    """The plan of a `PreprocessedRequest`; None without pictures, or where nothing is pruned."""
    return plan_on(request.inputs)


def wishes_in(messages: Any) -> list[Any]:
    """What a request asks of pruning for each picture of its messages, None for nothing.

    Raises:
        PolicyError: it stands elsewhere, where nothing would read it.
    """
    wishes = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = (
            [part for part in content if isinstance(part, Mapping)]
            if isinstance(content, list)
            else []
        )
        wishes += [wish_in(part) for part in parts if part.get("type") in PICTURE_TYPES]
        others = [part for part in parts if part.get("type") not in PICTURE_TYPES]
        if any(isinstance(place, Mapping) and FIELD in place for place in (message, *others)):
            raise PolicyError(f"{FIELD} stands beside a picture, in the same part of the message")
    return wishes


def plan_request(
    settings: LMDeploySettings, request: Any, pictures: Sequence[Mapping[str, Any]], asked: Any
) -> RequestPlan:
    """Plan a request with pictures.

    Args:
        settings: the engine's.
        request: LMDeploy's `PreprocessedRequest`.
        pictures: LMDeploy's inputs for each picture, in the order of the prompt.
        asked: of each, what the client asks; another number of them, all None, where the prompt
            came as tokens.

    Raises:
        PolicyError: a wish cannot be read.
        BudgetError: it does not fit its picture, and what would.
    """
    if len(asked) != len(pictures):
        if any(wish is not None for wish in asked):
            raise PolicyError("video and audio have no budgets yet, so that none can be told apart")
        asked = [None] * len(pictures)
    wishes = [read_wish(one, settings.core.policy, details=settings.details) for one in asked]
    tokens: int = request.input_token_len
    core = settings.core
    try:
        units = core.family.units(core.config, placeholders_of(pictures))
    except Unprunable as error:
        return RequestPlan.whole((), tokens, error.reason, error.detail)
    if (reason := unprunable(request.gen_config)) is not None:
        return RequestPlan.whole(units, tokens, reason)
    of_units: list[Wish] = [wishes[unit.item] for unit in units]
    return plan_prompt(core, units, of_units, tokens)


def placeholders_of(pictures: Sequence[Mapping[str, Any]]) -> list[Placeholder]:
    """Where LMDeploy put each picture, in either form of its preprocessing.

    Models of the older form say where a picture starts and how many tokens it has, those of the
    newer one where it starts and stops.

    Raises:
        Unprunable: an item is no picture.
    """
    placeholders = []
    for picture in pictures:
        place = picture.get("offset")
        if isinstance(place, Sequence) and picture.get("modality") == IMAGE:
            start, stop = place
        elif isinstance(place, int) and "image_tokens" in picture:
            start, stop = place, place + int(picture["image_tokens"])
        else:
            raise Unprunable(Reason.OTHER_MEDIA)
        placeholders.append(Placeholder(Run(start, stop)))
    return placeholders


def unprunable(gen_config: Any) -> Reason | None:
    """Why a request cannot be pruned, whatever its pictures, or None."""
    if gen_config.logprob_start_len >= 0:
        return Reason.PROMPT_LOGPROBS
    return Reason.PERPLEXITY if gen_config.return_ppl else None


def _metrics_of(engine: Any) -> Metrics | None:
    """The server's counters, or None where LMDeploy keeps none."""
    if not engine.stat_loggers:
        return None
    rank = str(engine.backend_config.dp_rank)
    return Metrics({"model_name": engine.model_name, "engine": rank})
