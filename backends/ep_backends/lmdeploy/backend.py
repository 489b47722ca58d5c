"""The LMDeploy backend: the contract of `ep_core.backend` over LMDeploy's pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from ep_backends.lmdeploy.attached import SequenceState, state_in
from ep_backends.lmdeploy.families import FAMILIES
from ep_backends.lmdeploy.ledger import LEDGER
from ep_backends.lmdeploy.settings import EnginePolicy, LMDeploySettings
from ep_backends.shared.pictures import read_picture
from ep_backends.shared.requests import FIELD, session_wish
from ep_core.backend import (
    Answer,
    Backend,
    Capabilities,
    KVSlots,
    Request,
    Serving,
    Session,
    check_placement,
)
from ep_core.checkpoint import read_config
from ep_core.errors import EntropyPruneError, UnsupportedError
from ep_core.ledger import PointStatus
from ep_core.plan import Reason, RequestPlan
from ep_core.policy import PruningPolicy
from ep_core.report import RequestRecord

RESERVED_BLOCKS = 2  # one for padding, one that LMDeploy leaves out of a prompt's longest length

# without a GPU: one of a size that a test can fill
CPU_ARGUMENTS: dict[str, Any] = {
    "num_gpu_blocks": 256,
    "block_size": 16,
    "max_batch_size": 16,
    "eager_mode": True,
}


class LMDeployBackend(Backend):
    """LMDeploy's PyTorch engine, in this process."""

    capabilities = Capabilities(
        batch=True,
        multi_image=True,
        kv_savings=True,
        request_budget=True,
        abort=True,
        chunked_prefill=True,
        preemption=True,
        cpu=True,
        cuda=True,
    )

    def versions(self) -> Mapping[str, str]:
        """Versions of what the results depend on."""
        return {name: version(name) for name in ("lmdeploy", "torch", "transformers")}

    def attention(self, device: str) -> str:
        """LMDeploy's Triton kernels, or what stands in for them."""
        return "triton" if device == "cuda" else "stand-in for triton"

    def probe(self) -> Sequence[PointStatus]:
        """Check each attach point against the installed LMDeploy."""
        return LEDGER.check()

    def select(
        self,
        method: str,
        plan: RequestPlan,
        *,
        queries: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        device: str = "cpu",
    ) -> list[list[int]]:
        """Drive the hooks of a decoder with these tensors."""
        from ep_backends.lmdeploy.selection import select

        return select(method, plan, queries=queries, hidden=hidden, device=device)

    def server_command(self, arguments: Sequence[str]) -> list[str]:
        """LMDeploy's own command line, such as `serve api_server MODEL --backend pytorch`."""
        return [sys.executable, "-m", "ep_backends.lmdeploy", *arguments]

    def open(
        self,
        model: Path,
        policy: PruningPolicy | None,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        serving: Serving | None = None,
        **arguments: Any,
    ) -> LMDeploySession:
        """Start an engine.

        Args:
            model: folder of a checkpoint.
            policy: what to prune.
            device: "cuda", or "cpu" where something stands in for LMDeploy's device layer.
            dtype: one of `ep_core.backend.DTYPES`; None takes the checkpoint's.
            serving: how to serve.
            arguments: more arguments of `lmdeploy.PytorchEngineConfig`.
        """
        return LMDeploySession(model, policy, device, dtype, serving or Serving(), arguments)


@dataclass
class _Running:
    """What is heard of a request while it runs.

    Attributes:
        prompt_tokens: length of its prompt.
        plan: of its prompt; None without pictures or without a policy.
        ids, logprobs: of the answer so far.
        state: after its last pass.
        blocks: that its prompt held.
        scheduled: how often the engine took it up.
    """

    prompt_tokens: int
    plan: RequestPlan | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    state: SequenceState = field(default_factory=SequenceState)
    blocks: int = 0
    scheduled: int = 0


class LMDeploySession(Session):
    """A running engine; see `ep_core.backend.Session`."""

    def __init__(
        self,
        model: Path,
        policy: PruningPolicy | None,
        device: str,
        dtype: str | None,
        serving: Serving,
        arguments: Mapping[str, Any],
    ) -> None:
        config = read_config(model)
        _check_device(device)
        check_placement(device, dtype)
        from lmdeploy import PytorchEngineConfig, pipeline

        from ep_backends.lmdeploy.plugin import activate, is_active

        LEDGER.require(LEDGER.check("in_sessions"))
        self._settings = None
        if policy is not None:
            self._settings = LMDeploySettings.of(policy, config, details=True)
        self._ratio = 1 if self._settings is None else self._settings.ratio
        given = {**(CPU_ARGUMENTS if device == "cpu" else {}), **arguments}
        engine_config = PytorchEngineConfig(**given)
        if serving.prefill_chunk is not None:
            engine_config.max_prefill_token_num = serving.prefill_chunk
        if serving.kv_tokens is not None:
            tokens = self._ratio * engine_config.block_size
            engine_config.num_gpu_blocks = math.ceil(serving.kv_tokens / tokens) + RESERVED_BLOCKS
        engine_config.logprobs_mode = "raw_logprobs"
        engine_config.dtype = dtype or "auto"  # float32 is refused as an argument only
        if policy is not None:
            activate()
        if is_active():  # the session's word goes before the environment's and before activate()'s
            said = EnginePolicy(policy or "", details=True)
            engine_config.hf_overrides = (engine_config.hf_overrides or {}) | {FIELD: said}
        self.pipeline = pipeline(str(model), backend_config=engine_config, log_level="ERROR")
        self._engine = self.pipeline.async_engine
        self._running: dict[int, _Running] = {}
        strategy = self._engine.engine.seq_strategy
        strategy.update_running = partial(self._watch, strategy.update_running)
        family = FAMILIES.get(config["model_type"])
        self._processor = None
        if family is not None and family.moves_pictures:
            from ep_backends.shared.processor import load_processor

            self._processor = load_processor(model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pipeline.close()

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer the requests; LMDeploy batches them as it sees fit."""
        outcomes = self._run(self._ask_all(requests))
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise EntropyPruneError(str(outcome)) from outcome
        return [self._answer(*pair) for pair in zip(requests, outcomes, strict=True)]

    def held_slots(self) -> int:
        """The engine's own count of blocks, in tokens of layers >= K."""
        config = self._engine.engine.cache_config
        free = self._engine.engine.scheduler.block_manager.get_num_free_gpu_blocks()
        total = config.num_gpu_blocks - config.num_reserved_gpu_blocks
        return int((total - free) * config.block_size)

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.pipeline.internal_thread.loop).result()

    async def _ask_all(self, requests: Sequence[Request]) -> list[Any]:
        # one that is refused does not take the others' answers along
        return await asyncio.gather(*map(self._ask, requests), return_exceptions=True)

    async def _ask(self, request: Request) -> _Running:
        from lmdeploy import GenerationConfig

        from ep_backends.lmdeploy.requests import plan_of

        greedy = GenerationConfig(
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            logprobs=1,
            include_stop_str_in_output=True,
        )
        session = self._engine.session_mgr.get()
        messages, as_tokens = self._messages(request)
        prepared = await self._engine.preprocess(
            messages, session, gen_config=greedy, do_preprocess=not as_tokens
        )
        running = _Running(prepared.input_token_len, plan_of(prepared))
        self._running[session.session_id] = running
        try:
            async with contextlib.aclosing(self._engine.generate(prepared)) as outputs:
                async for output in outputs:
                    ids = output.token_ids or []
                    running.ids += ids
                    running.logprobs += [
                        found[token]
                        for token, found in zip(ids, output.logprobs or (), strict=False)
                    ]
                    if len(running.ids) >= (request.leave_after or math.inf):
                        break
        finally:
            del self._running[session.session_id]
        return running

    def _watch(self, update: Any, *, running: Any, **step: Any) -> None:
        """Around the engine's own book-keeping after a pass: what it knows of each sequence.

        Later is too late: the blocks of one that has its answer may go to another at once.
        """
        from lmdeploy.messages import EventType

        update(running=running, **step)
        for sequence in running:
            known = self._running.get(sequence.session_id)
            if known is not None:
                # a preempted sequence has none until it is computed again
                if sequence.model_meta is not None:
                    known.state = state_in(sequence.model_meta)
                known.blocks = known.blocks or len(sequence.logical_blocks)
                events = [event.type for event in sequence.engine_events]
                known.scheduled = events.count(EventType.SCHEDULED)

    def _messages(self, request: Request) -> tuple[list[dict[str, Any]], bool]:
        """A request as LMDeploy takes it; is its prompt token ids already?"""
        wish = session_wish(request, self._settings is not None)
        pictures = any(isinstance(part, Path) for part in request.content)
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_data", "image_data": {"data": read_picture(part), FIELD: wish}}
            for part in request.content
        ]
        as_tokens = pictures and self._processor is not None
        if as_tokens:
            images = [part for part in parts if part["type"] == "image_data"]
            parts = [{"type": "text", "text": self._prompt_ids(request)}, *images]
        elif not pictures:  # LMDeploy would put a line break between two texts
            parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
        return [{"role": "user", "content": parts}], as_tokens

    def _prompt_ids(self, request: Request) -> list[int]:
        """The prompt by the checkpoint's own template, one token for each picture."""
        processor: Any = self._processor
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in request.content
        ]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = []
        for i, piece in enumerate(text.split(processor.image_token)):
            ids += [self._engine.vl_encoder.model.image_token_id] * (i > 0)
            ids += self._engine.tokenizer.encode(piece, add_bos=i == 0)
        return ids

    def _answer(self, request: Request, running: _Running) -> Answer:
        size = self._engine.engine.cache_config.block_size
        pictures = any(isinstance(part, Path) for part in request.content)
        record, state = self._record(running, pictures), running.state
        return Answer(
            output_ids=tuple(running.ids),
            text=self._engine.tokenizer.decode(running.ids, skip_special_tokens=True).strip(),
            prompt_tokens=running.prompt_tokens,
            spans=record.spans,
            kv=KVSlots(running.blocks * self._ratio * size, running.blocks * size, block=size),
            reason=record.reason,
            logprobs=tuple(running.logprobs),
            chunks=state.passes or None,
            preempted=running.scheduled - 1,
        )

    def _record(self, running: _Running, pictures: bool) -> RequestRecord:
        """What was pruned.

        Raises:
            EntropyPruneError: the engine should have pruned and did not.
        """
        if self._settings is None:
            return RequestRecord((), Reason.NO_POLICY)
        if not pictures:
            return RequestRecord((), Reason.NO_PICTURES)
        if running.plan is None:
            raise EntropyPruneError(
                "the session has a policy, and its engine did not ask it about a prompt with "
                "pictures; was pruning undone meanwhile?"
            )
        kept, planned = running.state.kept(), sum(1 for _ in running.plan.pruned)
        if len(kept) != planned:
            raise EntropyPruneError(
                f"{planned} units of a prompt should have lost tokens, {len(kept)} did; please "
                "report it"
            )
        return RequestRecord.of(running.plan, kept)


def _check_device(device: str) -> None:
    """Refuse a device that is not where LMDeploy's CUDA tensors go.

    Raises:
        UnsupportedError: with the device to give instead, or that there is none.
    """
    import lmdeploy  # noqa: F401 # a stand-in for the device layer comes with it

    try:
        place = torch.empty(0, device="cuda").device.type
    except (RuntimeError, AssertionError):
        place = "none"
    if place == "none":
        raise UnsupportedError("LMDeploy runs on CUDA only, and there is no CUDA device here")
    if place != device.partition(":")[0]:
        raise UnsupportedError(
            f"LMDeploy runs on {place} only, not on device {device!r}; give --device {place}"
        )
