"""Pruning in the engine: the contract of `ep_core.backend`."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ep_backends.transformers.processor import encode
from ep_core.backend import Answer, Backend, BackendSpec, Capabilities, KVSlots, Request, Session
from ep_core.checkpoint import read_config
from ep_core.errors import UnsupportedError
from ep_core.hookspecs import hookimpl
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy
from ep_core.report import SpanRecord
from ep_core.spans import plan, select, staying
from loop_engine.engine import Engine


class LoopBackend(Backend):
    capabilities = Capabilities(batch=True, multi_image=True, kv_savings=True, cpu=True)

    def versions(self) -> dict[str, str]:
        return {"loop": version("loop-engine"), "torch": version("torch")}

    def attention(self, device: str) -> str:
        return "sdpa"

    def select(self, method: str, *arguments: Any, device: str = "cpu", **inputs: Any) -> Any:
        return [k.tolist() for k in select(registry().selector(method), *arguments, **inputs)]

    def open(self, model: Path, policy: PruningPolicy | None, **options: Any) -> Session:
        config = read_config(model)
        if config["model_type"] != "qwen2_5_vl":
            raise UnsupportedError(f"the loop runs qwen2_5_vl only, not {config['model_type']}")
        return LoopSession(config, policy, Engine(model, options["dtype"]))


class LoopSession(Session):
    def __init__(self, config: Any, policy: PruningPolicy | None, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.adapter = registry().adapter(config["model_type"])
        self.shape = self.adapter.decoder_shape(config)
        self.policy = policy and policy.at_layer(self.adapter.default_layer, self.shape.layers)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer:
        inputs = encode(self.engine.processor, [request.content])
        ids = inputs["input_ids"][0].tolist()
        spans, policy = self.adapter.find_spans(self.config, ids), self.policy
        kept, cuts = [torch.arange(len(span)) for span in spans], {}
        if policy is not None and spans:
            sizes = {"layer": policy.layer, "shape": self.shape, "prompt_tokens": len(ids)}
            keep = plan(policy, spans, **sizes)

            def cut(queries: Any, x: torch.Tensor, positions: torch.Tensor) -> Any:
                selector = registry().selector(policy.method)
                kept[:] = select(selector, spans, keep, queries=queries, hidden=x)
                rows = staying(len(x), spans, kept)
                return x[rows], positions[:, rows]

            cuts = {policy.layer: cut}
        tokens, logits, slots = self.engine.generate(inputs, request.max_new_tokens, cuts)
        return Answer(
            output_ids=tuple(tokens),
            text=self.engine.processor.decode(tokens, skip_special_tokens=True).strip(),
            prompt_tokens=len(ids),
            spans=tuple(
                SpanRecord(span.start, span.stop, tuple(own.tolist()))
                for span, own in zip(spans, kept, strict=True)
            ),
            kv=KVSlots(*slots),
            reason=None if cuts else "no policy, or no pictures",
            logits=logits,
        )


@hookimpl
def entropyprune_backends() -> list[BackendSpec]:
    return [BackendSpec("loop", "a decoder loop in plain PyTorch", LoopBackend)]
