"""One request in SGLang's scheduler: what its prompt keeps, and what is still to be done for it.

A `SGLangRequest` hangs on SGLang's `Req` from the moment when the request is admitted. Forward
passes find it there: see `batch.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ep_backends.shared.metrics import Metrics
from ep_backends.shared.requests import FIELD, Wish, plan_prompt, read_wish
from ep_core.budget import FlopsReduction
from ep_core.compaction import Waiting
from ep_core.errors import EntropyPruneError, UnsupportedError
from ep_core.family import Placeholder
from ep_core.plan import Reason, RequestPlan, Run, Unprunable
from ep_core.policy import PruningPolicy
from ep_core.report import SpanRecord
from ep_core.settings import Settings

SLACK = 2  # SGLang's admission keeps a slot of the pool free, and asks for one more than it needs
_ATTRIBUTE = "_entropyprune_request"
# reasons that any prompt with the same pictures has under the same policy
_OF_THE_PICTURES = (None, Reason.KEEPS_ALL, Reason.DOES_NOT_FIT)


@dataclass
class DroppedSlots:
    """Slots of the kept pool that forward passes dropped and that are in no free list yet."""

    _parts: list[torch.Tensor] = field(default_factory=list)
    _known: Any = None  # CUDA event after which all of them are computed

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, slots: torch.Tensor) -> None:
        """Take slots over from the forward pass that is running."""
        self._parts.append(slots)
        if slots.is_cuda:
            self._known = torch.cuda.current_stream().record_event()

    def take(self) -> torch.Tensor:
        """Hand all of them to the current stream, `[n]`; at least one was added."""
        if self._known is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._known)
            for part in self._parts:
                # its memory is the forward stream's: it must not be used again before this reads it
                part.record_stream(stream)
        slots = torch.cat(self._parts)
        self._parts.clear()
        return slots


@dataclass(eq=False)
class SGLangRequest:
    """One request with pictures.

    Attributes:
        plan: what its prompt keeps.
        namespace: requests with another one share no cached prefixes; "" for the server's policy.
        details: does it want the kept tokens and slot counts?
        waiting: the beginning of a unit that its last chunk ended in; written by `prefill.py`.
        dropped: filled by `prefill.py`, emptied by `kv.py`.
        cacheable: prompt position behind which nothing goes into the prefix cache, or None; written
            by `kv.py` at each look into the cache.
        chunks: passes that its prompt has taken so far; counted by `kv.py` for the details.
        described: are the details in its answer?
    """

    plan: RequestPlan
    namespace: str = ""
    details: bool = False
    waiting: Waiting | None = None
    dropped: DroppedSlots = field(default_factory=DroppedSlots)
    cacheable: int | None = None
    chunks: int = 0
    described: bool = False

    def report(self) -> dict[str, Any]:
        """What `meta_info["entropyprune"]` says of every request."""
        seen = self.plan.visual_tokens
        why = {} if self.plan.why is None else {"reason": self.plan.why}
        return {"visual_tokens": seen, "kept": seen - self.plan.dropped} | why

    def detailed_report(
        self, spans: Sequence[SpanRecord], below: int, from_layer: int
    ) -> dict[str, Any]:
        """The report with the details.

        Args:
            spans: each picture and what was kept of it.
            below: slots that the prompt holds in each layer < K.
            from_layer: those in each layer >= K.
        """
        return self.report() | {
            "chunks": self.chunks,
            "spans": [span.to_json() for span in spans],
            "kv": {"below": below, "from": from_layer},
        }


def request_of(req: Any) -> SGLangRequest | None:
    """What was decided about SGLang's `Req`; None for text alone, and for no request at all."""
    found: SGLangRequest | None = getattr(req, _ATTRIBUTE, None)
    return found


def publish(req: Any, report: Mapping[str, Any]) -> None:
    """Let the request's answer say this in `meta_info["entropyprune"]`."""
    # a list, because that is what SGLang's request-level values are
    req.customized_info = (req.customized_info or {}) | {FIELD: [dict(report)]}


def plan_request(req: Any, inputs: Any, settings: Settings, *, details: bool) -> SGLangRequest:
    """Decide, on host integers alone, what a request keeps.

    Args:
        req: SGLang's `Req`, its prompt expanded.
        inputs: its `MultimodalInputs`.
        settings: the server's.
        details: may a request ask for details?

    Raises:
        PolicyError: `custom_params["entropyprune"]` cannot be read.
        BudgetError: a budget of its own does not fit a picture, and what would.
    """
    custom = req.sampling_params.custom_params or {}
    wish = read_wish(custom.get(FIELD), settings.policy, details=details)
    tokens = len(req.origin_input_ids)
    reason = Reason.OFF if wish.policy is None else _reason_of_the_request(req)
    try:
        units = settings.family.units(settings.config, placeholders(inputs))
        reason = reason or (None if units else Reason.NOT_FOUND)
    except Unprunable as error:
        units, reason = [], reason or error.reason
    if reason is None:
        plan = plan_prompt(settings, units, [wish] * len(units), tokens)
    else:
        plan = RequestPlan.whole(units, tokens, reason)
    return SGLangRequest(plan, _namespace(plan, wish, settings.policy), wish.details)


def placeholders(inputs: Any) -> list[Placeholder]:
    """Where SGLang's processors put a request's pictures into its prompt, in order.

    Raises:
        Unprunable: the request holds something else than pictures.
    """
    runs: list[Run] = []
    for item in inputs.mm_items:
        if not item.is_image():
            raise Unprunable(Reason.OTHER_MEDIA)
        # inclusive ends
        runs += [Run(int(first), int(last) + 1) for first, last in item.offsets or ()]
    offsets = getattr(inputs, "image_offsets", None)
    if not runs and offsets is not None:  # models of the older LLaVA code path
        lengths = inputs.image_pad_len
        runs = [Run(int(a), int(a) + int(n)) for a, n in zip(offsets, lengths, strict=True)]
    return [Placeholder(run) for run in sorted(runs)]


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


def fit(req: Any, plan: RequestPlan | None, *, slots: int, chunked: bool) -> None:
    """Bound a request by the kept pool: what can never fit would wait for ever.

    While a picture arrives, all of its tokens hold slots; earlier pictures hold what they keep. The
    answer is cut to the room that is left, as SGLang does for its own pool.

    Args:
        req: SGLang's `Req`.
        plan: of its prompt, or None for text.
        slots: size of the kept pool.
        chunked: may a prompt come in chunks? If not, all of its tokens hold slots at once.

    Raises:
        UnsupportedError: the prompt does not fit.
    """
    tokens = len(req.origin_input_ids)
    held = peak = tokens
    if plan is not None and chunked:
        held = tokens - plan.dropped
        units = (planned.unit for planned in plan.units)
        peak = max([held, *(unit.stop - plan.dropped_before(unit.start) for unit in units)])
    room = slots - SLACK - held
    if peak + SLACK >= slots or room < 1:
        raise UnsupportedError(
            f"a prompt of {tokens} tokens does not fit the {slots} KV slots of the pruned layers; "
            "start the server with a larger --swa-full-tokens-ratio or more KV memory"
        )
    sampling = req.sampling_params
    sampling.max_new_tokens = min(sampling.max_new_tokens, room)
    sampling.min_new_tokens = min(sampling.min_new_tokens, sampling.max_new_tokens)


# Hooks in the scheduler.


def admit(
    original: Callable[..., None], scheduler: Any, req: Any, is_retracted: bool = False
) -> None:
    """Around `Scheduler._add_request_to_queue`: plan a request before it looks for a prefix."""
    if not is_retracted and req.to_finish is None:
        try:
            _admit(scheduler, req)
        except EntropyPruneError as error:
            setattr(req, _ATTRIBUTE, None)
            req.set_finish_with_abort(str(error))
    original(scheduler, req, is_retracted)


def _admit(scheduler: Any, req: Any) -> None:
    from ep_backends.sglang.arguments import orders
    from ep_backends.sglang.plugin import settings_of

    request = request_of(req)
    planned = request is None and req.multimodal_inputs is not None
    if planned:
        request = plan_request(
            req,
            req.multimodal_inputs,
            settings_of(scheduler.model_config),
            details=orders().details,
        )
        setattr(req, _ATTRIBUTE, request)
        if request.namespace:
            req.extra_key = f"{req.extra_key or ''}|{FIELD}:{request.namespace}"
        publish(req, request.report())
    chunked = scheduler.chunked_prefill_size is not None and scheduler.chunked_prefill_size > 0
    slots = scheduler.token_to_kv_pool_allocator.size_swa
    fit(req, None if request is None else request.plan, slots=slots, chunked=chunked)
    metrics = _metrics_of(scheduler)
    if planned and request is not None and metrics is not None and _counts(req.sampling_params):
        plan = request.plan
        metrics.count(plan.visual_tokens, plan.visual_tokens - plan.dropped, plan.reason)


def report_once(original: Callable[..., bool], streamer: Any, key: str) -> bool:
    """Around the streamer's question whether a key has one value for a request."""
    return key == FIELD or original(streamer, key)


def _counts(sampling: Any) -> bool:
    """Is this the one request that stands for its client's in the counters?

    For n answers SGLang sends n requests, and before them one without an answer that fills the
    prefix cache.
    """
    return bool(sampling.n == 1 or sampling.max_new_tokens == 0)


def _metrics_of(scheduler: Any) -> Metrics | None:
    """The scheduler's counters, or None where SGLang keeps none; made when first asked for."""
    if not scheduler.metrics_collector_context.current_scheduler_metrics_enabled:
        return None
    found: Metrics | None = getattr(scheduler, "_entropyprune_metrics", None)
    if found is None:  # SGLang has told prometheus_client where to by now
        found = Metrics(scheduler.metrics_collector.labels)
        scheduler._entropyprune_metrics = found
    return found


def _reason_of_the_request(req: Any) -> Reason | None:
    if req.session is not None:
        return Reason.SESSION
    if req.return_hidden_states:
        return Reason.HIDDEN_STATES
    if req.beam_group is not None:
        return Reason.BEAM_SEARCH
    if req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids):
        return Reason.PROMPT_LOGPROBS
    return None


def _namespace(plan: RequestPlan, wish: Wish, server: PruningPolicy) -> str:
    if wish.policy is None or plan.reason not in _OF_THE_PICTURES:
        return "off"
    return "" if wish.policy == server else wish.policy.digest
