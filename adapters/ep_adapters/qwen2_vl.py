"""Qwen2-VL: another vision tower than Qwen2.5-VL's, and nothing else that differs."""

from __future__ import annotations

from dataclasses import replace

from ep_adapters import qwen2_5_vl

FAMILY = replace(
    qwen2_5_vl.FAMILY,
    model_type="qwen2_vl",
    name="Qwen2-VL",
    default_layer=2,
    default_layer_source="that of LLaVA-1.5: the code of arXiv 2602.17196 has none for this family",
)
