"""A pruned prefill never waits for the device."""

import pytest
import torch
from transformers import DynamicCache

from ep_backends.transformers import enable
from ep_core.plugins import registry
from ep_core.spans import VisualSpan, select, staying

from ..host_sync import NoWaiting  # noqa: TID252 # tests are no installed package

METHODS = ["released", "rows", "trace", "set-entropy"]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(torch.zeros(2, dtype=torch.int64, device="meta"), 1),
        lambda x: x.nonzero(),
        lambda x: torch.zeros(3).to("meta"),
    ],
)
def test_what_waits_is_noticed(wait):
    with (
        pytest.raises((AssertionError, RuntimeError, NotImplementedError)),
        NoWaiting(),
    ):
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
def test_a_pruned_prefill_does_not_wait(family, method, rows):
    """The whole decoder: the pictures are found on the host, then every tensor is on `meta`."""
    model = family.model()
    batch = family.encode(*[["what is it?", family.picture(0)]] * rows)
    with enable(model, f"layer=2,keep=4,method={method}") as pruning:
        pruning._before_model(model.base_model, (), batch)
        pruning._local.planned.real = batch["attention_mask"].bool().to("meta")
        decoder = model.get_decoder().to("meta")
        embedded = torch.empty(*batch["input_ids"].shape, decoder.config.hidden_size, device="meta")
        cache = DynamicCache(config=decoder.config)
        with NoWaiting():
            output = decoder(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
    assert output.last_hidden_state.shape == embedded.shape
    dropped = [layer.keys.shape[2] < embedded.shape[1] for layer in cache.layers]
    assert dropped == [k >= 2 for k in range(len(dropped))], "layers >= 2 hold kept tokens only"
