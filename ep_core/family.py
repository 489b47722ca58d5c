"""What every engine must know of a model family, written once.

A family speaks of a checkpoint's config.json and of the prompt, never of an engine's classes. Each
engine has a table of what differs there (`families.py` of its backend).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ep_core.budget import DecoderShape
from ep_core.plan import Run, Unit

Config = Mapping[str, Any]

FULL_ATTENTION = "full_attention"


@dataclass(frozen=True)
class Decoder:
    """A checkpoint's language model.

    Attributes:
        shape: its sizes.
        query_norm: are queries normalised per head after the projection? Then scores read the
            normalised ones. Queries are read after the bias and before RoPE.
        layer_kinds: the kinds of its layers, as transformers names them.
        adds_after: layers after which features of the visual tokens are added to the hidden
            states (DeepStack), counted from 0.
    """

    shape: DecoderShape
    query_norm: bool = False
    layer_kinds: frozenset[str] = frozenset({FULL_ATTENTION})
    adds_after: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Placeholder:
    """Where a host put one visual item into a prompt.

    Attributes:
        run: its tokens, with the separators that stand among them.
        grid: `(rows, columns)` of its tokens, where the host knows it.
    """

    run: Run
    grid: tuple[int, int] | None = None


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


def one_unit(config: Config, placeholder: Placeholder, item: int) -> tuple[Unit, ...]:
    """The layout of most families: all tokens of a picture are ranked together."""
    return (Unit((placeholder.run,), item, placeholder.grid),)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: `model_type` in config.json.
        name: the name people use.
        default_layer: pruning layer for `layer=auto`.
        default_layer_source: where that layer comes from.
        decoder: `config -> Decoder`. Raises `UnsupportedError` where config.json says too little.
        find: `(config, token ids of an expanded prompt) -> placeholders`, one for each visual item,
            in order. Engines that know where they put an item do not ask. Raises `Unprunable` for
            a prompt whose items cannot be told apart.
        patch_grid: `(config, tokens of a picture, (width, height)) -> PatchGrid`, for drawing.
        layout: `(config, placeholder, number of the item) -> units` of one visual item.
    """

    model_type: str
    name: str
    default_layer: int
    default_layer_source: str
    decoder: Callable[[Config], Decoder]
    find: Callable[[Config, Sequence[int]], list[Placeholder]]
    patch_grid: Callable[[Config, int, tuple[int, int]], PatchGrid]
    layout: Callable[[Config, Placeholder, int], tuple[Unit, ...]] = one_unit

    def units(self, config: Config, placeholders: Sequence[Placeholder]) -> list[Unit]:
        """The units of a prompt, in order, from where its visual items are."""
        return [
            unit
            for item, placeholder in enumerate(placeholders)
            for unit in self.layout(config, placeholder, item)
        ]
