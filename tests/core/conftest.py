"""Hypothesis settings and the decoder that the published numbers are about."""

import pytest
from hypothesis import settings

from ep_core.budget import DecoderShape

# the same examples on every machine: a red run can be repeated
settings.register_profile("core", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("core")


@pytest.fixture(scope="session")
def llava() -> DecoderShape:
    """The decoder of LLaVA-1.5-7B."""
    return DecoderShape(
        layers=32, hidden_size=4096, intermediate_size=11008, heads=32, kv_heads=32, head_dim=128
    )
