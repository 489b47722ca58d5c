"""The hooks between a decoder's layers, on decoders made for the tests."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ep_backends.sglang.families import check_checkpoint, check_decoder
from ep_core.errors import UnsupportedError
from ep_core.plan import PlannedUnit, RequestPlan, Run, Unit
from ep_core.selectors import Selector, top_k

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

LARGEST = Selector(
    "largest", "for tests", frozenset({"hidden"}), lambda inputs, k: top_k(inputs.hidden[:, 0], k)
)
LAYERS, K, TOKENS = 5, 2, 12
PLAN = RequestPlan.of([PlannedUnit(Unit((Run(2, 8),)), 2)], TOKENS)


class Layer(nn.Module):
    """Adds a tenth to each token, and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, positions, hidden_states, forward_batch, extra=None, capture_output=None):
        self.seen = {
            "positions": positions.tolist(),
            "hidden": hidden_states[:, 0].tolist(),
            "extra": extra,
            "capture_output": capture_output,
        }
        from sglang.srt.layers.layer_boundary.residual import batch as residual

        return residual.set_written(hidden_states + 0.1, forward_batch)


class Attention:
    """In the place of `PrunedAttention`: slots count from 100."""

    def __init__(self):
        self.dropped, self.slots_from_k = [], []

    def slots(self, row, start, stop):
        return torch.arange(100 + start, 100 + stop)

    def drop(self, slots):
        self.dropped += slots.tolist()
        return slots

    def begin_kept_layers(self, batch, slots):
        self.slots_from_k = slots.tolist()


def run(call, plan=PLAN, mode="EXTEND"):
    """A pass of one prompt through a decoder; its layers, attention, request and output.

    Args:
        call: calls a layer with positions, hidden states and batch.
    """
    from sglang.srt.layers.layer_boundary.residual import batch as residual
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from ep_backends.sglang.batch import ForwardPass
    from ep_backends.sglang.prefill import LayerHooks
    from ep_backends.sglang.requests import SGLangRequest

    layers, attention = nn.ModuleList(Layer() for _ in range(LAYERS)), Attention()
    LayerHooks(attention, LARGEST, K, (1, 1)).attach(layers)
    request = SGLangRequest(plan)
    batch = SimpleNamespace(
        forward_mode=ForwardMode[mode],
        extend_prefix_lens=None,
        extend_seq_lens=None,
        extend_prefix_lens_cpu=[0],
        extend_seq_lens_cpu=[TOKENS],
        req_pool_indices=None,
        req_pool_indices_cpu=torch.zeros(1, dtype=torch.int64),
        out_cache_loc=torch.arange(100, 100 + TOKENS),
        global_num_token_non_padded_cpu=TOKENS,
        pruning=ForwardPass([request]),
    )
    residual.start(batch)
    hidden = torch.tensor([0.0, 0, 5, 9, 1, 8, 2, 3, 0, 0, 0, 0])[:, None]
    for layer in layers:
        hidden = call(layer, torch.arange(TOKENS), hidden, batch)
    return SimpleNamespace(
        layers=layers, attention=attention, request=request, output=hidden, batch=batch
    )


STAY = [0, 1, 3, 5, 8, 9, 10, 11]  # of the unit [2, 8) the largest two
CALLS = {
    "by position": lambda layer, p, h, b: layer(p, h, b, "extra", capture_output="a hook"),
    "by name": lambda layer, p, h, b: layer(
        hidden_states=h, forward_batch=b, positions=p, extra="extra", capture_output="a hook"
    ),
    "mixed": lambda layer, p, h, b: layer(
        p, h, forward_batch=b, extra="extra", capture_output="a hook"
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_layers_from_k_on_get_what_stays_and_every_other_input_unharmed(call):
    """SGLang calls layers by position or by name, and hands some of them more than three inputs."""
    done = run(call)
    for index, layer in enumerate(done.layers):
        expected = STAY if index >= K else list(range(TOKENS))
        assert layer.seen["positions"] == expected, f"layer {index}"
        assert len(layer.seen["hidden"]) == len(expected), f"layer {index}"
        assert layer.seen["extra"] == "extra", f"layer {index}"
        assert layer.seen["capture_output"] == "a hook", f"layer {index}"
    assert done.attention.slots_from_k == [100 + i for i in STAY]
    assert sorted(done.attention.dropped) == [102, 104, 106, 107]
    assert sorted(done.request.dropped.take().tolist()) == [102, 104, 106, 107]


def test_the_output_has_a_row_for_each_token_and_zeros_for_those_dropped():
    done = run(CALLS["by position"])
    first = torch.tensor([0.0, 0, 5, 9, 1, 8, 2, 3, 0, 0, 0, 0])
    expected = torch.zeros(TOKENS)
    expected[STAY] = first[STAY] + 0.1 * LAYERS
    assert torch.allclose(done.output[:, 0], expected)
    assert done.batch.global_num_token_non_padded_cpu == TOKENS, "the batch was left changed"


@pytest.mark.parametrize(
    ("plan", "mode"), [(RequestPlan.of([], TOKENS), "EXTEND"), (PLAN, "DECODE")]
)
def test_a_pass_that_drops_nothing_is_left_alone(plan, mode):
    done = run(CALLS["by position"], plan, mode)
    for layer in done.layers:
        assert layer.seen["positions"] == list(range(TOKENS))
        assert layer.seen["capture_output"] == "a hook"
    assert len(done.request.dropped) == 0


def test_the_conformance_suites_selection_goes_through_these_hooks(monkeypatch):
    """Level 1 proves nothing about a server, unless what it calls is what requests run through."""
    from ep_backends.sglang.prefill import LayerHooks, select

    calls = []
    for name in ("enter_attention", "after_projection", "between", "_cut", "_drop"):
        original = getattr(LayerHooks, name)

        def noted(*args, original=original, name=name, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(LayerHooks, name, noted)
    hidden = torch.tensor([0.0, 0, 5, 9, 1, 8, 2, 3, 0, 0, 0, 0])[:, None]
    queries = hidden[:, None, :].expand(-1, 2, 4)
    assert select(LARGEST, PLAN, queries, hidden, "cpu") == [[1, 3]]
    assert calls == ["enter_attention", "after_projection", "between", "_cut", "_drop"]


def attention_of(forward, **more):
    fields = {
        "qkv_proj": None,
        "q_size": 8,
        "head_dim": 4,
        "attn": SimpleNamespace(sliding_window_size=-1),
    }
    return type("SomeAttention", (), {"forward": forward, **fields, **more})()


def right(self, positions, hidden_states, forward_batch):
    """The inputs that pruning relies on."""


def layer_of(forward=right, attention=right, **more):
    return type(
        "SomeLayer", (), {"forward": forward, "self_attn": attention_of(attention, **more)}
    )()


def test_a_decoder_as_pruning_relies_on_is_accepted():
    def with_more(self, positions, hidden_states, forward_batch, capture_output=None):
        """As Qwen's layers are."""

    check_decoder([layer_of(with_more)] * 3, 2)


def carries_residual(self, positions, hidden_states, forward_batch, residual):
    """As layers of older models of SGLang's are."""


def other_order(self, hidden_states, positions, forward_batch):
    """No layer of SGLang's yet."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (layer_of(carries_residual), "SomeLayer is given its residual apart"),
        (layer_of(other_order), "SomeLayer takes hidden_states, positions, forward_batch"),
        (layer_of(attention=other_order), "SomeAttention takes hidden_states, positions"),
        (layer_of(q_norm=None), "normalises its queries"),
        (layer_of(attn=SimpleNamespace(sliding_window_size=64)), "sliding-window"),
    ],
)
def test_a_decoder_that_the_hooks_do_not_fit_is_refused(layer, message):
    with pytest.raises(UnsupportedError, match=message):
        check_decoder([layer] * 3, 2)


def test_a_model_of_sglangs_that_carries_its_residual_is_refused():
    from sglang.srt.models.ernie4 import Ernie4DecoderLayer

    assert "residual" in inspect.signature(Ernie4DecoderLayer.forward).parameters
    layer = object.__new__(Ernie4DecoderLayer)
    nn.Module.__init__(layer)
    layer.self_attn = nn.Module()
    layer.self_attn.forward = right.__get__(layer.self_attn)
    with pytest.raises(UnsupportedError, match=r"residual"):
        check_decoder([layer] * 3, 2)


LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "image_aspect_ratio": "pad",
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAVA | {"architectures": ["LlavaForConditionalGeneration"]}, "Hugging Face layout"),
        (LLAVA | {"architectures": ["LlavaQwenForCausalLM"]}, "only LLaVA-1.5 was tested"),
        (LLAVA | {"image_aspect_ratio": "anyres"}, "only LLaVA-1.5 was tested"),
        (LLAVA | {"image_aspect_ratio": "anyres_max_9"}, "only LLaVA-1.5 was tested"),
        (
            {"model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"]},
            "runs InternVLForConditionalGeneration with transformers' model code",
        ),
    ],
)
def test_a_checkpoint_that_sglang_or_the_hooks_cannot_run_is_refused(config, message):
    with pytest.raises(UnsupportedError, match=message):
        check_checkpoint(config)


@pytest.mark.parametrize("config", [LLAVA, {"model_type": "qwen2_5_vl"}, {"model_type": "other"}])
def test_other_checkpoints_are_left_to_their_decoders(config):
    check_checkpoint(config)
