"""What one request keeps: its policy, its pictures, and what the engine still has to do for it.

A `RequestPlan` hangs on SGLang's `Req`, and for the forward pass, which sees nothing else of a
request, on its `MultimodalInputs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ep_core.adapter import ModelAdapter
from ep_core.budget import BUDGETS, DecoderShape, FlopsReduction
from ep_core.errors import BudgetError, PolicyError, UnsupportedError
from ep_core.policy import PruningPolicy
from ep_core.selectors import Selector
from ep_core.spans import VisualSpan, plan

BUDGET_KEYS = [key for key, budget in BUDGETS.items() if budget is not FlopsReduction]
KEY = "entropyprune"  # in custom_params, meta_info, and the name of the attribute
EXAMPLE = '{"entropyprune": {"keep": 64}}, {"entropyprune": "off"}'

SLACK = 2  # SGLang's admission keeps a slot of the pool free, and asks for one more than it needs

OFF = "switched off by the request"
LOGPROBS = "the request asks for logprobs of its prompt"
HIDDEN_STATES = "the request asks for hidden states"
SESSION = "the request belongs to a session"
VIDEO = "video and audio prompts are not pruned yet"
NOT_FOUND = "SGLang does not say where the pictures are in the prompt"
ENDS_INSIDE = "the prompt ends inside a picture, and its last token must stay"
KEEPS_ALL = "the budget keeps every token"
DOES_NOT_FIT = "the server's budget does not fit the picture"
BEAM = "beam search was never tested with pruning"


@dataclass(frozen=True)
class Settings:
    """What pruning needs to know of the server.

    Attributes:
        policy: the server's policy, its layer settled.
        adapter: of the model's family.
        shape: sizes of the language model.
        selector: the policy's method.
    """

    policy: PruningPolicy
    adapter: ModelAdapter
    shape: DecoderShape
    selector: Selector

    @property
    def layer(self) -> int:
        """The first layer that sees the kept tokens only."""
        assert isinstance(self.policy.layer, int)
        return self.policy.layer


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
    policy, detailed = _policy_of(asked, settings.policy)
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
    if reason is None:
        assert policy is not None
        keep, fits = _keep(policy, spans, settings, prompt)
    else:
        keep, fits = [len(span) for span in spans], True
    namespace = ""
    if reason is not None:
        namespace = "off"
    elif policy != settings.policy:
        assert policy is not None
        namespace = policy.digest
    dropped = sum(map(len, spans)) - sum(keep)
    if reason is None and not dropped:
        reason = KEEPS_ALL if fits else DOES_NOT_FIT
    seen = sum(map(len, spans))
    info: dict[str, Any] = {"visual_tokens": seen, "kept": seen - dropped}
    if reason is not None:
        info["reason"] = reason
    return RequestPlan(spans, keep, reason, namespace, detailed, info)


def _keep(
    policy: PruningPolicy, spans: Sequence[VisualSpan], settings: Settings, prompt: int
) -> tuple[list[int], bool]:
    """Tokens kept of each picture, and whether the budget fits all of them.

    A picture that the server's budget does not fit, as keep=128 does not fit one of 64 tokens,
    stays whole: who asks about it did not choose the budget.

    Raises:
        BudgetError: a budget that the request itself chose does not fit.
    """
    keep: list[int] = []
    fits = True
    for span in spans:
        try:
            keep += plan(
                policy, [span], layer=settings.layer, shape=settings.shape, prompt_tokens=prompt
            )
        except BudgetError:
            if policy != settings.policy:
                raise
            keep.append(len(span))
            fits = False
    return keep, fits


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


def _policy_of(asked: Any, server: PruningPolicy) -> tuple[PruningPolicy | None, bool]:
    """The request's policy, None for none, and whether it wants the details."""
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
