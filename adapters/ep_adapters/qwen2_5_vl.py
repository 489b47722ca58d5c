"""Qwen2.5-VL: every picture stands between two vision tokens; positions are M-RoPE."""

from __future__ import annotations

from collections.abc import Sequence

from ep_core.adapter import Config, ModelAdapter
from ep_core.errors import UnsupportedError
from ep_core.spans import VisualSpan, runs_of

from ep_adapters.decoder import decoder_shape, query_norm


def find_spans(config: Config, token_ids: Sequence[int]) -> list[VisualSpan]:
    """One span for each run of image tokens: start and end tokens keep pictures apart."""
    if config["video_token_id"] in token_ids:
        raise UnsupportedError("video prompts are not pruned yet")
    return runs_of(token_ids, config["image_token_id"])


ADAPTER = ModelAdapter(
    model_type="qwen2_5_vl",
    family="Qwen2.5-VL",
    default_layer=1,
    default_layer_source="constant for Qwen2.5-VL-7B in the released code of arXiv 2602.17196",
    find_spans=find_spans,
    decoder_shape=decoder_shape,
    query_norm=query_norm,
    cut_along=("position_embeddings", "position_ids"),
)
