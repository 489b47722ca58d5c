"""Methods that read attention maps get those of layer K-1; engines without maps refuse them."""

import weakref

import pytest
import torch
from transformers import DynamicCache

from ep_backends.shared.requests import server_settings
from ep_backends.transformers import enable
from ep_core import UnsupportedError
from ep_core.backend import Request
from ep_core.checkpoint import read_config
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy
from ep_core.selectors import Selector

from .layouts import in_rows

POLICY = "layer=2,keep=3,method=spy"


@pytest.fixture
def given(monkeypatch):
    """What a registered method `spy` was given, call by call."""
    calls = []

    def spy(inputs, k):
        calls.append(inputs.attention)
        return torch.arange(k)

    selector = Selector("spy", "keeps the first", frozenset({"attention"}), spy)
    monkeypatch.setitem(registry().selectors, "spy", selector)
    return calls


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_method_gets_the_attention_of_what_stands_behind_each_picture(lab, given, side):
    qwen = lab("qwen-gqa")
    model = qwen.model(attn_implementation="eager")
    one, two = qwen.picture(0), qwen.picture(1)
    inputs = qwen.encode([one, "what is it?"], [one, "and then", two, "?"], side=side)
    with torch.inference_mode():
        maps = model(**inputs, output_attentions=True).attentions[1]  # [B, H, N, N] of layer K-1
        with enable(model, POLICY):
            model(**inputs)
    token = model.config.image_token_id
    expected = []
    for ids, real, own in zip(inputs["input_ids"], inputs["attention_mask"], maps, strict=True):
        end = int(real.nonzero().max()) + 1
        columns = (ids == token).nonzero().flatten()
        runs = torch.tensor_split(columns, (columns.diff() > 1).nonzero().flatten() + 1)
        expected += [own[:, run[-1] + 1 : end, run] for run in runs]
    assert len(given) == len(expected) == 3
    for picture, (got, wanted) in enumerate(zip(given, expected, strict=True)):
        torch.testing.assert_close(got, wanted, msg=lambda m, i=picture: f"picture {i}: {m}")


def test_a_second_turn_gets_the_maps_of_its_own_tokens(lab, given):
    """Turn two holds a picture of its own; its keys stand behind those of turn one."""
    qwen = lab("qwen-gqa")
    model = qwen.model(attn_implementation="eager")
    inputs = qwen.encode([qwen.picture(0), "what is it?", qwen.picture(1), "and this?"])
    token = model.config.image_token_id
    columns = (inputs["input_ids"][0] == token).nonzero().flatten()
    jump = int((columns.diff() > 1).nonzero()[0]) + 1
    cut = int(columns[jump]) - 1  # turn two starts with the marker in front of its picture
    cache = DynamicCache(config=model.config.get_text_config())
    patches = int(inputs["image_grid_thw"][0].prod())
    pixels = inputs["pixel_values"]
    turns = [(slice(0, cut), pixels[:patches], 0), (slice(cut, None), pixels[patches:], 1)]
    with torch.inference_mode():
        maps = model(**inputs, output_attentions=True).attentions[1][0]
        positions = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )[0]
        with enable(model, POLICY):
            for part, own, picture in turns:
                model(
                    input_ids=inputs["input_ids"][:, part],
                    attention_mask=inputs["attention_mask"][:, : part.stop],
                    mm_token_type_ids=inputs["mm_token_type_ids"][:, part],
                    position_ids=positions[..., part],
                    pixel_values=own,
                    image_grid_thw=inputs["image_grid_thw"][picture : picture + 1],
                    past_key_values=cache,
                )
    run = columns[jump:]
    assert len(given) == 2
    torch.testing.assert_close(given[1], maps[:, run[-1] + 1 :, run])


def test_the_maps_of_a_picture_in_rows_leave_its_separators_out(lab, given):
    qwen = lab("qwen-gqa")
    model = qwen.model(attn_implementation="eager")
    inputs = qwen.encode(["text", qwen.picture(0), "what is it?"])
    with torch.inference_mode():
        maps = model(**inputs, output_attentions=True).attentions[1][0]
        with enable(model, POLICY) as pruning:
            in_rows(pruning, 3)
            model(**inputs)
    columns = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    assert len(columns) == 12
    own = columns[[0, 1, 2, 4, 5, 6, 8, 9, 10]]
    torch.testing.assert_close(given[0], maps[:, columns[-1] :, own])


@pytest.mark.parametrize("need", ["attention", "queries"])
def test_what_a_method_read_is_let_go_before_the_layers_behind_it(lab, monkeypatch, need):
    """A map of a long prompt is large, and layers >= K are many."""
    read = []

    def spy(inputs, k):
        tensor = getattr(inputs, need)
        read.append(weakref.ref(tensor if tensor._base is None else tensor._base))
        return torch.arange(k)

    selector = Selector("spy", "keeps the first", frozenset({need}), spy)
    monkeypatch.setitem(registry().selectors, "spy", selector)
    qwen = lab("qwen-gqa")
    model = qwen.model(attn_implementation="eager")
    alive = []
    model.get_decoder().layers[2].mlp.register_forward_hook(
        lambda *_: alive.append(read[0]() is not None)
    )
    with torch.no_grad(), enable(model, POLICY):
        model(**qwen.encode([qwen.picture(0), "what is it?"]))
    assert alive == [False]


def test_a_session_loads_what_such_a_method_needs(lab, given):
    qwen = lab("qwen-gqa")
    backend = registry().backend("transformers").load()
    with backend.open(qwen.path, PruningPolicy.parse(POLICY), dtype="float32") as session:
        (answer,) = session.generate([Request((qwen.picture(0), "what is it?"), 1)])
    assert len(given) == 1
    assert answer.spans[0].kept == (0, 1, 2)


def test_an_engine_without_maps_refuses_such_a_method(lab, given):
    qwen = lab("qwen-gqa")
    with pytest.raises(UnsupportedError, match="'spy' reads attention maps, which 'sdpa' does"):
        enable(qwen.model(), POLICY)
    with pytest.raises(UnsupportedError, match="'spy' reads attention maps, which a server's"):
        server_settings(PruningPolicy.parse(POLICY), read_config(qwen.path))
    assert given == []
