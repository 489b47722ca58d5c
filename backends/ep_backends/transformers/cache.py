"""The cache of a pruned prompt: its layer K says which columns layers >= K hold.

A `Cache` of transformers is a list of layers. Where a prompt was pruned, layer K of that list is a
`PrunedLayer`: keys and values like any other layer's, and the `Slots` that tell what they stand
for. It travels with the cache, so that a copy, a reordered batch or a later turn finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ep_core.errors import UnsupportedError
from ep_core.policy import PruningPolicy


@dataclass(frozen=True)
class Slots:
    """What layers >= K of a cache hold.

    Attributes:
        columns: `[B, M]` int64, of each slot the column of layers < K that it holds, or -1 where
            it pads a shorter row.
        padded: there may be a -1 among the columns.
        below: columns that layers < K hold.
        digest: of the policy that chose them.
    """

    columns: torch.Tensor
    padded: bool
    below: int
    digest: str

    def behind(self, earlier: Slots) -> Slots:
        """These slots behind earlier ones."""
        columns = torch.cat([earlier.columns, self.columns], dim=1)
        return replace(self, columns=columns, padded=earlier.padded or self.padded)


class PrunedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped to mypy
    """Layer K of a pruned cache; batch operations carry its slots along.

    Attributes:
        slots: what its keys and values stand for; None for every column of the layers below.
        coming: the slots once the keys and values of this pass are there; None where pruning does
            not take part in the pass.
    """

    slots: Slots | None = None
    coming: Slots | None = None

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> Self:
        """A layer with the keys and values of another, which is left as it is."""
        own = cls()
        own.__dict__.update(vars(layer))
        return own

    @property
    def pruned(self) -> bool:
        """Does it hold a pruned prompt? One that was emptied does not."""
        return self.slots is not None and self.get_seq_length() > 0

    def announce(self, new: Slots) -> Slots:
        """Say what the keys and values of this pass stand for; returns all slots after it."""
        if self.pruned and self.slots is not None:
            new = new.behind(self.slots)
        elif cached := self.get_seq_length():
            whole = torch.arange(cached, device=new.columns.device).expand(len(new.columns), -1)
            new = new.behind(replace(new, columns=whole, padded=False))
        self.coming = new
        return new

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Append keys and values, which a pruned prompt takes from a pruned pass only.

        Raises:
            UnsupportedError: the pass that brings them does not know of pruning.
        """
        if self.coming is None and self.pruned:
            raise UnsupportedError(
                "this cache holds a pruned prompt, and pruning is off; enable the policy that "
                "pruned it to go on, or start from a new DynamicCache"
            )
        self.slots, self.coming = self.coming, None
        return super().update(key_states, value_states, *args, **kwargs)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch."""
        super().reorder_cache(beam_idx)
        self._change_rows(lambda columns: columns[beam_idx.to(columns.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda columns: columns.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)
        self._change_rows(lambda columns: columns[indices])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the tail of layers >= K is not the tail of the layers below."""
        if self.pruned:
            raise UnsupportedError(
                "the cache of a pruned prompt cannot be cropped; start from a new DynamicCache"
            )
        super().crop(*args, **kwargs)

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.slots is not None:
            self.slots = replace(self.slots, columns=change(self.slots.columns))


def check_cache(cache: Any, policy: PruningPolicy) -> bool:
    """Refuse caches that cannot be pruned or continued; does it hold a pruned prompt?

    Raises:
        UnsupportedError: layers of this cache cannot differ in length, or another policy pruned it.
    """
    kinds = {type(layer) for layer in cache.layers} if isinstance(cache, Cache) else {type(cache)}
    if wrong := kinds - {DynamicLayer, PrunedLayer}:
        raise UnsupportedError(
            "pruning works with a DynamicCache of full-attention layers, which may differ in "
            f"length; got {type(cache).__name__} with {wrong.pop().__name__}"
        )
    if cache.offloading:
        raise UnsupportedError("pruning does not work with an offloaded cache")
    slots = slots_of(cache)
    if slots is None:
        return False
    if slots.digest != policy.digest:
        raise UnsupportedError(
            "this cache was pruned under another policy; start from a new DynamicCache"
        )
    if cache.get_seq_length() != slots.below:
        raise UnsupportedError(
            "the cache of a pruned prompt was cropped, or a pass over it failed; start from a new "
            "DynamicCache"
        )
    return True


def slots_of(cache: Cache) -> Slots | None:
    """What layers >= K of a cache hold, if it holds a pruned prompt."""
    for layer in cache.layers:
        if isinstance(layer, PrunedLayer) and layer.pruned:
            return layer.slots
    return None


def pruned_layer(cache: Cache, layer: int) -> PrunedLayer:
    """Layer K of a cache that is about to hold a pruned prompt, in the place of what was there."""
    if len(cache.layers) == layer:  # a cache that grows by itself
        cache.layers.append(PrunedLayer())
    if not isinstance(cache.layers[layer], PrunedLayer):
        cache.layers[layer] = PrunedLayer.adopt(cache.layers[layer])
    found: PrunedLayer = cache.layers[layer]
    return found
