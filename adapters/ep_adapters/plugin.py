"""The families that ship with entropyprune."""

from __future__ import annotations

from ep_adapters import internvl, llava, qwen2_5_vl, qwen2_vl
from ep_core.family import Family
from ep_core.hookspecs import hookimpl


@hookimpl
def entropyprune_families() -> list[Family]:
    """One value for each family."""
    return [internvl.FAMILY, llava.FAMILY, qwen2_5_vl.FAMILY, qwen2_vl.FAMILY]
