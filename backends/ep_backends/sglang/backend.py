"""The SGLang backend: the contract of `ep_core.backend` over SGLang's offline engine."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import torch

from ep_backends.sglang.arguments import CPU_ATTENTION, CUDA_ATTENTION, RADIX_CACHE
from ep_backends.sglang.families import architecture_of, check_checkpoint, differences
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
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy, no_policy_in_environment
from ep_core.report import SpanRecord

PLUGINS_ENV = "SGLANG_PLUGINS"  # names of the plugins that SGLang loads; unset: all of them

# what SGLang needs to run without a GPU
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
CPU_ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": CPU_ATTENTION,
    "mm_attention_backend": "sdpa",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "max_total_tokens": 16384,
    "max_running_requests": 32,
}


class SGLangBackend(Backend):
    """SGLang's offline engine, in processes of its own."""

    capabilities = Capabilities(
        batch=True,
        multi_image=True,
        kv_savings=True,
        request_budget=True,
        abort=True,
        chunked_prefill=True,
        prefix_cache=True,
        preemption=True,
        cpu=True,
        cuda=True,
    )

    def versions(self) -> Mapping[str, str]:
        """Versions of what the results depend on."""
        return {name: version(name) for name in ("sglang", "torch", "transformers")}

    def attention(self, device: str) -> str:
        """What the plugin chooses where nothing is set."""
        return CPU_ATTENTION if device == "cpu" else CUDA_ATTENTION

    def probe(self) -> Sequence[PointStatus]:
        """Check each place where the backend reaches into the installed SGLang."""
        from ep_backends.sglang.ledger import probe

        return [check_entry_point(), *probe()]

    def select(
        self,
        method: str,
        plan: RequestPlan,
        *,
        queries: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        device: str = "cpu",
    ) -> list[list[int]]:
        """Send one prompt through the hooks between the layers."""
        from ep_backends.sglang.prefill import select

        return select(registry().selector(method), plan, queries, hidden, device)

    def server_command(self, arguments: Sequence[str]) -> list[str]:
        """SGLang's own launcher."""
        return [sys.executable, "-m", "sglang.launch_server", *arguments]

    def open(
        self,
        model: Path,
        policy: PruningPolicy | None,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        serving: Serving | None = None,
        **arguments: Any,
    ) -> SGLangSession:
        """Start an engine.

        Args:
            model: folder of a checkpoint.
            policy: what to prune.
            device: "cpu" or "cuda".
            dtype: one of `ep_core.backend.DTYPES`; None takes the checkpoint's.
            serving: how to serve.
            arguments: more arguments of `sglang.Engine`.
        """
        served = _arguments(serving or Serving())
        return SGLangSession(model, policy, device, dtype, served | arguments)


class SGLangSession(Session):
    """A running engine; see `ep_core.backend.Session`."""

    def __init__(
        self,
        model: Path,
        policy: PruningPolicy | None,
        device: str,
        dtype: str | None,
        arguments: Mapping[str, Any],
    ) -> None:
        config = read_config(model)
        registry().family(config["model_type"])
        check_checkpoint(config)
        check_placement(device, dtype)
        architecture = architecture_of(config)
        if architecture in differences(config).half_only and dtype not in (None, "float16"):
            raise UnsupportedError(f"SGLang runs {architecture} in float16 only; leave dtype out")
        if policy is not None and (entry := check_entry_point()).state == "FAILED":
            raise UnsupportedError(f"SGLang would not prune: {entry.detail}")
        if device == "cpu":
            for name, value in CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        from ep_backends.shared.processor import load_processor

        self._processor = load_processor(Path(arguments.get("tokenizer_path") or model))
        self._pruned = policy is not None
        # only a session's requests may ask for details
        override = {} if policy is None else {FIELD: policy.to_json() | {"details": True}}
        with no_policy_in_environment():
            import sglang

            self.engine = sglang.Engine(
                **{
                    "model_path": str(model),
                    "dtype": dtype or "auto",
                    "json_model_override_args": json.dumps(override),
                    "log_level": "error",
                    **(CPU_ARGUMENTS if device == "cpu" else {}),
                    **arguments,
                }
            )
        try:
            self._check_alive()
        except UnsupportedError:
            self.engine.shutdown()
            raise

    def _check_alive(self) -> None:
        """See in the scheduler's own state that it prunes, if it should.

        It cannot run with our prefix cache unless the plugin was loaded in its process and all of
        its hooks took.

        Raises:
            UnsupportedError: it does not.
        """
        if not self._pruned:
            return
        for state in self._wait(self.engine.tokenizer_manager.get_internal_state()):
            if state.get("radix_cache_backend") != RADIX_CACHE:
                raise UnsupportedError(
                    "the engine runs without pruning: SGLang did not load the plugin; see its log, "
                    "and run entropyprune doctor --backend sglang"
                )

    def __exit__(self, *exception: object) -> None:
        self.engine.shutdown()

    def _wait(self, work: Any) -> Any:
        return self.engine.loop.run_until_complete(work)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer the requests; SGLang batches them as it sees fit."""
        outputs: list[Any] = self._wait(self._ask_all(requests))
        for output in outputs:
            if isinstance(output, BaseException):
                raise EntropyPruneError(str(output)) from None
        return [self._answer(*pair) for pair in zip(requests, outputs, strict=True)]

    def held_slots(self) -> int:
        """SGLang's own count, of the pool that has more of them."""

        async def count() -> int:
            manager = self.engine.tokenizer_manager
            for _ in range(2):  # it publishes its load between the two
                await manager.get_internal_state()
            return int((await manager.get_loads())[0].num_used_tokens)

        return int(self._wait(count()))

    async def _ask_all(self, requests: Sequence[Request]) -> list[dict[str, Any] | BaseException]:
        # one that is refused does not leave the others running without anything that awaits them
        return await asyncio.gather(*map(self._ask, requests), return_exceptions=True)

    async def _ask(self, request: Request) -> dict[str, Any]:
        """SGLang's last output for one request; of a client that left, the last that it got."""
        name = uuid.uuid4().hex
        wish = session_wish(request, self._pruned)
        pictures = [read_picture(part) for part in request.content if isinstance(part, Path)]
        # a batch of one: alone, SGLang takes a prompt with several pictures for one with one
        stream = await self.engine.async_generate(
            rid=[name],
            prompt=[self.prompt(request.content)],
            image_data=[pictures or None],
            sampling_params=[
                {
                    "temperature": 0,
                    "max_new_tokens": request.max_new_tokens,
                    "custom_params": None if wish is None else {FIELD: wish},
                }
            ],
            return_logprob=True,
            stream=True,
        )
        enough = sys.maxsize if request.leave_after is None else request.leave_after
        got: dict[str, Any] = {"output_ids": []}
        async for output in stream:
            if len(got["output_ids"]) < enough:
                got = output
            if len(got["output_ids"]) >= enough:
                self.engine.tokenizer_manager.abort_request(rid=name)
        return got

    def prompt(self, content: Sequence[str | Path]) -> str:
        """One user message through the checkpoint's chat template."""
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in content
        ]
        chat = [{"role": "user", "content": parts}]
        return str(
            self._processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        )

    def _answer(self, request: Request, output: Mapping[str, Any]) -> Answer:
        meta = output["meta_info"]
        finish = meta["finish_reason"] or {}
        if finish.get("type") == "abort" and request.leave_after is None:
            raise EntropyPruneError(str(finish.get("message", "the engine gave up the request")))
        (info,) = meta.get(FIELD) or [None]
        pictures = any(isinstance(part, Path) for part in request.content)
        reason: str | None = Reason.NO_PICTURES
        if not self._pruned:
            reason = Reason.NO_POLICY
        elif info is not None:
            reason = info.get("reason")
        elif pictures and finish.get("type") != "abort":
            raise EntropyPruneError(
                "SGLang answered a request with pictures and did not say what was pruned; please "
                "report it"
            )
        info = info or {}
        kv = info.get("kv")
        return Answer(
            output_ids=tuple(output["output_ids"]),
            text=output["text"].strip(),
            prompt_tokens=meta["prompt_tokens"],
            spans=tuple(
                SpanRecord(span["start"], span["stop"], tuple(span["kept"]))
                for span in info.get("spans", ())
            ),
            kv=None if kv is None else KVSlots(kv["below"], kv["from"]),
            reason=reason,
            logprobs=tuple(value for value, *_ in meta["output_token_logprobs"]),
            cached_tokens=meta["cached_tokens"],
            chunks=info.get("chunks"),
            preempted=meta["num_retractions"],
        )


def _arguments(serving: Serving) -> dict[str, Any]:
    """What SGLang calls it."""
    found: dict[str, Any] = {}
    if serving.prefill_chunk is not None:
        found["chunked_prefill_size"] = serving.prefill_chunk
    if serving.kv_tokens is not None:
        found |= {"max_total_tokens": serving.kv_tokens, "schedule_conservativeness": 0.0}
    if serving.prefix_cache is not None:
        found["disable_radix_cache"] = not serving.prefix_cache
    return found


def check_entry_point() -> PointStatus:
    """Would SGLang load us?"""
    group, name = "sglang.srt.plugins", "entropyprune"
    target = f"entry point {name} in group {group}"
    if name not in entry_points(group=group).names:
        return PointStatus(target, "FAILED", "not found; install entropyprune with pip")
    allowed = [part.strip() for part in os.environ.get(PLUGINS_ENV, "").split(",") if part.strip()]
    if allowed and name not in allowed:
        wanted = ",".join([*allowed, name])
        return PointStatus(
            target, "FAILED", f"{PLUGINS_ENV} keeps it out; set {PLUGINS_ENV}={wanted}"
        )
    return PointStatus(target, "ok", "SGLang loads the plugin in each of its processes")
