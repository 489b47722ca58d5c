"""Pruning never waits for the device after its plan, and follows a model over several devices."""

import functools

import pytest
import torch
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache

from ep_backends.transformers import enable
from ep_core import kernels
from ep_core.plugins import registry
from ep_core.spans import VisualSpan, select, staying

from ..host_sync import KERNELS, NoWaiting  # noqa: TID252 # tests are no installed package

METHODS = ["released", "rows", "trace", "set-entropy"]


@pytest.fixture(autouse=True)
def fused_scores(monkeypatch):
    monkeypatch.setitem(kernels._found, "meta", KERNELS)


@pytest.mark.parametrize(
    ("wait", "noticed"),
    [
        (lambda x: x.sum().item(), "reads values"),
        (lambda x: bool((x > 0).all()), "reads values"),
        (lambda x: x.nonzero(), "reads values"),
        (lambda x: torch.linalg.eigvalsh(x.diag()), "reads values"),
        (lambda x: x.tolist(), "a copy from meta"),
        (lambda x: x[x > 0], "booleans"),
        (lambda x: x[torch.tensor([0, 1])], "of another device"),
        (lambda x: x.__setitem__(torch.zeros(2, dtype=torch.int64, device="meta"), 1), "a number"),
        (lambda x: x.copy_(torch.zeros(3)), "a copy from cpu"),
        (lambda x: torch.zeros(3).to("meta"), "a copy from cpu"),
    ],
)
def test_what_waits_is_noticed(wait, noticed):
    with pytest.raises((AssertionError, RuntimeError), match=noticed), NoWaiting():
        wait(torch.ones(3, device="meta"))


@pytest.mark.parametrize("method", METHODS)
def test_selection_does_not_wait(method):
    with NoWaiting(), torch.device("meta"):
        spans = [VisualSpan(2, 20), VisualSpan(21, 30)]
        kept = select(
            registry().selector(method),
            spans,
            [5, 9],
            queries=torch.empty(40, 4, 8, dtype=torch.bfloat16),
            hidden=torch.empty(40, 32, dtype=torch.bfloat16),
        )
        assert [own.shape for own in kept] == [(5,), (9,)]
        assert staying(40, spans, kept).device.type == "meta"


@pytest.mark.parametrize("method", ["released", "set-entropy"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_conversation_does_not_wait(family, method, rows):
    """Prompt, answer and next turn in the decoder: plans are made on the host, the rest on meta."""
    model = family.model()
    batch = family.encode(*[["what is it?", family.picture(0)]] * rows)
    decoder, cache = model.get_decoder().to("meta"), DynamicCache(config=model.get_decoder().config)
    text = batch["input_ids"][:, -3:]
    passes = [batch, {"input_ids": text[:, :1]}, {"input_ids": text[:, :1]}, {"input_ids": text}]
    seen, held = 0, 0
    with enable(model, f"layer=2,keep=4,method={method}") as pruning:
        for inputs in passes:
            tokens = inputs["input_ids"].shape[1]
            pruning._before_model(model.base_model, (), {**inputs, "past_key_values": cache})
            planned = pruning._local.planned
            planned.real = planned.real.to("meta")
            embedded = torch.empty(rows, tokens, decoder.config.hidden_size, device="meta")
            with NoWaiting():
                output = decoder(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
            assert output.last_hidden_state.shape == embedded.shape
            seen, held = seen + tokens, held + (planned.held or tokens)
            lengths = [layer.keys.shape[2] for layer in cache.layers]
            assert lengths == [seen] * 2 + [held] * (len(lengths) - 2)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_layers_may_lie_on_several_devices(family, first):
    """Layers from `first` on move what they get to their device, as those that accelerate spreads
    do; pruned are layers >= 2."""
    model = family.model()
    batch = family.encode(*[["what is it?", family.picture(0)]] * 2)
    decoder = model.get_decoder()
    for part in (*decoder.layers[first:], decoder.norm):
        part.to("meta").forward = functools.partial(_moved, part.forward)
    cache = DynamicCache(config=decoder.config)
    embedded = torch.zeros(*batch["input_ids"].shape, decoder.config.hidden_size)
    with enable(model, "layer=2,keep=4,method=set-entropy") as pruning:
        pruning._before_model(model.base_model, (), {**batch, "past_key_values": cache})
        output = decoder(
            inputs_embeds=embedded, attention_mask=batch["attention_mask"], past_key_values=cache
        )
    assert output.last_hidden_state.shape == embedded.shape
    assert cache.layers[2].keys.shape[2] < embedded.shape[1]


def _moved(forward, *args, **kwargs):
    """What accelerate puts around `forward`."""
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
    return forward(*args, **kwargs)
