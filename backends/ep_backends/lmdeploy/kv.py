"""KV memory: layers >= K hold kept tokens, and requests are counted by what they hold.

LMDeploy has one block table for all layers. Here a block holds `block_size` tokens in layers >= K
and `ratio` times as many in the layers below. So a request takes as many blocks as the group of
layers that needs more, and memory goes where the tokens are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lmdeploy.pytorch.engine.cache_engine.layout import (
    CacheAllocation,
    CachePool,
    PackedBlockCacheLayout,
)

from ep_backends.lmdeploy.attached import plan_among
from ep_core.errors import UnsupportedError


def required_blocks(
    original: Callable[..., int], ratio: int, sequence: Any, prealloc_size: int = 0
) -> int:
    """In place of `num_required_blocks`: blocks that a sequence still has to get.

    Args:
        original: LMDeploy's own count, of a sequence that loses no tokens.
        ratio: tokens of a block in layers < K for each of its tokens in layers >= K.
        sequence: LMDeploy's `SchedulerSequence`.
        prealloc_size: tokens to come.
    """
    plan = plan_among(sequence.history_multimodals.multimodals)
    tokens: int = sequence.num_all_ids
    if sequence.kv_token_limit is not None:
        tokens = min(tokens, sequence.kv_token_limit)
    dropped = 0 if plan is None else plan.dropped_before(tokens)
    if not dropped:
        return original(sequence, prealloc_size)
    tokens += prealloc_size
    size: int = sequence.block_size
    blocks = max(math.ceil(tokens / (ratio * size)), math.ceil((tokens - dropped) / size))
    return max(0, blocks - len(sequence.logical_blocks))


@dataclass(frozen=True)
class GroupedLayout:
    """A block-cache layout of LMDeploy's with more pages in layers < K than in the others.

    Attributes:
        below: the layers < K.
        rest: the layers >= K.
        ratio: pages of the former for each of the latter.
    """

    below: PackedBlockCacheLayout
    rest: PackedBlockCacheLayout
    ratio: int

    def allocate(self, num_blocks: int, device: torch.device | str) -> CacheAllocation:
        """Realise the layout: `num_blocks` pages in each layer >= K."""
        below = self.below.allocate(num_blocks * self.ratio, device)
        rest = self.rest.allocate(num_blocks, device)
        # the pages of a block lie next to each other and move together
        folded = tuple(
            CachePool(
                pool.tensor.view(len(pool.tensor), num_blocks, self.ratio * pool.tensor.shape[2]),
                entry_axis=1,
            )
            for pool in below.pools
        )
        # by layer, because the two groups differ in size
        views = tuple(
            (*low, *high) for low, high in zip(below.tensor_views, rest.tensor_views, strict=True)
        )
        return CacheAllocation(pools=folded + rest.pools, tensor_views=views)


def grouped(plan: Any, layer: int, ratio: int) -> Any:
    """LMDeploy's `BlockCachePlan` with the layers in two groups.

    Args:
        plan: LMDeploy's own.
        layer: K.
        ratio: pages below K for each page from K on.

    Raises:
        UnsupportedError: the cache is laid out in a way that was never tested.
    """
    layout = plan.layout
    if type(layout) is not PackedBlockCacheLayout:
        raise UnsupportedError(
            f"the KV cache has the layout {type(layout).__name__}; pruning works with "
            "PackedBlockCacheLayout, the one of plain attention"
        )
    below = dataclasses.replace(layout, num_layers=layer)
    rest = dataclasses.replace(layout, num_layers=layout.num_layers - layer)
    return dataclasses.replace(plan, layout=GroupedLayout(below, rest, ratio))


def pages_below(pages: torch.Tensor, per_block: int, ratio: int) -> torch.Tensor:
    """The pages of layers < K for a table of pages of layers >= K.

    Args:
        pages: `[B, W]`, `per_block` neighbouring pages for each block.
        per_block: kernel pages of a block.
        ratio: pages below K for each page from K on.

    Returns:
        `[B, W * ratio]` of the same dtype.
    """
    blocks = pages[:, ::per_block] // per_block
    within = torch.arange(per_block * ratio, dtype=pages.dtype, device=pages.device)
    return (blocks[:, :, None] * (per_block * ratio) + within).flatten(1)
