"""Attention over two sets of tokens: all of them below layer K, the kept ones from there on.

No kernel is written here. Two instances of the server's own attention backend run side by side,
each in a plain world of its own: a KV pool of its layers and a table of its tokens' slots.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator


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
        prefill: called with each extend batch before the model runs; see `prefill.py`.
    """

    # the width of the kept table's used part is a host integer
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
        self.rows = rows
        self.mapping: torch.Tensor = pools.full_to_swa_index_mapping
        self.full = build(_RunnerView(runner, pools.full_kv_pool, rows))
        kept_pool = copy.copy(pools.swa_kv_pool)  # shares the buffers
        kept_pool.start_layer = layer
        # no request keeps more tokens than the pool has slots (a padded lane reads slot 0)
        columns = min(rows.req_to_token.shape[1], pools.size_swa + 1)
        self._kept_rows = copy.copy(rows)
        self._kept_rows.req_to_token = torch.zeros_like(rows.req_to_token[:, :columns])
        self.kept = build(_RunnerView(runner, kept_pool, self._kept_rows))
        # what SGLang reads off a backend
        self.kv_index_translator = runner.kv_index_translator
        self.data_type, self.kv_cache_dtype = self.full.data_type, self.full.kv_cache_dtype
        self.extend_dummy_seqs_capped_by_req_pool = self.full.extend_dummy_seqs_capped_by_req_pool
        self.prefill: Callable[[Any], None] = lambda batch: None
        self._view: Any = None

    def init_forward_metadata(self, batch: Any) -> None:
        """Prepare an eager forward pass."""
        self.full.init_forward_metadata(batch)
        self._view = None
        if batch.forward_mode.is_decode():
            self.kept.init_forward_metadata(self._decode_view(batch))
        elif batch.forward_mode.is_extend():
            self.prefill(batch)

    def begin_kept_layers(self, view: Any, stops: list[int]) -> None:
        """Prepare the layers from K on of an extend batch.

        Args:
            view: the batch as those layers see it: `extend_*` lengths of kept tokens,
                `out_cache_loc` in slots of the kept pool.
            stops: for each request the prompt position after the last token they have seen.
        """
        lengths = torch.tensor(stops).to(view.seq_lens.device, non_blocking=True)
        self.compact_rows(view.req_pool_indices, lengths, max(stops) + 1)
        self._bind(view)
        self.kept.init_forward_metadata(view)

    def compact_rows(self, rows: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """Write the slots of each request's kept tokens to the front of its row.

        Args:
            rows: `[B]` rows of the table.
            lengths: `[B]` tokens to look at.
            width: an upper bound of `lengths`, on the host.

        Returns:
            `[B]` int64, kept tokens of each request.
        """
        width = min(width, self.rows.req_to_token.shape[1])
        rows = rows.long()
        slots = self.mapping[self.rows.req_to_token[rows, :width].long()]
        columns = torch.arange(width, device=slots.device)
        held = (slots > 0) & (columns < lengths[:, None])
        # a dropped token's slot goes to a column behind the row
        target = torch.where(held, held.cumsum(dim=1) - 1, width)
        table = self._kept_rows.req_to_token
        packed = table.new_zeros(len(rows), width + 1).scatter_(1, target, slots.to(table.dtype))
        used = min(width, table.shape[1])
        table[rows, :used] = packed[:, :used]
        return held.sum(dim=1)

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
        return self.kept.forward(q, k, v, layer, self._view, save_kv_cache, **kwargs)

    # CUDA graphs of decode: static buffers, filled before each replay, no wait for the device.

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured graphs will read."""
        self.full.init_cuda_graph_state(max_bs, max_num_tokens)
        self.kept.init_cuda_graph_state(max_bs, max_num_tokens)
        device = self.mapping.device
        self._graph_slots = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self._graph_lengths = torch.zeros(max_bs, dtype=torch.int64, device=device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of a padded lane."""
        return int(self.full.get_cuda_graph_seq_len_fill_value())

    def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
        """Prepare a decode pass that a graph captures or replays."""
        self.full.init_forward_metadata_out_graph(batch, in_capture=in_capture)
        view = self._decode_view(batch, static=True)
        self.kept.init_forward_metadata_out_graph(view, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, batch: Any) -> None:
        """The captured part of the preparation."""
        self.full.init_forward_metadata_in_graph(batch)
        self.kept.init_forward_metadata_in_graph(self._view)

    def on_after_cuda_graph_warmup(self) -> None:
        """Between a graph's warm-up and its capture."""
        self.full.on_after_cuda_graph_warmup()
        self.kept.on_after_cuda_graph_warmup()

    def _decode_view(self, batch: Any, static: bool = False) -> Any:
        """The batch as layers >= K see it: kept lengths, slots of the kept pool."""
        lengths, table = batch.seq_lens, self.rows.req_to_token
        on_host = batch.seq_lens_cpu
        width = table.shape[1] if on_host is None else int(on_host.max())
        # a padded lane has no token; it reads the padding slot 0
        kept = self.compact_rows(batch.req_pool_indices, lengths, width).clamp_min(1)
        slots = self.mapping[batch.out_cache_loc.long()]
        view = copy.copy(batch)
        if static:
            self._graph_lengths[: len(kept)].copy_(kept)
            self._graph_slots[: len(slots)].copy_(slots)
            # a replay runs every lane it was captured with: those without a request write to slot 0
            self._graph_slots[len(slots) :].zero_()
            kept, slots = self._graph_lengths[: len(kept)], self._graph_slots[: len(slots)]
            view.seq_lens = kept
        else:
            view.seq_lens = kept.to(lengths.dtype)
        view.out_cache_loc = slots
        # seq_lens_cpu and seq_lens_sum stay those of all tokens: upper bounds, known on the host
        self._bind(view)
        return view

    def _bind(self, view: Any) -> None:
        if self.kept.kv_index_translator is not None:  # torch_native has none
            self.kept.kv_index_translator.bind_own_plan(view)
        self._view = view
