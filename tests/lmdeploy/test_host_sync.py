"""Ranking and cutting never wait for the device; decode is in test_decode_graph."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ep_backends.lmdeploy.attached import PLAN, SequenceState, state_in, step_of
from ep_backends.lmdeploy.prefill import PAGES_BELOW, Pruner
from ep_core import kernels
from ep_core.plan import PlannedUnit, RequestPlan, Run, Unit
from ep_core.plugins import registry

from ..host_sync import KERNELS, NoWaiting  # noqa: TID252 # tests are no installed package

meta = partial(torch.empty, device="meta")
HEADS, KEPT = 4, 5 + 2
PLAN_OF_TWO = RequestPlan.of(
    [PlannedUnit(Unit((Run(3, 19),)), 5), PlannedUnit(Unit((Run(22, 30),), 1), 2)], 33
)


class Projection(nn.Module):
    def forward(self, x):
        return x

    def split_qkv(self, x):
        return x.unflatten(-1, (HEADS, -1)), x, x


class Layer(nn.Module):
    """A decoder layer of 32 features that notes how many rows it computes."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = Projection()
        self.rows = []

    def forward(self, hidden_states, rotary_pos_emb, past_key_value, residual, attn_metadata, more):
        lengths = attn_metadata.max_q_seqlen, attn_metadata.kv_flatten_size
        self.rows.append((hidden_states.shape[1], len(rotary_pos_emb[0]), *lengths))
        assert more == "passed through"
        self.self_attn.qkv_proj(hidden_states)
        return hidden_states, hidden_states if residual is not None else None


@dataclass
class Metadata:
    """In the place of LMDeploy's attention metadata: `q_seqlens` is what its layers see."""

    q_seqlens: torch.Tensor
    kv_seqlens: torch.Tensor
    q_start_loc: torch.Tensor
    kv_start_loc: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_offsets: torch.Tensor
    kv_flatten_size: int
    max_q_seqlen: int
    max_kv_seqlen: int


def metadata(tokens):
    lengths = [meta(1, dtype=torch.int32)] * 6
    return Metadata(*lengths, meta(1, 2), tokens, tokens, tokens)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("method", ["released", "set-entropy"])
def test_layer_k_does_not_wait(monkeypatch, method, residual):
    monkeypatch.setitem(kernels._found, "meta", KERNELS)
    core = SimpleNamespace(selector=registry().selector(method), layer=1)
    context = SimpleNamespace(
        is_decoding=False,
        q_seqlens=meta(1),
        input_ids=meta(33),
        sum_kv_seqlen=33,
        model_metas=None,
        input_multimodals=[{"image": [SimpleNamespace(start=3, end=19, meta={PLAN: PLAN_OF_TWO})]}],
    )
    layers = [Layer() for _ in range(3)]
    pruner = Pruner(layers, SimpleNamespace(core=core, details=True), lambda: context, None)

    def decoder(**inputs):
        """As LMDeploy's: hidden states by place, the rest by name."""
        hidden = inputs["hidden_states"]
        added = hidden if residual else None
        for layer in layers:
            hidden, added = layer(
                hidden,
                rotary_pos_emb=(meta(33, 8), meta(33, 8)),
                past_key_value=None,
                residual=added,
                attn_metadata=inputs["attn_metadata"],
                more="passed through",
            )
        return hidden

    with NoWaiting():
        (after,) = pruner.plan(context)
        inputs = {"hidden_states": meta(1, 33, 32), "attn_metadata": metadata(33)}
        output = pruner.forward(decoder, **inputs, **{PAGES_BELOW: meta(1, 4)})
    kept = 33 - (16 + 8) + KEPT
    assert output.shape == (1, 33, 32)
    assert layers[0].rows == [(33, 33, 33, 33)]
    assert layers[1].rows == layers[2].rows == [(kept, kept, kept, kept)]
    state = state_in(after)
    assert (state.plan, state.passes) == (PLAN_OF_TWO, 1)
    assert state.dropped == 33 - kept
    assert [len(unit.kept) for unit in state.ranked] == [5, 2]
    assert all(unit.queries is None for unit in step_of(context).compaction.units)


def test_what_was_kept_leaves_a_process_without_its_tensors():
    import pickle

    ranked = SimpleNamespace(chosen=torch.tensor([1, 4]))
    state = pickle.loads(pickle.dumps(SequenceState(PLAN_OF_TWO, 2, (ranked, [3]))))
    assert state == SequenceState(PLAN_OF_TWO, 2, ([1, 4], [3]))
