"""Facts of a language model that config.json spells the same way in every family."""

from __future__ import annotations

from typing import Any

from ep_core.adapter import Config
from ep_core.budget import DecoderShape

QUERY_NORM_DECODERS = frozenset({"qwen3", "qwen3_moe", "gemma3_text"})


def text_config(config: Config) -> dict[str, Any]:
    """The language model's part of config.json, flat in checkpoints of an older layout."""
    return dict(config.get("text_config") or config)


def decoder_shape(config: Config) -> DecoderShape:
    """Sizes of the language model.

    Args:
        config: config.json of the checkpoint.
    """
    text = text_config(config)
    heads = text["num_attention_heads"]
    return DecoderShape(
        layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
    )


def query_norm(config: Config) -> bool:
    """Does the language model normalise each query head after the projection?"""
    return text_config(config).get("model_type") in QUERY_NORM_DECODERS
