"""What one request keeps: its policy, its pictures, and what the engine still has to do for it.

A `RequestPlan` hangs on SGLang's `Req`, and for the forward pass, which sees nothing else of a
request, on its `MultimodalInputs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ep_backends.budgets import ENDS_INSIDE, KEY, LOGPROBS, OFF, keep_of, policy_of
from ep_core.budget import FlopsReduction
from ep_core.errors import UnsupportedError
from ep_core.policy import PruningPolicy
from ep_core.settings import Settings
from ep_core.spans import VisualSpan

SLACK = 2  # SGLang's admission keeps a slot of the pool free, and asks for one more than it needs

HIDDEN_STATES = "the request asks for hidden states"
SESSION = "the request belongs to a session"
VIDEO = "video and audio prompts are not pruned yet"
NOT_FOUND = "SGLang does not say where the pictures are in the prompt"
BEAM = "beam search was never tested with pruning"


@dataclass
class Carried:
    """Tokens of a picture that an earlier chunk brought as far as layer K.

    They wait there until the rest of the picture arrives: its tokens are ranked together.

    Attributes:
        span: the picture.
        stop: prompt position after the last token held here.
        hidden: `[n, d]` hidden states entering layer K.
        positions: `[n]` or `[3, n]` rotary positions.
        queries: `[n, H, D]` query states of layer K-1, or None if the selector reads none.
    """

    span: VisualSpan
    stop: int
    hidden: torch.Tensor
    positions: torch.Tensor
    queries: torch.Tensor | None


@dataclass
class RequestPlan:
    """One request with pictures.

    Attributes:
        spans: its pictures.
        keep: tokens kept of each.
        reason: why nothing is pruned, or None.
        namespace: requests with another one share no prefixes; "" for the server's own policy.
        detailed: the caller wants the kept indices and slot counts.
        info: what `meta_info["entropyprune"]` says.
        carried: the picture that the last chunk ended in.
        released: KV slots of layers >= K that were dropped and are not yet in the free list.
        ready: CUDA event after which `released` is computed, or None.
        cacheable: prompt position behind which nothing goes into the prefix cache, or None.
        private: of the dropped tokens, those whose slots below K the prefix cache does not own.
    """

    spans: Sequence[VisualSpan]
    keep: Sequence[int]
    reason: str | None
    namespace: str
    detailed: bool
    info: dict[str, Any]
    carried: Carried | None = None
    released: list[torch.Tensor] = field(default_factory=list)
    ready: Any = None
    cacheable: int | None = None
    private: int = 0

    def dropped_in(self, stop: int) -> int:
        """Tokens dropped from the pictures that end at or before a prompt position."""
        return sum(
            len(span) - keep
            for span, keep in zip(self.spans, self.keep, strict=True)
            if span.stop <= stop
        )

    def pruned_span_at(self, position: int) -> VisualSpan | None:
        """The picture that loses tokens and has some on both sides of a prompt position."""
        for span, keep in zip(self.spans, self.keep, strict=True):
            if span.start < position < span.stop and keep < len(span):
                return span
        return None


def plan_of(owner: Any) -> RequestPlan | None:
    """The plan of a `Req` or of its `MultimodalInputs`; None for text and for None."""
    return getattr(owner, KEY, None)


def plan_request(req: Any, inputs: Any, settings: Settings) -> RequestPlan:
    """Decide, on host integers alone, what a request keeps.

    Args:
        req: SGLang's `Req`, its prompt expanded.
        inputs: its `MultimodalInputs`.
        settings: the server's.

    Raises:
        PolicyError: `custom_params["entropyprune"]` cannot be read.
        BudgetError: it does not fit a picture, and what would.
    """
    asked = (getattr(req.sampling_params, "custom_params", None) or {}).get(KEY)
    policy, detailed = policy_of(asked, settings.policy)
    spans: list[VisualSpan] = []
    reason = _unpruned_reason(req, policy)
    try:
        spans = spans_of(inputs)
    except UnsupportedError as error:
        reason = reason or str(error)
    prompt = len(req.origin_input_ids)
    if reason is None and not spans:
        reason = NOT_FOUND
    elif reason is None and spans[-1].stop >= prompt:
        reason = ENDS_INSIDE
    namespace = ""
    if reason is not None:
        namespace = "off"
    elif policy != settings.policy:
        assert policy is not None
        namespace = policy.digest
    keep = [len(span) for span in spans]
    if reason is None:
        assert policy is not None
        keep, reason = keep_of(policy, spans, settings, prompt)
    seen = sum(map(len, spans))
    info: dict[str, Any] = {"visual_tokens": seen, "kept": sum(keep)}
    if reason is not None:
        info["reason"] = reason
    return RequestPlan(spans, keep, reason, namespace, detailed, info)


def fit(req: Any, plan: RequestPlan | None, *, slots: int, chunked: bool) -> None:
    """Bound a request by the kept pool: what can never fit would wait for ever.

    While a picture arrives, all of its tokens hold slots; earlier ones hold those they kept. The
    answer is cut to the room that is left, as SGLang does for its own pool.

    Args:
        req: SGLang's `Req`.
        plan: its plan, or None for text.
        slots: size of the kept pool.
        chunked: may a prompt come in chunks? If not, all of its tokens hold slots at once.

    Raises:
        UnsupportedError: the prompt does not fit.
    """
    prompt = len(req.origin_input_ids)
    held = peak = prompt
    if plan is not None and chunked:
        held = prompt - plan.dropped_in(prompt)
        peak = max([held, *(span.stop - plan.dropped_in(span.start) for span in plan.spans)])
    room = slots - SLACK - held
    if peak + SLACK >= slots or room < 1:
        raise UnsupportedError(
            f"a prompt of {prompt} tokens does not fit the {slots} KV slots of the pruned layers; "
            "start the server with a larger --swa-full-tokens-ratio or more KV memory"
        )
    sampling = req.sampling_params
    sampling.max_new_tokens = min(sampling.max_new_tokens, room)
    sampling.min_new_tokens = min(sampling.min_new_tokens, sampling.max_new_tokens)


def spans_of(inputs: Any) -> list[VisualSpan]:
    """Where a request's pictures are, from the offsets that SGLang's processors wrote.

    Raises:
        UnsupportedError: the request holds something else than pictures.
    """
    spans = []
    for item in inputs.mm_items:
        if not item.is_image():
            raise UnsupportedError(VIDEO)
        # inclusive ends
        spans += [VisualSpan(int(a), int(b) + 1) for a, b in item.offsets or ()]
    offsets = getattr(inputs, "image_offsets", None)
    if not spans and offsets is not None:  # models of the older LLaVA code path
        lengths = inputs.image_pad_len
        spans = [VisualSpan(int(a), int(a) + int(n)) for a, n in zip(offsets, lengths, strict=True)]
    return sorted(spans)


def check_budget(policy: PruningPolicy) -> None:
    """Refuse a budget that would make one picture keep different tokens in different prompts.

    Raises:
        UnsupportedError: for `flops`.
    """
    if isinstance(policy.budget, FlopsReduction):
        raise UnsupportedError(
            "flops budgets depend on the length of the question, so requests with the same picture "
            "could not share its prefix; use keep or average, as in keep=128"
        )


def _unpruned_reason(req: Any, policy: PruningPolicy | None) -> str | None:
    if policy is None:
        return OFF
    if req.session is not None:
        return SESSION
    if req.return_hidden_states:
        return HIDDEN_STATES
    if req.beam_group is not None:
        return BEAM
    if req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids):
        return LOGPROBS
    return None
