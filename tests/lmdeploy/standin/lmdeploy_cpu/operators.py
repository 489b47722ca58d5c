"""LMDeploy's operators in plain torch: attention here, the rest its own defaults.

The paged cache keeps LMDeploy's layout, [blocks, block size, key heads, head dimension], and the
attention reads the metadata that a step carries for the Triton kernels. It works one sequence at a
time, in float32, and finds a prompt's keys through the block table alone: that the metadata for
the kernels' flattened keys (`kv_start_loc`, `kv_flatten_size`, `cu_seqlens_*`) is right shows only
with `TRITON_INTERPRET=1`.
"""

from typing import Any

import torch
from lmdeploy.pytorch import envs
from lmdeploy.pytorch.backends.attention import AttentionImpl, PagedAttentionBuildSpec
from lmdeploy.pytorch.backends.cuda.attention.default import (
    TritonAttentionMetadata,
    build_triton_attention_metadata,
)
from lmdeploy.pytorch.backends.cuda.step_metadata import CudaSequenceMetadata
from lmdeploy.pytorch.backends.default import DefaultOpsBackend
from lmdeploy.pytorch.backends.flash_attention import FlashAttentionBuildSpec, FlashAttentionImpl
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """Attention of one sequence: `[tokens, heads, dimension]`; its last queries are the newest."""
    mask = None
    if causal:
        past = len(key) - len(query)
        mask = torch.ones(len(query), len(key), dtype=torch.bool).tril(past)
    heads_first = (states.float().transpose(0, 1)[None] for states in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).to(query.dtype)


class PagedAttention(AttentionImpl[TritonAttentionMetadata]):
    """Attention of the language model."""

    def __init__(self, spec: PagedAttentionBuildSpec) -> None:
        if unknown := [
            name
            for name in ("alibi", "sliding_window", "use_flash_mla", "learnable_sink")
            if getattr(spec, name)
        ]:
            raise NotImplementedError(f"the CPU stand-in has no attention with {unknown[0]}")
        super().__init__(
            spec.num_heads,
            spec.head_dim,
            scale=spec.scale,
            num_kv_heads=spec.num_kv_heads,
            v_head_size=spec.v_head_dim,
            causal=spec.causal,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        attn_metadata: TritonAttentionMetadata,
        **options: Any,
    ) -> Tensor:
        """Write the step's keys and values into the cache, then attend to what it holds.

        Sequence i has `kv_seqlens[i]` tokens, slot s of it lies in block `block_offsets[i, s //
        block size]`, and the step's `q_seqlens[i]` tokens are its last. A decode graph is filled
        up with sequences of one token in block 0; like the kernels, this stores for them what
        stands at `q_start_loc` and gives them a row of the output each.
        """
        if any(options.get(name) is not None for name in ("k_scales_zeros", "learnable_sink")):
            raise NotImplementedError("the CPU stand-in has no quantised KV cache and no sinks")
        starts = attn_metadata.q_start_loc.tolist()
        news = attn_metadata.q_seqlens.tolist()
        lengths = attn_metadata.kv_seqlens.tolist()
        block_size = k_cache.size(1)
        slots = []
        for i, (start, new, length) in enumerate(zip(starts, news, lengths, strict=True)):
            positions = torch.arange(length)
            block = attn_metadata.block_offsets[i].long()[positions // block_size]
            slots.append((block, positions % block_size))
            written = tuple(index[length - new :] for index in slots[i])
            k_cache[written] = key[start : start + new].to(k_cache.dtype)
            v_cache[written] = value[start : start + new].to(v_cache.dtype)
        if attn_metadata.is_decoding:
            rows = len(query) // len(starts)
            starts = range(0, len(query), rows)
            news = [rows] * len(starts)
        # a row that belongs to no sequence shows when something reads it
        out = query.new_full((*query.shape[:-1], self.v_head_size), torch.nan)
        for start, new, slot in zip(starts, news, slots, strict=True):
            out[start : start + new] = attend(
                query[start : start + new], k_cache[slot], v_cache[slot], self.scale, self.causal
            )
        return out


class FlashAttention(FlashAttentionImpl):
    """Attention of the vision encoder, without a cache."""

    def __init__(self, spec: FlashAttentionBuildSpec) -> None:
        if spec.sliding_window or spec.logit_softcapping:
            raise NotImplementedError("the CPU stand-in has no windows and no soft capping")
        self.scale = spec.scale or spec.head_dim**-0.5
        self.causal = spec.causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_start_loc: Tensor,
        q_seqlens: Tensor,
        kv_start_loc: Tensor,
        kv_seqlens: Tensor,
        max_q_seqlen: int | None = None,
    ) -> Tensor:
        shape = (*query.shape[:-1], value.size(-1))
        query, key, value = (states.flatten(0, -3) for states in (query, key, value))
        out = query.new_full((*query.shape[:-1], value.size(-1)), torch.nan)
        bounds = (each.tolist() for each in (q_start_loc, q_seqlens, kv_start_loc, kv_seqlens))
        for q_start, q_length, kv_start, kv_length in zip(*bounds, strict=True):
            queries = slice(q_start, q_start + q_length)
            keys = slice(kv_start, kv_start + kv_length)
            out[queries] = attend(query[queries], key[keys], value[keys], self.scale, self.causal)
        return out.view(shape)


class CPUOpsBackend(DefaultOpsBackend):
    """LMDeploy's plain-torch operators, with the two that it has for accelerators only."""

    @staticmethod
    def get_name() -> str:
        return "cpu"

    @classmethod
    def build_op(cls, spec: Any, *, enable_deterministic: bool = False) -> Any:
        if isinstance(spec, PagedAttentionBuildSpec):
            return PagedAttention(spec)
        if isinstance(spec, FlashAttentionBuildSpec):
            return FlashAttention(spec)
        return super().build_op(spec, enable_deterministic=enable_deterministic)

    @staticmethod
    def get_attention_metadata_cls() -> type[TritonAttentionMetadata]:
        return TritonAttentionMetadata

    @classmethod
    def update_step_context(cls, step_context: Any) -> Any:
        """The metadata of a step, built as for CUDA."""
        step_context.attn_metadata = build_triton_attention_metadata(
            cls.get_attention_metadata_cls(),
            step_context,
            CudaSequenceMetadata.from_step_context(step_context),
        )
        return step_context

    @staticmethod
    def build_graph_runner(
        model: Any, model_config: Any, cache_config: Any, backend_config: Any, device: Any
    ) -> Any:
        """LMDeploy's runner of decode graphs with its static buffers, less the capture itself."""
        from lmdeploy.pytorch.backends.cuda.graph_runner import CUDAGraphRunner

        if not (backend_config.eager_mode or envs.fake_capture):
            raise RuntimeError(
                "no CUDA graph can be captured here: "
                "set eager_mode=True, or LMDEPLOY_FAKE_CUDA_GRAPH_CAPTURE=1 before the start"
            )
        return CUDAGraphRunner(model, model_config, cache_config, backend_config, device)

    @staticmethod
    def ccl_backend() -> str:
        return "gloo"
