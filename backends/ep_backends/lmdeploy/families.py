"""What differs from family to family in LMDeploy; needs no LMDeploy to be read.

A family that is not here is tried where LMDeploy has its architecture:
`refusals.check_decoder` looks at the decoder's layers and refuses by name what does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LMDeployFamily:
    """A family that was tested in LMDeploy.

    Attributes:
        architecture: the class that the checkpoint's config.json names.
        moves_pictures: how LMDeploy's template rearranges a message, or "". Sessions of ours then
            render the prompt themselves and hand over token ids, as clients of `/generate` may.
        works: a phrase for tables.
    """

    architecture: str
    moves_pictures: str = ""
    works: str = "yes"


FAMILIES: Mapping[str, LMDeployFamily] = {
    "qwen2_vl": LMDeployFamily(
        "Qwen2VLForConditionalGeneration",
        works="yes; LMDeploy's vision encoder takes GELU where the checkpoint asks for quick GELU",
    ),
    "qwen2_5_vl": LMDeployFamily("Qwen2_5_VLForConditionalGeneration"),
    "llava": LMDeployFamily(
        "LlavaForConditionalGeneration",
        works="`-hf` layout, over Llama or Qwen2",
        moves_pictures="a message's pictures come first, then its first text; others are left out",
    ),
    "internvl": LMDeployFamily(
        "InternVLForConditionalGeneration", works="`-hf` layout, over Qwen2"
    ),
}
