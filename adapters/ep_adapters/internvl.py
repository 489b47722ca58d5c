"""InternVL3 in its Hugging Face layout: a picture is one tile, or several and a thumbnail.

The processor puts `<img>` and `</img>` around each picture, and nothing between its tiles. A video
is one such picture for each frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ep_adapters.decoder import read_decoder
from ep_core.errors import UnsupportedError
from ep_core.family import Config, Family, PatchGrid, Placeholder
from ep_core.plan import Reason, Unprunable, runs_of


def find(config: Config, token_ids: Sequence[int]) -> list[Placeholder]:
    """A picture with all its tiles for each run of image tokens."""
    tile = tokens_per_tile(config)
    runs = runs_of(token_ids, config["image_token_id"])
    for run in runs:
        # two tiles are never one picture: several tiles bring a thumbnail
        if len(run) % tile or len(run) == 2 * tile:
            raise Unprunable(
                Reason.LAYOUT,
                f"a run of {len(run)} image tokens is no picture: one tile of {tile}, or several "
                "and a thumbnail; was the prompt expanded by the checkpoint's own processor?",
            )
    return [Placeholder(run) for run in runs]


def tokens_per_tile(config: Config) -> int:
    """Tokens of one tile; a thumbnail has as many."""
    if "image_seq_length" not in config:
        raise UnsupportedError("config.json does not give the tokens of a tile (image_seq_length)")
    return int(config["image_seq_length"])


def patch_grid(config: Config, tokens: int, size: tuple[int, int]) -> PatchGrid:
    """The square grid of a picture of one tile, which is stretched and not cropped."""
    tile = tokens_per_tile(config)
    if tokens != tile:
        raise UnsupportedError(
            f"{tokens} tokens form no grid: tiles of {tile} follow one another, then a thumbnail "
            "of the same picture; only a picture of one tile has a grid"
        )
    side = math.isqrt(tokens)
    return PatchGrid(side, side, (0, 0, *size))


FAMILY = Family(
    model_type="internvl",
    name="InternVL3",
    default_layer=2,
    default_layer_source="that of LLaVA-1.5: the code of arXiv 2602.17196 has none for this family",
    decoder=read_decoder,
    find=find,
    patch_grid=patch_grid,
)
