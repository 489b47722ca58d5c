"""What a request's pictures keep, decided before LMDeploy's engine sees it.

A request says what it wants beside each picture, in the part of the message that holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ep_backends.budgets import ENDS_INSIDE, KEY, LOGPROBS, OFF, keep_of, policy_of
from ep_backends.lmdeploy.kv import PicturePlan, kv_ratio
from ep_backends.shared.metrics import Metrics
from ep_core.errors import EntropyPruneError, PolicyError
from ep_core.settings import Settings
from ep_core.spans import VisualSpan

PERPLEXITY = "the request asks for the perplexity of its prompt"
OTHER_MEDIA = "video and audio prompts are not pruned yet"

PICTURE_TYPES = ("image", "image_url", "image_data")  # of a message's parts


async def plan_request(
    original: Callable[..., Any],
    engine: Any,
    messages: Any,
    session_id: Any,
    gen_config: Any = None,
    **kwargs: Any,
) -> Any:
    """Around `AsyncEngine.preprocess`: decide, count, and refuse a budget that does not fit."""
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    try:
        wishes = wishes_of(messages)
    except PolicyError as error:
        raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from None
    request = await original(engine, messages, session_id, gen_config=gen_config, **kwargs)
    settings: Settings | None = getattr(engine, KEY, None)
    pictures = request.inputs.get("multimodal") or []
    try:
        if settings is None:
            if asked := [wish for wish in wishes if wish not in (None, False, "off")]:
                raise PolicyError(f"entropyprune={asked[0]!r}: this server does not prune")
        elif pictures:
            reason = unprunable(request.gen_config)
            reason = decide(pictures, wishes, settings, request.input_token_len, reason)
            request.inputs[KEY] = reason
            if metrics := _metrics_of(engine):
                tokens = [int(picture.get("image_tokens", 0)) for picture in pictures]
                kept = [
                    picture[KEY].keep if KEY in picture else count
                    for picture, count in zip(pictures, tokens, strict=True)
                ]
                metrics.count(sum(tokens), sum(kept), reason)
    except EntropyPruneError as error:
        engine.session_mgr.remove(request.session)
        raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from None
    return request


def wishes_of(messages: Any) -> list[Any]:
    """What a request asks of pruning for each picture of its messages, None for nothing.

    Raises:
        PolicyError: it stands elsewhere, where nobody would read it.
    """
    wishes = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = (
            [part for part in content if isinstance(part, Mapping)]
            if isinstance(content, list)
            else []
        )
        for part in parts:
            kind = part.get("type")
            if kind in PICTURE_TYPES:
                inner = part.get(kind)
                asked = inner.get(KEY) if isinstance(inner, Mapping) else None
                wishes.append(part.get(KEY, asked))
        others = [part for part in parts if part.get("type") not in PICTURE_TYPES]
        if any(isinstance(place, Mapping) and KEY in place for place in (message, *others)):
            raise PolicyError(f"{KEY} stands beside a picture, in the same part of the message")
    return wishes


def unprunable(gen_config: Any) -> str | None:
    """Why a request cannot be pruned, whatever its pictures, or None."""
    if gen_config.logprob_start_len >= 0:
        return LOGPROBS
    return PERPLEXITY if gen_config.return_ppl else None


def decide(
    pictures: Sequence[dict[str, Any]],
    wishes: Sequence[Any],
    settings: Settings,
    prompt_tokens: int,
    reason: str | None = None,
) -> str | None:
    """Write a `PicturePlan` into each picture that loses tokens.

    Args:
        pictures: LMDeploy's inputs for each picture, in the order of the prompt.
        wishes: of each; another number of them, all None, where the prompt came as tokens.
        settings: the server's.
        prompt_tokens: length of the prompt.
        reason: why nothing can be pruned, or None.

    Returns:
        why nothing is pruned, or None.

    Raises:
        PolicyError: a wish cannot be read.
        BudgetError: it does not fit its picture, and what would.
    """
    if len(wishes) != len(pictures):
        if any(wish is not None for wish in wishes):
            raise PolicyError("video and audio have no budgets yet, so that none can be told apart")
        wishes = [None] * len(pictures)
    policies = [policy_of(wish, settings.policy) for wish in wishes]
    if not all("image_tokens" in picture for picture in pictures):
        reason = reason or OTHER_MEDIA
    if reason is not None:
        return reason
    spans = [
        VisualSpan(picture["offset"], picture["offset"] + int(picture["image_tokens"]))
        for picture in pictures
    ]
    if spans[-1].stop >= prompt_tokens:
        return ENDS_INSIDE
    ratio = kv_ratio(settings.policy, settings.shape.layers)
    reasons = []
    # pictures with the same budget together: one in FLOPs is for all of them
    for policy in dict.fromkeys(policy for policy, _ in policies):
        own = [i for i, (other, _) in enumerate(policies) if other == policy]
        if policy is None:
            reasons.append(OFF)
            continue
        group = [spans[i] for i in own]
        keep, why = keep_of(policy, group, settings, prompt_tokens)
        reasons += [] if why is None else [why]
        for i, kept in zip(own, keep, strict=True):
            if kept < len(spans[i]):
                pictures[i][KEY] = PicturePlan(kept, ratio, detailed=policies[i][1])
    return None if any(KEY in picture for picture in pictures) else reasons[0]


def _metrics_of(engine: Any) -> Metrics | None:
    """The server's counters, or None where LMDeploy keeps none."""
    if not engine.stat_loggers:
        return None
    rank = str(engine.backend_config.dp_rank)
    return Metrics({"model_name": engine.model_name, "engine": rank})
