"""Pruning in the engine: the contract of `ep_core.backend`."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ep_backends.shared.processor import encode
from ep_core.backend import Answer, Backend, BackendSpec, Capabilities, KVSlots, Request, Session
from ep_core.checkpoint import read_config
from ep_core.compaction import Pass
from ep_core.errors import UnsupportedError
from ep_core.hookspecs import hookimpl
from ep_core.plan import Reason, RequestPlan
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy
from ep_core.report import RequestRecord
from ep_core.selectors import Selector
from ep_core.settings import Settings
from loop_engine.engine import Engine


class Prefill:
    """One prompt on its way into layer K."""

    def __init__(self, plan: RequestPlan, selector: Selector) -> None:
        self.selector, self.current = selector, Pass()
        self.current.add(plan, plan.prompt_tokens)

    def cut(self, queries: Any, x: torch.Tensor, positions: torch.Tensor) -> Any:
        self.current.choose(self.selector, x, queries)
        return self.current.take(x), self.current.take(positions, dim=1)

    @property
    def kept(self) -> list[list[int]]:
        return [unit.chosen.tolist() for unit in self.current.units]


class LoopBackend(Backend):
    capabilities = Capabilities(batch=True, multi_image=True, kv_savings=True, cpu=True)

    def versions(self) -> dict[str, str]:
        return {"loop": version("loop-engine"), "torch": version("torch")}

    def attention(self, device: str) -> str:
        return "sdpa"

    def select(self, method: str, plan: RequestPlan, **inputs: Any) -> list[list[int]]:
        prefill, queries = Prefill(plan, registry().selector(method)), inputs.get("queries")
        x = inputs["hidden"] if queries is None else queries.flatten(1)
        prefill.cut(queries, x, torch.arange(len(x)).expand(3, -1))
        return prefill.kept

    def open(self, model: Path, policy: PruningPolicy | None, **options: Any) -> Session:
        config = read_config(model)
        if config["model_type"] != "qwen2_5_vl":
            raise UnsupportedError(f"the loop runs qwen2_5_vl only, not {config['model_type']}")
        return LoopSession(config, policy, Engine(model, options["dtype"]))


class LoopSession(Session):
    def __init__(self, config: Any, policy: PruningPolicy | None, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.settings = None if policy is None else Settings.of(policy, config)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answer(request) for request in requests]

    def _plan(self, ids: list[int]) -> RequestPlan:
        family = registry().family(self.config["model_type"])
        units = family.units(self.config, family.find(self.config, ids))
        if self.settings is None:
            return RequestPlan.whole(units, len(ids), Reason.NO_POLICY)
        return self.settings.plan(units, len(ids))

    def _answer(self, request: Request) -> Answer:
        inputs = encode(self.engine.processor, [request.content])
        plan = self._plan(inputs["input_ids"][0].tolist())
        cuts, kept = {}, []
        if self.settings is not None and plan.dropped:
            prefill = Prefill(plan, self.settings.selector)
            cuts = {self.settings.layer: prefill.cut}
        tokens, logits, slots = self.engine.generate(inputs, request.max_new_tokens, cuts)
        if cuts:
            kept = prefill.kept
        return Answer(
            output_ids=tuple(tokens),
            text=self.engine.processor.decode(tokens, skip_special_tokens=True).strip(),
            prompt_tokens=plan.prompt_tokens,
            spans=RequestRecord.of(plan, kept).spans,
            kv=KVSlots(*slots),
            reason=plan.why,
            logits=logits,
        )


@hookimpl
def entropyprune_backends() -> list[BackendSpec]:
    return [BackendSpec("loop", "a decoder loop in plain PyTorch", LoopBackend)]
