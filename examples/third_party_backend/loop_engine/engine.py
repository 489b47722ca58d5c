"""A small engine: a decoder loop in plain PyTorch over the weights of Qwen2.5-VL checkpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from ep_backends.shared.processor import load_processor

Cut = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Engine:
    """Answers one prompt at a time, greedily."""

    def __init__(self, folder: Path, dtype: str | None) -> None:
        whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto").eval()
        self.model, self.text, self.head = whole.model, whole.model.language_model, whole.lm_head
        ends, self.processor = whole.generation_config.eos_token_id, load_processor(folder)
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        rope, config = self.text.config.rope_parameters, self.text.config
        self.dim = config.hidden_size // config.num_attention_heads
        self.axis = torch.arange(3).repeat_interleave(torch.tensor(rope["mrope_section"]))
        self.speed = rope["rope_theta"] ** (-torch.arange(0, self.dim, 2) / self.dim)

    @torch.inference_mode()
    def generate(self, inputs: Mapping[str, Any], limit: int, cuts: Mapping[int, Cut]) -> Any:
        """New tokens, their logits `[steps, vocab]`, prompt slots in the first and last layer.

        `cuts[i](queries, x, positions)` shortens a prompt, `[T, H, D]`, `[T, d]` and `[3, T]`, on
        its way into layer i.
        """
        ids, grid = inputs["input_ids"], inputs.get("image_grid_thw")
        x = self.text.embed_tokens(ids[0])
        if grid is not None:
            pictures = self.model.get_image_features(inputs["pixel_values"], grid).pooler_output
            x[ids[0] == self.model.config.image_token_id] = torch.cat(pictures).to(x.dtype)
        positions = self.model.get_rope_index(ids, inputs["mm_token_type_ids"], grid)[0][:, 0]
        cache: list[Any] = [None] * len(self.text.layers)
        tokens, logits, slots, position = [], [], None, positions.max() + 1
        while len(tokens) < limit and not self.ends & set(tokens):
            queries = None
            for i in range(len(cache)):
                if i in cuts and not tokens:
                    x, positions = cuts[i](queries, x, positions)
                x, queries = self._layer(i, x, positions, cache)
            slots = slots or (len(cache[0][0]), len(cache[-1][0]))
            logits.append(self.head(self.text.norm(x[-1])))
            tokens.append(int(logits[-1].argmax()))
            x = self.text.embed_tokens(torch.tensor(tokens[-1:]))
            positions, position = position.expand(3, 1), position + 1
        return tokens, torch.stack(logits).float(), slots

    def _layer(self, i: int, x: torch.Tensor, positions: torch.Tensor, cache: list[Any]) -> Any:
        attention, layer = self.text.layers[i].self_attn, self.text.layers[i]
        normed, parts = layer.input_layernorm(x), (attention.q_proj, attention.k_proj)
        queries, k = (project(normed).view(len(x), -1, self.dim) for project in parts)
        angles = (positions[self.axis].T * self.speed).repeat(1, 2)[:, None]  # [T, 1, D]
        q, k = (t * angles.cos() + _turned(t) * angles.sin() for t in (queries, k))
        new = (k, attention.v_proj(normed).view(len(x), -1, self.dim))
        cache[i] = (
            [torch.cat(pair) for pair in zip(cache[i], new, strict=True)] if cache[i] else new
        )
        heads = (t.transpose(0, 1) for t in (q, *cache[i]))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=len(x) > 1, enable_gqa=True)
        x = x + attention.o_proj(mixed.transpose(0, 1).flatten(1))
        return x + layer.mlp(layer.post_attention_layernorm(x)), queries


def _turned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
