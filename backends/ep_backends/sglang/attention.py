"""Attention over two sets of tokens: all of them below layer K, the kept ones from there on.

No kernel is written here. Two instances of the server's own attention backend run side by side,
each in a plain world of its own: a KV pool of its layers and a table of its tokens' slots. The
second table is packed anew before each pass, so that it cannot go stale; how many tokens each row
keeps is known on the host, from the plans of the requests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator

from ep_backends.sglang.batch import kept_lengths, on_host, pass_of, prefill_of

# What both instances say alike. Whatever else `AttentionBackend` declares stays at its "no": one
# instance cannot promise it for both.
OF_BOTH = (
    "data_type",
    "kv_cache_dtype",
    "extend_dummy_seqs_capped_by_req_pool",
    "prefill_attention_backend_str",
    "decode_attention_backend_str",
)


class _RunnerView:
    """A model runner to build one instance for, with its own pool and table."""

    def __init__(self, runner: Any, kv_pool: Any, table: Any) -> None:
        vars(self).update(
            _runner=runner,
            token_to_kv_pool=kv_pool,
            req_to_token_pool=table,
            kv_index_translator=KVIndexTranslator(
                req_to_token=table.req_to_token,
                token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
                token_to_kv_pool=kv_pool,
                page_size=runner.page_size,
                device=runner.device,
            ),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class PrunedAttention(AttentionBackend):  # type: ignore[misc]  # sglang is untyped
    """The attention backend that SGLang sees.

    Attributes:
        full: instance for the layers below K.
        kept: instance for the layers from K on.
    """

    # how many tokens a row keeps is counted on the host
    needs_cpu_seq_lens = True

    def __init__(self, runner: Any, layer: int, build: Callable[[Any], Any]) -> None:
        """Build both instances.

        Args:
            runner: SGLang's `ModelRunner`, its pools allocated.
            layer: K.
            build: makes an attention backend for a runner.
        """
        super().__init__()
        pools, rows = runner.token_to_kv_pool, runner.req_to_token_pool
        self._layer = layer
        self._rows: torch.Tensor = rows.req_to_token
        self._mapping: torch.Tensor = pools.full_to_swa_index_mapping
        self.full = build(_RunnerView(runner, pools.full_kv_pool, rows))
        kept_pool = copy.copy(pools.swa_kv_pool)  # shares the buffers
        kept_pool.start_layer = layer
        # no request keeps more tokens than the pool has slots (a padded lane reads slot 0)
        columns = min(rows.req_to_token.shape[1], pools.size_swa + 1)
        kept_rows = copy.copy(rows)
        kept_rows.req_to_token = torch.zeros_like(rows.req_to_token[:, :columns])
        self._kept_rows: torch.Tensor = kept_rows.req_to_token
        self.kept = build(_RunnerView(runner, kept_pool, kept_rows))
        for name in OF_BOTH:
            setattr(self, name, getattr(self.full, name))
        # and what is the server's, not an instance's
        self.kv_index_translator = runner.kv_index_translator
        self.token_to_kv_pool, self.req_to_token_pool = pools, rows

    def shared_read_ends(self, fm: Any) -> Any:
        """When a pass has read for the last time what the scheduler may change: the latest."""
        ends = [each.shared_read_ends(fm) for each in (self.full, self.kept)]
        return SharedReadEnds.max_of([super().shared_read_ends(fm), *ends])

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare an eager forward pass; the layers >= K of an extend batch wait for layer K."""
        self.full.init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_decode():
            self.kept.init_forward_metadata(self._decode_view(forward_batch))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Attention of one layer, by the instance that holds its tokens."""
        if layer.layer_id < self._layer:
            return self.full.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        kept = pass_of(forward_batch).kept
        return self.kept.forward(q, k, v, layer, kept, save_kv_cache, **kwargs)

    # Slots, for the hooks between the layers.

    def slots(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Slots below layer K of the prompt positions `[start, stop)`, int64.

        Args:
            row: of the request in SGLang's table.
            start, stop: prompt positions.
        """
        return self._rows[row, start:stop].long()

    def drop(self, slots: torch.Tensor) -> torch.Tensor:
        """Layers >= K forget tokens.

        Args:
            slots: `[n]` int64, where the tokens are below layer K.

        Returns:
            `[n]` slots of the kept pool that are free now.
        """
        free = self._mapping[slots]
        self._mapping.index_fill_(0, slots, 0)
        return free

    def begin_kept_layers(self, batch: Any, slots: torch.Tensor) -> None:
        """Prepare the layers from K on of an extend batch.

        Args:
            batch: SGLang's batch.
            slots: `[T']` int64 slots below layer K of the tokens that layers >= K compute.
        """
        plan = prefill_of(batch)
        view = self._view(batch, [p + n for p, n in zip(plan.prefixes, plan.lengths, strict=True)])
        device = view.seq_lens.device
        prefixes, lengths = (
            torch.tensor(values, dtype=torch.int32) for values in (plan.prefixes, plan.lengths)
        )
        view.extend_prefix_lens_cpu, view.extend_seq_lens_cpu = plan.prefixes, plan.lengths
        view.extend_num_tokens = sum(plan.lengths)
        view.extend_prefix_lens = prefixes.to(device, non_blocking=True)
        view.extend_seq_lens = lengths.to(device, non_blocking=True)
        view.extend_start_loc = (lengths.cumsum(0) - lengths).int().to(device, non_blocking=True)
        view.out_cache_loc = self._mapping[slots]
        at = 0
        for request in plan.requests:
            if request.stands_in:
                view.out_cache_loc[at] = 0  # no request reads slot 0
            at += request.length
        stops = [request.stop for request in plan.requests]
        seen = torch.tensor(stops).to(device, non_blocking=True)
        self.pack_rows(view.req_pool_indices, seen, max(1, *stops))
        self._bind(batch, view)
        self.kept.init_forward_metadata(view)

    def pack_rows(self, rows: torch.Tensor, lengths: torch.Tensor, width: int) -> None:
        """Write the slots of each request's kept tokens to the front of its row.

        Args:
            rows: `[B]` rows of the table.
            lengths: `[B]` tokens to look at.
            width: an upper bound of `lengths`, on the host.
        """
        width = min(width, self._rows.shape[1])
        rows = rows.long()
        slots = self._mapping[self._rows[rows, :width].long()]
        columns = torch.arange(width, device=slots.device)
        held = (slots > 0) & (columns < lengths[:, None])
        # a dropped token's slot goes to a column behind the row
        target = torch.where(held, held.cumsum(dim=1) - 1, width)
        table = self._kept_rows
        packed = table.new_zeros(len(rows), width + 1).scatter_(1, target, slots.to(table.dtype))
        used = min(width, table.shape[1])
        table[rows, :used] = packed[:, :used]

    # CUDA graphs of decode: static buffers, filled before each replay, no wait for the device.

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured graphs will read."""
        self.full.init_cuda_graph_state(max_bs, max_num_tokens)
        self.kept.init_cuda_graph_state(max_bs, max_num_tokens)
        device = self._mapping.device
        self._graph_slots = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self._graph_lengths = torch.zeros(max_bs, dtype=torch.int64, device=device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of a padded lane."""
        return int(self.full.get_cuda_graph_seq_len_fill_value())

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare a decode pass that a graph captures or replays."""
        self.full.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        view = self._decode_view(forward_batch, static=True)
        self.kept.init_forward_metadata_out_graph(view, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """The captured part of the preparation."""
        self.full.init_forward_metadata_in_graph(forward_batch)
        self.kept.init_forward_metadata_in_graph(pass_of(forward_batch).kept)

    def on_after_cuda_graph_warmup(self) -> None:
        """Between a graph's warm-up and its capture."""
        self.full.on_after_cuda_graph_warmup()
        self.kept.on_after_cuda_graph_warmup()

    # Views: a batch as layers >= K attend to it.

    def _decode_view(self, batch: Any, static: bool = False) -> Any:
        view = self._view(batch, kept_lengths(batch))
        slots = self._mapping[batch.out_cache_loc.long()]
        if static:
            count, lanes = len(slots), len(view.seq_lens)
            self._graph_slots[:count].copy_(slots)
            # a replay runs every lane it was captured with: those without a request write to slot 0
            self._graph_slots[count:].zero_()
            slots = self._graph_slots[:count]
            self._graph_lengths[:lanes].copy_(view.seq_lens)
            view.seq_lens = self._graph_lengths[:lanes]
        view.out_cache_loc = slots
        width = max(on_host(batch.seq_lens_cpu, batch.seq_lens))
        self.pack_rows(batch.req_pool_indices, batch.seq_lens, width)
        self._bind(batch, view)
        return view

    def _view(self, batch: Any, lengths: Sequence[int]) -> Any:
        """A copy of the batch with other lengths."""
        view = copy.copy(batch)
        view.pruning = None  # or the pass and its view would keep each other alive
        view.seq_lens_cpu = torch.tensor(lengths, dtype=torch.int64)
        view.seq_lens_sum = sum(lengths)
        view.seq_lens = view.seq_lens_cpu.to(
            batch.seq_lens.device, batch.seq_lens.dtype, non_blocking=True
        )
        return view

    def _bind(self, batch: Any, view: Any) -> None:
        """The layers from K on of this batch attend by this view."""
        if self.kept.kv_index_translator is not None:  # torch_native has none
            self.kept.kv_index_translator.bind_own_plan(view)
        pass_of(batch).kept = view
