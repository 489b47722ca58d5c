"""The transformers backend: the contract of `ep_core.backend` over `enable`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ep_backends.shared.processor import encode, load_processor
from ep_backends.transformers.batch import ForwardPass, PaddedPass, Row
from ep_backends.transformers.layers import LayerHooks
from ep_backends.transformers.ledger import LEDGER
from ep_backends.transformers.pruning import enable
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
from ep_core.entropy import layer_entropy
from ep_core.errors import EntropyPruneError, UnsupportedError
from ep_core.ledger import PointStatus
from ep_core.plan import Reason, RequestPlan
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy
from ep_core.report import RequestRecord

ATTENTION = "sdpa"


class TransformersBackend(Backend):
    """Plain transformers in this process."""

    capabilities = Capabilities(
        batch=True,
        multi_image=True,
        kv_savings=True,
        layer_entropies=True,
        cpu=True,
        cuda=True,
    )

    def versions(self) -> Mapping[str, str]:
        """Versions of what the results depend on."""
        return {"transformers": version("transformers"), "torch": version("torch")}

    def attention(self, device: str) -> str:
        """That of `attn_implementation`, everywhere."""
        return ATTENTION

    def probe(self) -> Sequence[PointStatus]:
        """Check each attach point against the installed transformers."""
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
        """Run the hooks of a stand-in for a decoder, K=1, with the prompt as its only row."""
        decoder, layer = nn.Module(), _StandIn()
        layer.self_attn = _StandIn()
        layer.self_attn.q_proj = _StandIn()
        decoder.layers = nn.ModuleList([layer, _StandIn()])
        prefill = PaddedPass(rows=[Row(plan)], columns=plan.prompt_tokens)
        hooks = LayerHooks(
            selector=registry().selector(method),
            layer=1,
            layers=2,
            config=None,
            head_dim=1 if queries is None else queries.shape[2],
            query_norm=False,
            digest="",
        )
        for hook in hooks:
            hook.attach(decoder)
        shown = torch.ones(1, plan.prompt_tokens, dtype=torch.bool)
        hooks.thread.current = ForwardPass(shown, prefill=prefill)
        states = torch.empty(plan.prompt_tokens, 1) if hidden is None else hidden
        states = states[None].to(device)
        if queries is not None:
            layer.self_attn.q_proj(queries.flatten(1)[None].to(device))
        decoder.layers[1](states, position_embeddings=(states, states))
        return [unit.chosen.tolist() for unit in prefill.units]

    def open(
        self,
        model: Path,
        policy: PruningPolicy | None,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        serving: Serving | None = None,
    ) -> TransformersSession:
        """Load a checkpoint with `AutoModelForImageTextToText`."""
        if serving not in (None, Serving()):
            raise UnsupportedError("transformers runs each batch whole; leave serving out")
        return TransformersSession(model, policy, device, dtype)


class _StandIn(nn.Module):
    """In the place of a layer or of a part of it: gives back what it gets."""

    def forward(self, states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The states as they are."""
        return states


class TransformersSession(Session):
    """A loaded model; see `ep_core.backend.Session`."""

    def __init__(
        self, model: Path, policy: PruningPolicy | None, device: str, dtype: str | None
    ) -> None:
        registry().family(read_config(model)["model_type"])
        check_placement(device, dtype)
        # only this attention gives the maps that some methods read
        maps = policy is not None and "attention" in registry().selector(policy.method).needs
        try:
            self.model = transformers.AutoModelForImageTextToText.from_pretrained(
                model,
                dtype="auto" if dtype is None else getattr(torch, dtype),
                attn_implementation="eager" if maps else ATTENTION,
            )
            self.processor = load_processor(model)
        except Exception as error:  # a damaged checkpoint can raise anything
            raise EntropyPruneError(f"{model} cannot be loaded: {error}") from None
        self.model.to(device).eval()
        self.pruning = None if policy is None else enable(self.model, policy)

    def __exit__(self, *exception: object) -> None:
        if self.pruning is not None:
            self.pruning.disable()
        del self.model, self.pruning

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer the requests as one batch, padded on the left."""
        if any(request.budget or request.leave_after for request in requests):
            raise UnsupportedError(
                "transformers runs a batch under one policy and to its end; leave budget and "
                "leave_after out"
            )
        inputs = self._encode(requests)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max(request.max_new_tokens for request in requests),
                output_logits=True,
                return_dict_in_generate=True,
            )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        logits = torch.stack(output.logits, dim=1).float().cpu()  # [B, steps, V]
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        records = self._records(inputs)
        kv = self._prompt_slots(output.past_key_values, inputs["input_ids"].shape[1])
        answers = []
        for i, request in enumerate(requests):
            ids = self._until_end(new[i].tolist()[: request.max_new_tokens])
            answers.append(
                Answer(
                    output_ids=tuple(ids),
                    text=self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                    prompt_tokens=lengths[i],
                    spans=records[i].spans,
                    kv=kv,
                    reason=records[i].reason,
                    logits=logits[i, : len(ids)],
                )
            )
        return answers

    def layer_entropies(self, request: Request) -> list[list[float]]:
        """Matrix entropy of each picture's tokens entering each layer, unpruned."""
        if self.pruning is not None:
            raise UnsupportedError("layer entropies are measured without a policy")
        inputs = self._encode([request])
        with torch.inference_mode():
            states = self.model(**inputs, output_hidden_states=True).hidden_states
        config = self.model.config.to_dict()
        family = registry().family(config["model_type"])
        units = family.units(config, family.find(config, inputs["input_ids"][0].tolist()))
        tokens = [torch.tensor(unit.offsets) + unit.start for unit in units]
        # the last state comes after the final norm and is no layer's input
        return [[layer_entropy(state[0, own]) for state in states[:-1]] for own in tokens]

    def _encode(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        inputs = encode(self.processor, [request.content for request in requests])
        return {
            key: value.to(self.model.dtype) if value.is_floating_point() else value
            for key, value in inputs.to(self.model.device).items()
        }

    def _records(self, inputs: Any) -> list[RequestRecord]:
        if self.pruning is not None:
            return self.pruning.records
        return [RequestRecord(reason=Reason.NO_POLICY) for _ in inputs["input_ids"]]

    def _prompt_slots(self, cache: Any, prompt_columns: int) -> KVSlots:
        generated = cache.get_seq_length() - prompt_columns
        layer = self.pruning.policy.layer if self.pruning is not None else 0
        return KVSlots(prompt_columns, cache.get_seq_length(layer) - generated)

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        for i, token in enumerate(ids):
            if token in ends:
                return ids[: i + 1]
        return ids
