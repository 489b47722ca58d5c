"""Qwen2.5-VL: every picture stands between two vision tokens; positions are M-RoPE."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ep_adapters.decoder import decoder_shape, query_norm
from ep_core.adapter import Config, ModelAdapter, PatchGrid
from ep_core.errors import UnsupportedError
from ep_core.spans import VisualSpan, runs_of


def find_spans(config: Config, token_ids: Sequence[int]) -> list[VisualSpan]:
    """One span for each run of image tokens: start and end tokens keep pictures apart."""
    if config["video_token_id"] in token_ids:
        raise UnsupportedError("video prompts are not pruned yet")
    return runs_of(token_ids, config["image_token_id"])


def patch_grid(config: Config, tokens: int, size: tuple[int, int]) -> PatchGrid:
    """The grid of `tokens` cells closest to the picture's shape, which resizing keeps."""
    width, height = size
    rows = min(
        (rows for rows in range(1, tokens + 1) if tokens % rows == 0),
        key=lambda rows: abs(math.log(rows * rows / tokens) - math.log(height / width)),
    )
    return PatchGrid(rows, tokens // rows, (0, 0, width, height))


ADAPTER = ModelAdapter(
    model_type="qwen2_5_vl",
    family="Qwen2.5-VL",
    default_layer=1,
    default_layer_source="constant for Qwen2.5-VL-7B in the released code of arXiv 2602.17196",
    find_spans=find_spans,
    decoder_shape=decoder_shape,
    query_norm=query_norm,
    patch_grid=patch_grid,
    cut_along=("position_embeddings", "position_ids"),
)
