"""What VisionZip reads of Qwen2.5-VL's vision tower in transformers.

Apart, so that the selectors can be had without transformers.
"""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa
from transformers.vision_utils import get_vision_window_index

from ep_core.errors import EntropyPruneError

_BLOCK = -2  # the paper reads the tower's last but one layer
_RECORDING = "ep_peers_recording"


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
