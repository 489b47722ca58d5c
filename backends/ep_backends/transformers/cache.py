"""The cache of a pruned prompt: its layer K remembers which columns layers >= K hold."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ep_core.errors import UnsupportedError
from ep_core.policy import PruningPolicy


class HeldColumns(DynamicLayer):  # type: ignore[misc]  # transformers is untyped to mypy
    """Layer K of a pruned cache; batch operations carry the columns along.

    Attributes:
        columns: `[B, M]` int64, for each slot of layers >= K the column of layers < K that it
            holds, or -1 where it pads a shorter row. None while the cache is empty.
        padded: there may be a -1 among the columns.
        below: columns that layers < K hold.
        digest: of the policy that chose them.
    """

    columns: torch.Tensor | None = None
    padded: bool = False
    below: int = 0
    digest: str = ""

    @classmethod
    def join(
        cls,
        cache: Cache | None,
        policy: PruningPolicy,
        below: int,
        columns: torch.Tensor,
        padded: bool,
    ) -> tuple[torch.Tensor, bool]:
        """Append new columns to those that the cache holds.

        Args:
            cache: the cache of this pass, None where there is none.
            policy: what is pruned, its layer settled.
            below: columns in layers < K, the new ones included.
            columns: `[B, M]` new columns that layers >= K hold.
            padded: there may be a -1 among them.

        Returns:
            All columns that layers >= K hold after this pass, and the same of them.
        """
        if cache is None:
            return columns, padded
        assert isinstance(policy.layer, int)
        if len(cache.layers) == policy.layer:  # a cache that grows by itself
            cache.layers.append(cls())
        layer = cache.layers[policy.layer]
        if not isinstance(layer, cls):
            layer.__class__ = cls  # keeps its keys and values
            assert isinstance(layer, cls)
        before = layer.columns
        if before is None:
            cached = layer.get_seq_length()
            before = torch.arange(cached, device=columns.device).expand(len(columns), -1)
        layer.columns = torch.cat([before, columns], dim=1)
        layer.padded = layer.padded or padded
        layer.below, layer.digest = below, policy.digest
        return layer.columns, layer.padded

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.columns, self.padded = None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch."""
        super().reorder_cache(beam_idx)
        if self.columns is not None:
            self.columns = self.columns[beam_idx.to(self.columns.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        if self.columns is not None:
            self.columns = self.columns.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)
        if self.columns is not None:
            self.columns = self.columns[indices]

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the tail of layers >= K is not the tail of the layers below."""
        raise UnsupportedError("the cache of a pruned prompt cannot be cropped; start a new one")


def check_cache(cache: Any, policy: PruningPolicy) -> HeldColumns | None:
    """Refuse caches that cannot be pruned or continued.

    Returns:
        Layer K of a cache that holds a pruned prompt, None for any other.

    Raises:
        UnsupportedError: layers of this cache cannot differ in length, or another policy pruned it.
    """
    kinds = {type(layer) for layer in cache.layers} if isinstance(cache, Cache) else {type(cache)}
    if wrong := kinds - {DynamicLayer, HeldColumns}:
        raise UnsupportedError(
            "pruning works with a DynamicCache of full-attention layers, which may differ in "
            f"length; got {type(cache).__name__} with {wrong.pop().__name__}"
        )
    if cache.offloading:
        raise UnsupportedError("pruning does not work with an offloaded cache")
    held = held_columns(cache)
    if held is None:
        return None
    if cache.get_seq_length() == 0:  # emptied: it remembers nothing
        held.columns, held.padded = None, False
        return None
    if held.digest != policy.digest:
        raise UnsupportedError(
            "this cache was pruned under another policy; start from a new DynamicCache"
        )
    if cache.get_seq_length() != held.below:
        raise UnsupportedError("the cache of a pruned prompt was cropped; start from a new one")
    return held


def held_columns(cache: Cache) -> HeldColumns | None:
    """Layer K of a cache that holds a pruned prompt, None for any other."""
    for layer in cache.layers:
        if isinstance(layer, HeldColumns) and layer.columns is not None:
            return layer
    return None


def from_layer(cache: Cache | None, layer: int) -> Cache | None:
    """A view of a cache's layers from `layer` on, or None while they are empty."""
    if cache is None or cache.get_seq_length(layer) == 0:
        return None
    return Cache(layers=cache.layers[layer:])
