"""Facts of a language model that config.json spells the same way in every family."""

from __future__ import annotations

from typing import Any

from ep_core.budget import DecoderShape
from ep_core.errors import UnsupportedError
from ep_core.family import FULL_ATTENTION, Config, Decoder

# sizes that published LLaVA-1.5 checkpoints leave out: the defaults of transformers' LlamaConfig
LLAMA_DEFAULTS = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}
REQUIRED = tuple(LLAMA_DEFAULTS)
# decoders that normalise each query head after the projection
QUERY_NORM_DECODERS = frozenset({"qwen3"})


def text_config(config: Config) -> dict[str, Any]:
    """The language model's part of config.json, flat in checkpoints of an older layout."""
    text = dict(config.get("text_config") or config)
    return LLAMA_DEFAULTS | text if text.get("model_type") == "llama" else text


def decoder_shape(config: Config) -> DecoderShape:
    """Sizes of the language model.

    Args:
        config: config.json of the checkpoint.

    Raises:
        UnsupportedError: a size is missing; it is named.
    """
    text = text_config(config)
    if missing := [name for name in REQUIRED if name not in text]:
        raise UnsupportedError(f"config.json does not give the decoder's {', '.join(missing)}")
    heads = text["num_attention_heads"]
    return DecoderShape(
        layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
    )


def read_decoder(config: Config) -> Decoder:
    """The language model, as most families describe it.

    Args:
        config: config.json of the checkpoint.

    Raises:
        UnsupportedError: a size is missing; it is named.
    """
    text = text_config(config)
    kinds = set(text.get("layer_types") or [FULL_ATTENTION])
    # a window that is set but not used is no window; families without the switch use it
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        kinds.add("sliding_attention")
    return Decoder(
        shape=decoder_shape(config),
        query_norm=text.get("model_type") in QUERY_NORM_DECODERS,
        layer_kinds=frozenset(kinds),
    )
