"""KV memory of layers >= K: dropped tokens' slots are given back, and the prefix cache knows it.

SGLang can hold the KV of two groups of layers in two pools, each with its own slots, for models
that mix full and sliding-window attention; a mapping leads from a token's slot in the first pool
to its slot in the second. Here the first pool serves the layers below K and the second, the kept
pool, those from K on, without any window. **A token is kept if and only if its slot maps to one
of the kept pool** (0 is no slot): attention, the prefix cache and the reports all read that
mapping, so there is no second record that could go stale. How many tokens of a request that are is
in its plan, which nobody changes.

SGLang calls the second pool `swa`, and so do its methods that are overridden here.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.mem_cache.prefill_budget import SWAPrefillBudget
from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.components.swa import SWAComponent
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from ep_backends.sglang.plugin import verify
from ep_backends.sglang.requests import SGLangRequest, publish, request_of
from ep_core.report import RequestRecord


def free_kept_slots(
    original: Callable[..., None], allocator: Any, free_index: torch.Tensor, start_pos: int = 0
) -> None:
    """Around `SWATokenToKVPoolAllocator._free_swa_pages`: dropped tokens have nothing to free.

    Args:
        original: the method.
        allocator: the allocator of both pools.
        free_index: `[n]` slots of the first pool.
        start_pos: where they lie in their request.
    """
    if nothing_dropped(allocator):  # then nothing waits for the device
        original(allocator, free_index, start_pos=start_pos)
        return
    held = free_index[allocator.full_to_swa_index_mapping[free_index] > 0]
    if held.numel():
        original(allocator, held, start_pos=start_pos)


def nothing_dropped(allocator: Any) -> bool:
    """Has every token in use a slot in both pools? Host integers only.

    A dropped token's slot goes back to the kept pool before its request frees or caches the token
    (`KeptRadixCache._free_dropped`), so of those that this is asked about none is overlooked.
    """
    full = allocator.size_full - allocator.full_available_size()
    return bool(full == allocator.size_swa - allocator.swa_available_size())


class KeptBudget(SWAPrefillBudget):  # type: ignore[misc]  # sglang is untyped
    """What one prefill pass may take of the kept pool.

    The base class is made for windows: there decoding takes nothing more of the pool, and every
    request can have a window of its own. Neither is so here.
    """

    _cut = False  # a prompt of this pass is cut into chunks; SGLang can keep track of one

    @property
    def remaining_swa(self) -> int:
        """Slots that are free or can be evicted, less what running requests will decode."""
        free = self.allocator.swa_available_size() + self.tree_cache.swa_evictable_size()
        return int(free - self.total_offset)

    def swa_never_fits(self, extend_input_len: int, max_new_tokens: int, **kwargs: Any) -> bool:
        """Must a prompt come in chunks, because waiting makes no room for all of it at once?

        Its own cached prefix takes part of the pool: if nobody else is there, what is not free now
        never will be.
        """
        held = self.tree_cache.swa_protected_size()
        alone = self.remaining_swa + held == self.allocator.size_swa
        return bool(alone or super().swa_never_fits(extend_input_len, max_new_tokens, **kwargs))

    def check_prefill(self, *, extend_input_len: int, **kwargs: Any) -> tuple[bool, int | None]:
        """As the base class, but one prompt at most is cut in a pass."""
        fits, limit = super().check_prefill(extend_input_len=extend_input_len, **kwargs)
        if fits and limit is not None and limit < extend_input_len:
            if self._cut:
                return False, None
            self._cut = True
        return fits, limit

    def reserve(self, *args: Any, is_chunked_continuation: bool = False, **kwargs: Any) -> None:
        """Count an admitted request."""
        self._cut |= is_chunked_continuation
        super().reserve(*args, is_chunked_continuation=is_chunked_continuation, **kwargs)


def reserve_kept(
    original: Callable[..., Any],
    allocator: Any,
    tree_cache: Any,
    *,
    num_mixed_decode_tokens: int = 0,
) -> KeptBudget:
    """Around `SWATokenToKVPoolAllocator.create_prefill_budget`."""
    return KeptBudget(allocator, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)


class KeptComponent(SWAComponent):  # type: ignore[misc]  # sglang is untyped
    """The kept pool's side of the prefix tree: a node holds fewer slots than tokens.

    A node's value has one entry for each token, 0 where the token was dropped, so splitting is the
    base class's; what is counted, locked and evicted are the slots that are really there.
    """

    def reclaimable_value_len(self, node: Any) -> int:
        """Slots of the kept pool that evicting a node gives back."""
        data = node.component_data[self.component_type]
        if data.value is None:
            return 0
        if nothing_dropped(self.cache.token_to_kv_pool_allocator):
            return len(data.value)
        # counting waits for the device: once for each value is enough
        value, count = data.metadata.get("held", (None, 0))
        if value is not data.value:
            count = int((data.value > 0).sum())
            data.metadata["held"] = (data.value, count)
        return int(count)

    def prepare_for_caching_req(
        self, req: Any, insert_params: Any, token_ids_len: int, is_finished: bool
    ) -> int | None:
        """Keep a picture out of the tree until all of its tokens were ranked."""
        limit = super().prepare_for_caching_req(req, insert_params, token_ids_len, is_finished)
        limits = [] if limit is None else [int(limit)]
        if (request := request_of(req)) is not None:
            if cut := request.plan.unit_at(token_ids_len):
                limits.append(cut.unit.start)
            if request.cacheable is not None:
                limits.append(request.cacheable)
        return min(limits, default=None)

    # The base class frees the oldest window first, wherever it lies in the tree. A prefix is of no
    # use without its beginning: here the least recent leaf goes, with its slots in both pools.

    def _evict_device_start(self, request_cnt: int) -> None:
        self._wanted, self._evicted = request_cnt, None
        self._leaves = [(self._age(leaf), leaf) for leaf in self.tree_core.evictable_device_leaves]
        heapq.heapify(self._leaves)

    def _evict_device_next_node(self, tracker: Any, *args: Any, **kwargs: Any) -> Any:
        evictable, last = self.tree_core.evictable_device_leaves, self._evicted
        self._evicted = None
        if last is not None and last.parent in evictable:  # its last child is gone
            heapq.heappush(self._leaves, (self._age(last.parent), last.parent))
        while tracker[self.component_type] < self._wanted and self._leaves:
            _, leaf = heapq.heappop(self._leaves)
            if leaf in evictable:
                self._evicted = leaf
                return leaf.id
        return None

    def _evict_device_end(self) -> None:
        self._leaves, self._evicted = [], None

    def _age(self, node: Any) -> Any:
        return self.tree_core.eviction_strategy.get_priority(node)


class KeptRadixCache(UnifiedRadixCache):  # type: ignore[misc]  # sglang is untyped
    """The unified radix cache with a `KeptComponent` for the layers from K on."""

    def __init__(self, params: Any) -> None:
        # requests that lost tokens; SGLang holds them as long as they live
        self._pruned: weakref.WeakSet[Any] = weakref.WeakSet()
        super().__init__(params)

    def _match_tree(self, params: Any) -> Any:
        """Cut a hit that ends inside a picture back to the picture's start.

        Its tail was evicted or never cached; a set is selected from the whole picture.
        """
        result = super()._match_tree(params)
        request = request_of(params.req)
        if request is None:
            return result
        request.cacheable = None
        if (cut := request.plan.unit_at(result.device_prefix_len)) is None:
            return result
        # nor may it come to lie on the tree's half of it: the two may keep different tokens
        request.cacheable = cut.unit.start
        return super()._match_tree(replace(params, key=params.key[: cut.unit.start]))

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Give back what the request's prefill dropped, then insert what it holds."""
        request = request_of(req)
        if request is not None:
            self._free_dropped(request)
            self._describe(req, request, up_to)
            if request.plan.dropped:
                self._pruned.add(req)
        super().checkpoint(req, up_to=up_to, **kwargs)

    def claim_kv_row(self, req: Any) -> bool:
        """A request's slots are about to be freed: those that were dropped as well."""
        if (request := request_of(req)) is not None:
            self._free_dropped(request)
        return bool(super().claim_kv_row(req))

    def swa_transient_size(self) -> int:
        """For SGLang's check while it is busy (off by default): the kept slots that its count has
        too many, for it counts one for each token that a request owns.
        """
        return -sum(map(_freed, self._pruned))

    def _free_dropped(self, request: SGLangRequest) -> None:
        """Give the slots that a prefill dropped back to the kept pool."""
        if request.dropped:
            self.token_to_kv_pool_allocator.swa_attn_allocator.free(request.dropped.take())

    def _describe(self, req: Any, request: SGLangRequest, up_to: int) -> None:
        """Once the prompt is in, say which tokens were kept, if the request asks for that."""
        if not request.details or request.described:
            return
        request.chunks += 1
        tokens = request.plan.prompt_tokens
        if up_to < tokens:
            return
        request.described = True
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :tokens].long()
        held = self.token_to_kv_pool_allocator.full_to_swa_index_mapping[row] > 0
        kept = []
        for planned in request.plan.pruned:
            own = torch.tensor(planned.unit.offsets, device=held.device) + planned.unit.start
            kept.append(held[own].nonzero().flatten().tolist())
        record = RequestRecord.of(request.plan, kept)
        publish(req, request.detailed_report(record.spans, int((row > 0).sum()), int(held.sum())))


def _freed(req: Any) -> int:
    """Kept slots of a request's own tokens, the tree's left out, that are free already."""
    request = request_of(req)
    if request is None or not req.kv.holds_kv:
        return 0
    before, own = req.kv.cache_protected_len, req.kv.kv_allocated_len
    plan = request.plan
    dropped = plan.dropped_before(own) - plan.dropped_before(before)
    return dropped - len(request.dropped)


def build_radix_cache(context: Any) -> Any:
    """Factory of the prefix cache, registered with SGLang as `RADIX_CACHE`."""
    verify()
    context.params.component_registry_override = {ComponentType.SWA: KeptComponent}
    # no window: a token is dropped by choice, never for its age
    context.params.sliding_window_size = context.model_config.context_len
    return create_unified_radix_cache(context, cache_class=KeptRadixCache)
