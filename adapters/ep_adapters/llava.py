"""LLaVA-1.5: every picture takes the same number of tokens and may touch the next one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ep_adapters.decoder import read_decoder
from ep_core.errors import UnsupportedError
from ep_core.family import Config, Family, PatchGrid, Placeholder
from ep_core.plan import Reason, Run, Unprunable, runs_of

# towers with one patch grid for every picture; others (Pixtral) size it by the picture
FIXED_GRID_TOWERS = ("clip_vision_model", "siglip_vision_model")


def find(config: Config, token_ids: Sequence[int]) -> list[Placeholder]:
    """Runs of image tokens, cut into pictures of equal size: nothing stands between two."""
    size = tokens_per_picture(config)
    found = []
    for run in runs_of(token_ids, _image_token(config)):
        if len(run) % size:
            raise Unprunable(
                Reason.LAYOUT,
                f"a run of {len(run)} image tokens is no multiple of {size}, the tokens of one "
                "picture; was the prompt expanded by the checkpoint's own processor?",
            )
        found += [Placeholder(Run(at, at + size)) for at in range(run.start, run.stop, size)]
    return found


def tokens_per_picture(config: Config) -> int:
    """Tokens of one picture: its patches, and the class token where that is kept too."""
    vision = config["vision_config"]
    if vision["model_type"] not in FIXED_GRID_TOWERS:
        raise UnsupportedError(
            f"LLaVA with a {vision['model_type']} tower is not supported; supported are "
            f"{', '.join(FIXED_GRID_TOWERS)}"
        )
    patches: int = (vision["image_size"] // vision["patch_size"]) ** 2
    has_class_token = vision["model_type"] == "clip_vision_model"
    keeps_it = config.get("vision_feature_select_strategy", "default") == "full"
    return patches + (1 if has_class_token and keeps_it else 0)


def patch_grid(config: Config, tokens: int, size: tuple[int, int]) -> PatchGrid:
    """The square grid on the centre of the picture: the processor crops the rest."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UnsupportedError(f"{tokens} tokens, the class token among them, form no grid")
    width, height = size
    left, top = max(0, width - height) / 2, max(0, height - width) / 2
    return PatchGrid(side, side, (left, top, width - left, height - top))


def _image_token(config: Config) -> int:
    # config.json says image_token_index in files older than transformers 4.5x
    token = config.get("image_token_id", config.get("image_token_index"))
    if token is None:
        raise UnsupportedError("config.json names no image token (image_token_id)")
    return int(token)


FAMILY = Family(
    model_type="llava",
    name="LLaVA-1.5",
    default_layer=2,
    default_layer_source="constant for LLaVA-1.5-7B in the released code of arXiv 2602.17196",
    decoder=read_decoder,
    find=find,
    patch_grid=patch_grid,
)
