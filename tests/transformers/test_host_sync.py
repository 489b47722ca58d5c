"""Pruning never waits for the device after its plan, and follows a model over several devices."""

import functools

import pytest
import torch
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache

from ep_backends.transformers import enable
from ep_core import kernels

from ..host_sync import KERNELS, NoWaiting, OneDevice  # noqa: TID252 # no installed package


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


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, other: x + other,
        lambda x, other: x[other.long()],
        lambda x, other: x.index_copy_(0, other.long(), x),
        lambda x, other: torch.cat([x, other]),
    ],
)
def test_what_mixes_devices_is_noticed(mix):
    with pytest.raises(AssertionError, match="mixes"), OneDevice():
        mix(torch.ones(3, device="meta"), torch.arange(3.0))


MESSAGES = {
    "one row": [["what is it?", 0]],
    "equal rows": [["what is it?", 0]] * 2,
    "padded rows": [["what is it?", 0], ["and of these", 1, "which one is larger?", 2]],
}


@pytest.mark.parametrize("method", ["released", "set-entropy"])
@pytest.mark.parametrize("messages", MESSAGES)
def test_a_conversation_does_not_wait(family, method, messages):
    """Prompt, answer and next turn in the decoder: plans are made on the host, the rest on meta."""
    model = family.model()
    parts = [
        [family.picture(part) if isinstance(part, int) else part for part in message]
        for message in MESSAGES[messages]
    ]
    batch = family.encode(*parts)
    rows, prompt = batch["input_ids"].shape
    decoder, cache = model.get_decoder().to("meta"), DynamicCache(config=model.get_decoder().config)
    text = batch["input_ids"][:, -3:]
    shown = batch["attention_mask"]
    seen, held = 0, 0
    with enable(model, f"layer=2,keep=4,method={method}") as pruning:
        for ids in (batch["input_ids"], text[:, :1], text[:, :1], text):
            tokens = ids.shape[1]
            mask = torch.cat([shown, torch.ones(rows, seen + tokens - shown.shape[1])], 1)[
                :, : seen + tokens
            ]
            given = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
            pruning._before_base(model.base_model, (), given)
            planned = pruning._thread.planned
            planned.shown = planned.shown.to("meta")
            embedded = torch.empty(rows, tokens, decoder.config.hidden_size, device="meta")
            # a mask that is ready: transformers looks whether one hides anything, which waits
            ready = None
            if messages == "padded rows":
                ready = torch.empty(rows, 1, tokens, seen + tokens, device="meta")
            with NoWaiting():
                output = decoder(
                    inputs_embeds=embedded,
                    attention_mask=ready,
                    past_key_values=cache,
                    use_cache=True,
                )
            assert output.last_hidden_state.shape == embedded.shape
            new = tokens if planned.shortened is None else max(planned.shortened.lengths)
            seen, held = seen + tokens, held + new
            lengths = [layer.keys.shape[2] for layer in cache.layers]
            assert lengths == [seen] * 2 + [held] * (len(lengths) - 2)
    assert held < seen == prompt + 5


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("messages", ["equal rows", "padded rows"])
def test_layers_may_lie_on_several_devices(family, first, messages):
    """Layers from `first` on move what they get to their device, as those that accelerate spreads
    do; pruned are layers >= 2. Nothing may be left behind on another device."""
    model = family.model()
    parts = [
        [family.picture(part) if isinstance(part, int) else part for part in message]
        for message in MESSAGES[messages]
    ]
    batch = family.encode(*parts)
    decoder = model.get_decoder()
    for part in (*decoder.layers[first:], decoder.norm):
        part.to("meta").forward = functools.partial(_moved, part.forward)
    cache = DynamicCache(config=decoder.config)
    embedded = torch.zeros(*batch["input_ids"].shape, decoder.config.hidden_size)
    with enable(model, "layer=2,keep=4,method=set-entropy") as pruning:
        pruning._before_base(model.base_model, (), {**batch, "past_key_values": cache})
        with OneDevice():
            output = decoder(
                inputs_embeds=embedded,
                attention_mask=batch["attention_mask"],
                past_key_values=cache,
            )
    assert output.last_hidden_state.shape == embedded.shape
    assert cache.layers[2].keys.shape[2] < embedded.shape[1]


def _moved(forward, *args, **kwargs):
    """What accelerate puts around `forward`."""
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
    return forward(*args, **kwargs)
