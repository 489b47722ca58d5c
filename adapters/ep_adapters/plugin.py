"""The adapters that ship with entropyprune."""

from __future__ import annotations

from ep_adapters import internvl, llava, qwen2_5_vl, qwen2_vl
from ep_core.adapter import ModelAdapter
from ep_core.hookspecs import hookimpl


@hookimpl
def entropyprune_adapters() -> list[ModelAdapter]:
    """One adapter for each family."""
    return [internvl.ADAPTER, llava.ADAPTER, qwen2_5_vl.ADAPTER, qwen2_vl.ADAPTER]
