"""The LMDeploy backend: the contract of `ep_core.backend` over LMDeploy's pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch

from ep_backends.budgets import KEY, wish_of
from ep_backends.selection import select
from ep_backends.shared.pictures import read_picture
from ep_core.backend import Answer, Capabilities, KVSlots, Request, Serving, check_placement
from ep_core.checkpoint import read_config
from ep_core.errors import EntropyPruneError, UnsupportedError
from ep_core.patching import PointStatus, check_point
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy, no_policy_in_environment
from ep_core.report import SpanRecord

if TYPE_CHECKING:
    from ep_backends.lmdeploy.prefill import Held

NO_PICTURES = "the prompt has no visual tokens"
RESERVED_BLOCKS = 2  # one for padding, one that LMDeploy leaves out of a prompt's longest length
PLACEHOLDER = "<IMAGE_TOKEN>"  # where LMDeploy puts a picture's tokens into a prompt

# without a GPU: one of a size that a test can fill
CPU_ARGUMENTS: dict[str, Any] = {
    "num_gpu_blocks": 256,
    "block_size": 16,
    "max_batch_size": 16,
    "eager_mode": True,
}


class LMDeployBackend:
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
        from ep_backends.lmdeploy.ledger import POINTS

        return [check_point(point) for point in POINTS]

    # as the hooks do: each picture's tokens apart
    select = staticmethod(select)

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
class _Seen:
    """What is heard of a request while it runs."""

    prompt_tokens: int
    pictures: list[dict[str, Any]]
    reason: str | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    held: Held | None = None  # of its last prefill
    blocks: int = 0  # that its prompt held
    scheduled: int = 0


class LMDeploySession:
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
        family = registry().family(config["model_type"])
        _check_device(device)
        check_placement(device, dtype)
        from lmdeploy import PytorchEngineConfig, pipeline

        from ep_backends.lmdeploy.kv import kv_ratio
        from ep_backends.lmdeploy.plugin import activate
        from ep_backends.shared.processor import load_processor

        self._processor = load_processor(model)
        self._pruned = policy is not None
        self._ratio = 1
        if policy is not None:
            shape = family.decoder(config).shape
            policy = policy.at_layer(family.default_layer, shape.layers)
            self._ratio = kv_ratio(policy, shape.layers)
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
            engine_config.hf_overrides = (engine_config.hf_overrides or {}) | {KEY: str(policy)}
        with no_policy_in_environment():
            self.pipeline = pipeline(str(model), backend_config=engine_config, log_level="ERROR")
        self._engine = self.pipeline.async_engine
        self._seen: dict[int, _Seen] = {}
        strategy = self._engine.engine.seq_strategy
        strategy.update_running = partial(self._watch, strategy.update_running)
        # LMDeploy's own templates move a LLaVA prompt's pictures to its front
        self._engine.vl_encoder.model.to_pytorch = self._to_pytorch

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

    def layer_entropies(self, request: Request) -> NoReturn:
        """Not offered: hidden states of every layer do not leave the engine."""
        raise UnsupportedError("backend 'lmdeploy' cannot measure layers; use transformers")

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.pipeline.internal_thread.loop).result()

    async def _ask_all(self, requests: Sequence[Request]) -> list[Any]:
        # one that is refused does not take the others' answers along
        return await asyncio.gather(*map(self._ask, requests), return_exceptions=True)

    async def _ask(self, request: Request) -> _Seen:
        from lmdeploy import GenerationConfig

        greedy = GenerationConfig(
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            logprobs=1,
            include_stop_str_in_output=True,
        )
        session = self._engine.session_mgr.get()
        messages = [{"role": "user", "content": self._parts(request)}]
        has_picture = any(isinstance(part, Path) for part in request.content)
        prepared = await self._engine.preprocess(
            messages if has_picture else self._prompt(messages),
            session,
            gen_config=greedy,
            do_preprocess=has_picture,
        )
        pictures = prepared.inputs.get("multimodal") or []
        seen = _Seen(prepared.input_token_len, pictures, prepared.inputs.get(KEY))
        self._seen[session.session_id] = seen
        try:
            async with contextlib.aclosing(self._engine.generate(prepared)) as outputs:
                async for output in outputs:
                    ids = output.token_ids or []
                    seen.ids += ids
                    seen.logprobs += [
                        found[token]
                        for token, found in zip(ids, output.logprobs or (), strict=False)
                    ]
                    if len(seen.ids) >= (request.leave_after or math.inf):
                        break
        finally:
            del self._seen[session.session_id]
        return seen

    def _watch(self, update: Any, *, running: Any, **step: Any) -> None:
        """Around the engine's own book-keeping after a pass: what it knows of each sequence.

        Later is too late: the blocks of one that has its answer may go to another at once.
        """
        from lmdeploy.messages import EventType

        update(running=running, **step)
        for sequence in running:
            seen = self._seen.get(sequence.session_id)
            if seen is not None:
                seen.held = (sequence.model_meta or {}).get(KEY, seen.held)
                seen.blocks = seen.blocks or len(sequence.logical_blocks)
                events = [event.type for event in sequence.engine_events]
                seen.scheduled = events.count(EventType.SCHEDULED)

    def _parts(self, request: Request) -> list[dict[str, Any]]:
        """A message's parts as LMDeploy takes them, and what each picture asks of pruning."""
        wish = wish_of(request, self._pruned)
        return [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_data", "image_data": {"data": read_picture(part), KEY: wish}}
            for part in request.content
        ]

    def _prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages through the checkpoint's chat template; a `PLACEHOLDER` for each picture."""
        chat = [
            {
                "role": message["role"],
                "content": [
                    part if part["type"] == "text" else {"type": "image"}
                    for part in message["content"]
                ],
            }
            for message in messages
        ]
        text = self._processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return str(text)

    def _to_pytorch(self, messages: list[Any], template: Any, tokenizer: Any, **_: Any) -> Any:
        """In place of LMDeploy's: the prompt with the pictures where the checkpoint puts them."""
        asked = [message for message in messages if message["role"] != "preprocess"]
        token = self._processor.image_token
        first, last = (
            getattr(self._processor, f"{side}_image_token", "") for side in ("start", "end")
        )
        prompt = self._prompt(asked).replace(token, first + PLACEHOLDER + last)
        vision = self._engine.vl_encoder.model
        return vision.to_pytorch_aux(messages, prompt, PLACEHOLDER, tokenizer)

    def _answer(self, request: Request, seen: _Seen) -> Answer:
        pictures = () if seen.held is None else seen.held.pictures
        pruned = {picture.span.start: picture for picture in pictures}
        spans = []
        for picture in seen.pictures if self._pruned else ():
            start, tokens = picture["offset"], int(picture["image_tokens"])
            found = pruned.get(start)
            kept: Iterable[int] = range(tokens)
            if found is not None:
                assert found.kept is not None, "a session asks for the details"
                kept = found.kept
            spans.append(SpanRecord(start, start + tokens, tuple(kept)))
        text = self._engine.tokenizer.decode(seen.ids, skip_special_tokens=True)
        size = self._engine.engine.cache_config.block_size
        reason: str | None = "no policy is set"
        if self._pruned:
            reason = seen.reason if seen.pictures else NO_PICTURES
        return Answer(
            output_ids=tuple(seen.ids),
            text=text.strip(),
            prompt_tokens=seen.prompt_tokens,
            spans=tuple(spans),
            kv=KVSlots(seen.blocks * self._ratio * size, seen.blocks * size, block=size),
            reason=reason,
            logprobs=tuple(seen.logprobs),
            chunks=None if seen.held is None else seen.held.passes,
            preempted=seen.scheduled - 1,
        )


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
