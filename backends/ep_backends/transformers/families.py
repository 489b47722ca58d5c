"""What differs from family to family in transformers; needs no transformers to be read.

A family that is not here works wherever its decoder fits the hooks: `ledger.check_decoder` looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ep_core.family import Config


@dataclass(frozen=True)
class TransformersFamily:
    """A family that was tested in transformers.

    Attributes:
        decoders: classes of its decoders' layers, as `module:Class` in `transformers.models`.
        works: which of its checkpoints, for a table of models.
    """

    decoders: tuple[str, ...]
    works: str


LLAMA = "llama.modeling_llama:LlamaDecoderLayer"
QWEN2 = "qwen2.modeling_qwen2:Qwen2DecoderLayer"
QWEN3 = "qwen3.modeling_qwen3:Qwen3DecoderLayer"

FAMILIES: Mapping[str, TransformersFamily] = {
    "llava": TransformersFamily((LLAMA, QWEN3), "`-hf` layout, a CLIP tower over Llama or Qwen3"),
    "qwen2_5_vl": TransformersFamily(
        ("qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLDecoderLayer",), "yes"
    ),
    "qwen2_vl": TransformersFamily(("qwen2_vl.modeling_qwen2_vl:Qwen2VLDecoderLayer",), "yes"),
    "internvl": TransformersFamily((QWEN2, QWEN3), "`-hf` layout, over Qwen2 or Qwen3"),
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
