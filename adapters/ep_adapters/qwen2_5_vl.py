"""Qwen2.5-VL: every picture stands between two vision tokens; positions are M-RoPE."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ep_adapters.decoder import read_decoder
from ep_core.family import Config, Family, PatchGrid, Placeholder
from ep_core.plan import Reason, Unprunable, runs_of


def find(config: Config, token_ids: Sequence[int]) -> list[Placeholder]:
    """A picture for each run of image tokens: start and end tokens keep them apart."""
    if config["video_token_id"] in token_ids:
        raise Unprunable(Reason.OTHER_MEDIA)
    return [Placeholder(run) for run in runs_of(token_ids, config["image_token_id"])]


def patch_grid(config: Config, tokens: int, size: tuple[int, int]) -> PatchGrid:
    """The grid of `tokens` cells closest to the picture's shape, which resizing keeps."""
    width, height = size
    rows = min(
        (rows for rows in range(1, tokens + 1) if tokens % rows == 0),
        key=lambda rows: abs(math.log(rows * rows / tokens) - math.log(height / width)),
    )
    return PatchGrid(rows, tokens // rows, (0, 0, width, height))


FAMILY = Family(
    model_type="qwen2_5_vl",
    name="Qwen2.5-VL",
    default_layer=1,
    default_layer_source="constant for Qwen2.5-VL-7B in the released code of arXiv 2602.17196",
    decoder=read_decoder,
    find=find,
    patch_grid=patch_grid,
)
