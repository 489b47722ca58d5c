"""What every engine must know of a model family, written once.

An adapter speaks of a checkpoint's config.json and of token ids, never of an engine's classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ep_core.budget import DecoderShape
from ep_core.spans import VisualSpan

Config = Mapping[str, Any]


@dataclass(frozen=True)
class PatchGrid:
    """How a picture's tokens lie on the picture, row by row.

    Attributes:
        rows, columns: the grid; token i is at row `i // columns`, column `i % columns`.
        box: `(left, top, right, bottom)` in pixels of the picture that the grid covers.
    """

    rows: int
    columns: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ModelAdapter:
    """A model family.

    Attributes:
        model_type: `model_type` in config.json.
        family: the name people use.
        default_layer: pruning layer for `layer=auto`.
        default_layer_source: where that layer comes from.
        find_spans: `(config, token ids of an expanded prompt) -> spans`, one for each picture,
            in order. Raises `UnsupportedError` for a prompt whose pictures cannot be told apart.
        decoder_shape: `config -> DecoderShape` of the language model.
        query_norm: `config -> bool`: are queries normalised per head after the projection? Then
            the score reads the normalised ones. Queries are read after the bias and before RoPE.
        patch_grid: `(config, tokens of a picture, (width, height)) -> PatchGrid`.
        cut_along: what else a decoder layer receives with one entry for each token, by the
            names of the family's reference implementation; cut with the hidden states.
    """

    model_type: str
    family: str
    default_layer: int
    default_layer_source: str
    find_spans: Callable[[Config, Sequence[int]], list[VisualSpan]]
    decoder_shape: Callable[[Config], DecoderShape]
    query_norm: Callable[[Config], bool]
    patch_grid: Callable[[Config, int, tuple[int, int]], PatchGrid]
    cut_along: tuple[str, ...]
