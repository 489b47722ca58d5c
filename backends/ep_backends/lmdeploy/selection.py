"""Given tensors through the very hooks that requests run through, without an engine around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ep_backends.lmdeploy.attached import STEP
from ep_backends.lmdeploy.prefill import Pruner, Step
from ep_core.compaction import Pass
from ep_core.plan import RequestPlan
from ep_core.plugins import registry


class _Projection(nn.Module):
    """In the place of LMDeploy's `qkv_proj`; its queries are what comes in."""

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """`[1, T, H, D]`, as they are."""
        return queries

    def split_qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Queries, keys and values of rows that `forward` gave."""
        return x.view(-1, self.heads, x.shape[-1]), None, None

    heads = 0


class _Layer(nn.Module):
    """In the place of a decoder layer: hands on what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = _Projection()

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_pos_emb: Any,
        past_key_value: Any,
        residual: Any,
        attn_metadata: Any,
    ) -> tuple[torch.Tensor, Any]:
        """The same hidden states and residual."""
        return hidden_states, residual


def select(
    method: str,
    plan: RequestPlan,
    *,
    queries: torch.Tensor | None,
    hidden: torch.Tensor | None,
    device: str,
) -> list[list[int]]:
    """See `ep_core.backend.Backend.select`."""
    given = hidden if queries is None else queries
    if given is None:
        raise ValueError("queries or hidden states are needed")
    tokens = len(given)
    compaction = Pass()
    compaction.add(plan, tokens)
    context = SimpleNamespace(**{STEP: Step(compaction)})
    settings: Any = SimpleNamespace(
        details=True, ratio=2, core=SimpleNamespace(layer=1, selector=registry().selector(method))
    )
    layers = [_Layer(), _Layer()]
    Pruner(layers, settings, lambda: context, None)
    if queries is not None:
        projection: Any = layers[0].self_attn.qkv_proj
        projection.heads = queries.shape[1]
        projection(queries.to(device)[None])
    states = torch.zeros(tokens, 1) if hidden is None else hidden
    output, residual = states.to(device)[None], None
    rotary = (torch.zeros(tokens, 1, device=device),) * 2
    for layer in layers:
        output, residual = layer(
            output,
            rotary_pos_emb=rotary,
            past_key_value=None,
            residual=residual,
            attn_metadata=None,
        )
    return [unit.chosen.tolist() for unit in compaction.units]
