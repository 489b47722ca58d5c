"""VisionZip (arXiv 2412.04467): the tokens that the vision tower attends to most.

Only its dominant tokens; it also merges the others. A tower with a [CLS] token would be read there;
Qwen2.5-VL's has none, and the paper then takes what a token receives from all others. Selectors see
the language model only, so the caller reads the tower and says which picture answers are about:

    received = received_attention(model, pixel_values, grid)
    with looking_at(received):
        model.generate(...)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa
from transformers.vision_utils import get_vision_window_index

from ep_core.errors import EntropyPruneError
from ep_core.selectors import Selector, SpanInputs, top_k

_BLOCK = -2  # the paper reads the tower's last but one layer
_RECORDING = "ep_peers_recording"
_seen: list[torch.Tensor] = []


@contextmanager
def looking_at(received: torch.Tensor) -> Iterator[None]:
    """Answers inside are about this picture: `[N]` from `received_attention`."""
    _seen.append(received)
    try:
        yield
    finally:
        _seen.pop()


@torch.no_grad()
def received_attention(model: Any, pixel_values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Attention that each visual token of one picture receives in Qwen2.5-VL's vision tower.

    Args:
        model: transformers' Qwen2.5-VL; the tower's block -2 has to see the whole picture.
        pixel_values: `[patches, C]` from the image processor.
        grid: `[1, 3]` frames, rows and columns of patches.

    Returns:
        `[N]` float32: mean over the heads, over all patches that look, and over a token's patches.
    """
    tower = model.model.visual
    config = tower.config
    if len(tower.blocks) + _BLOCK not in tower.fullatt_block_indexes:
        raise EntropyPruneError("the tower's last but one block sees windows of the picture only")
    maps: list[torch.Tensor] = []

    def attend(
        module: Any, query: Any, key: Any, *rest: Any, scaling: float, **options: Any
    ) -> Any:
        if module is tower.blocks[_BLOCK].attn:
            maps.append((query.float() @ key.float().mT * scaling).softmax(dim=-1))
        return sdpa(module, query, key, *rest, scaling=scaling, **options)

    AttentionInterface.register(_RECORDING, attend)
    before, config._attn_implementation = config._attn_implementation, _RECORDING
    try:
        model.model.get_image_features(pixel_values, grid)
    finally:
        config._attn_implementation = before
    by_patch = maps[0].mean(dim=(0, 1, 2))  # of [1, H, P, P]
    by_token = by_patch.view(-1, tower.spatial_merge_size**2).mean(dim=1)
    order, _ = get_vision_window_index(  # in which the tower holds the tokens
        grid,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    return by_token[order.argsort()]


def select(inputs: SpanInputs, k: int) -> torch.Tensor:
    """Score: attention received in the vision tower."""
    assert inputs.hidden is not None
    if not _seen or len(_seen[-1]) != len(inputs.hidden):
        raise EntropyPruneError("visionzip-style: say which picture with visionzip.looking_at")
    return top_k(_seen[-1], k).to(inputs.hidden.device)


SELECTOR = Selector(
    "visionzip-style",
    "most attended to in the vision tower (needs ep_peers.visionzip.looking_at)",
    frozenset({"hidden"}),
    select,
)
