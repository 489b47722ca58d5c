"""Which query states the score reads: after bias and per-head norm, before RoPE."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlavaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ep_backends.transformers import enable
from ep_core import SpanInputs, UnsupportedError
from ep_core.plugins import registry

DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}


def llava_over(text_config: Any) -> Any:
    vision_config = CLIPVisionConfig(image_size=56, **TOWER)
    return LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_id=63)


def internvl_over(text_config: Any) -> Any:
    return InternVLConfig(
        vision_config=InternVLVisionConfig(image_size=112, **TOWER),
        text_config=text_config,
        image_token_id=63,
        image_seq_length=16,
    )


@pytest.mark.parametrize(("family_over", "side"), [(llava_over, 56), (internvl_over, 112)])
def test_a_decoder_with_query_norm_is_read_after_the_norm(family_over, side):
    """A Qwen3 decoder: the oracle does not know it, so the queries are recomputed here."""
    torch.manual_seed(0)
    config = family_over(Qwen3Config(**DECODER))
    model: Any = AutoModelForImageTextToText.from_config(config).eval()
    for layer in model.get_decoder().layers:
        torch.nn.init.normal_(layer.self_attn.q_norm.weight, 1.0, 0.5)
    ids = torch.tensor([[1, 2, *[63] * 16, 3, 4]])
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        states = model(input_ids=ids, pixel_values=pixels, output_hidden_states=True).hidden_states
        layer = model.get_decoder().layers[1]
        projected = layer.self_attn.q_proj(layer.input_layernorm(states[1]))
        queries = layer.self_attn.q_norm(projected.view(20, 6, 16))[2:18]
        with enable(model, "layer=2,keep=5,method=rows") as pruning:
            model(input_ids=ids, pixel_values=pixels)
            (span,) = pruning.records[0].spans
    rows = registry().selector("rows")
    with_norm = rows(SpanInputs(queries=queries), 5).tolist()
    without = rows(SpanInputs(queries=projected.view(20, 6, 16)[2:18]), 5).tolist()
    assert with_norm != without, "the case does not tell the two apart"
    assert list(span.kept) == with_norm


def test_a_query_norm_that_the_adapter_does_not_know_of_is_refused():
    text_config = Qwen3MoeConfig(num_experts=2, moe_intermediate_size=16, **DECODER)
    model: Any = AutoModelForImageTextToText.from_config(internvl_over(text_config))
    with pytest.raises(UnsupportedError, match="Qwen3MoeDecoderLayer normalises its queries"):
        enable(model, "layer=2,keep=5")
