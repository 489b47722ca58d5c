"""What differs from family to family in transformers; needs no transformers to be read.

A family that is not here works wherever its decoder fits the hooks: `refusals.check_decoder` looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ep_core.family import Config

# which checkpoints of a family were tested, for a table of models
FAMILIES: Mapping[str, str] = {
    "llava": "`-hf` layout, a CLIP tower over Llama or Qwen3",
    "qwen2_5_vl": "yes",
    "qwen2_vl": "yes",
    "internvl": "`-hf` layout, over Qwen2 or Qwen3",
}


def picture_grids(config: Config, given: Mapping[str, Any]) -> list[tuple[int, int]]:
    """`(rows, columns)` of each picture's tokens where the model is told, else an empty list.

    The Qwen families are called with `image_grid_thw`, `[pictures, 3]`: frames, rows and columns of
    patches, squares of which their vision towers merge into one token.

    Args:
        config: config.json of the checkpoint.
        given: arguments of the call by name.
    """
    patches = given.get("image_grid_thw")
    side = config.get("vision_config", {}).get("spatial_merge_size")
    if patches is None or not side:
        return []
    return [(rows // side, columns // side) for _, rows, columns in patches.tolist()]
