"""What VisionZip reads of a vision tower, recomputed without transformers' attention."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as host

from ep_core import EntropyPruneError, demo
from ep_peers.tower import received_attention


@pytest.fixture
def model() -> Any:
    """A model of its own for each test: they change its tower."""
    return AutoModelForImageTextToText.from_pretrained(demo.MODEL, dtype=torch.float32).eval()


@pytest.fixture
def picture():
    """6 x 8 patches, which the tower holds in windows of 4 x 4 tokens at most."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6 * 8 * 4, 1176, generator=generator), torch.tensor([[1, 12, 16]])


def test_received_attention_is_the_mean_over_heads_lookers_and_own_patches(model, picture):
    tower, seen = model.model.visual, {}

    def remember(module, args, kwargs):
        seen["x"] = kwargs.get("hidden_states", args[0] if args else None)
        seen["turn"] = kwargs["position_embeddings"]

    handle = tower.blocks[-2].attn.register_forward_pre_hook(remember, with_kwargs=True)
    tower.window_size = 10_000  # one window: tokens stay in the order of the picture
    received = received_attention(model, *picture)
    handle.remove()
    attention = tower.blocks[-2].attn
    with torch.no_grad():
        q, k, _ = attention.qkv(seen["x"]).view(192, 3, attention.num_heads, -1).unbind(1)
        q, k = host.apply_rotary_pos_emb_vision(q, k, *seen["turn"])
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        expected = scores.softmax(dim=-1).sum(dim=(0, 1)) / (attention.num_heads * 192)
    expected = torch.stack([expected[4 * i : 4 * i + 4].mean() for i in range(48)])
    torch.testing.assert_close(received, expected)


def test_windows_do_not_change_whose_attention_it_is(model, picture):
    """Every block of this tower sees the whole picture, so windows only reorder its tokens."""
    in_windows = received_attention(model, *picture)
    model.model.visual.window_size = 10_000
    torch.testing.assert_close(in_windows, received_attention(model, *picture))


def test_the_tower_is_left_as_it_was(model, picture):
    before = model.model.get_image_features(*picture).pooler_output[0]
    received_attention(model, *picture)
    after = model.model.get_image_features(*picture).pooler_output[0]
    assert torch.equal(before, after)
    assert model.model.visual.config._attn_implementation == "sdpa"


def test_a_block_that_sees_windows_only_is_refused(model, picture):
    model.model.visual.fullatt_block_indexes = [2]
    with pytest.raises(EntropyPruneError, match="sees windows of the picture only"):
        received_attention(model, *picture)
