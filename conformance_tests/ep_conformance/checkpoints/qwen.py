"""Tiny checkpoints of Qwen2-VL and Qwen2.5-VL."""

from pathlib import Path
from typing import Any

from ep_conformance.checkpoints.parts import (
    PIXELS,
    VOCAB_SIZE,
    Shapes,
    byte_tokenizer,
    chatml,
    check_heads,
    decoder,
    linear,
    norm,
    random_weights,
    special_ids,
    write_files,
)

_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def tiny_qwen2_5_vl(
    path: Path,
    seed: int = 0,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 4,
) -> Path:
    """Write a Qwen2.5-VL checkpoint to ``path`` and return it.

    ``kv_heads`` must divide ``heads`` and ``head_dim`` be a multiple of 16. Pictures: sides that
    are multiples of 28, area 56x56 to 448x448; 28x28 pixels make one token. Vision block 0
    attends in windows of 2x2 tokens, block 1 everywhere.
    """
    text, vision = qwen_text(heads, kv_heads, head_dim, layers), 32
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": text
        | {
            "model_type": "qwen2_5_vl_text",
            "layer_types": ["full_attention"] * layers,
            "rope_parameters": {
                "rope_type": "default",
                "type": "mrope",
                "mrope_section": _mrope_section(text),
                "rope_theta": 1000.0,
            },
        },
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            "depth": 2,
            "hidden_size": vision,
            "hidden_act": "silu",
            "intermediate_size": 2 * vision,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "out_hidden_size": text["hidden_size"],
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        },
    }
    shapes = _qwen_tower(vision, text, ("gate_proj", "up_proj", "down_proj"), norm_bias=False)
    return _write_qwen(path, config, text, shapes, seed, "Qwen2_5_VLProcessor")


def tiny_qwen2_vl(
    path: Path,
    seed: int = 0,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 4,
) -> Path:
    """Write a Qwen2-VL checkpoint to ``path`` and return it.

    Heads and pictures as for Qwen2.5-VL. Every vision block attends everywhere. config.json has
    the flat layout of the published files, which transformers saves again as a nested one.
    """
    text, vision = qwen_text(heads, kv_heads, head_dim, layers), 32
    config = text | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "rope_theta": 1000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": _mrope_section(text)},
        "vision_config": {
            "depth": 2,
            "embed_dim": vision,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_chans": 3,
            "hidden_size": text["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }
    shapes = _qwen_tower(vision, text, ("fc1", "fc2"), norm_bias=True)
    return _write_qwen(path, config, text, shapes, seed, "Qwen2VLProcessor")


def qwen_text(
    heads: int,
    kv_heads: int,
    head_dim: int,
    layers: int,
    special_tokens: tuple[str, ...] = _QWEN_SPECIAL,
) -> dict[str, Any]:
    """What config.json says of a Qwen2 language model in every layout."""
    check_heads(heads, kv_heads, head_dim)
    special = special_ids(special_tokens)
    return {
        "hidden_size": heads * head_dim,
        "intermediate_size": heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
        "tie_word_embeddings": False,
    }


def _mrope_section(text: dict[str, Any]) -> list[int]:
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    return [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]


def _qwen_tower(
    vision: int, text: dict[str, Any], feed_forward: tuple[str, ...], *, norm_bias: bool
) -> Shapes:
    """Two blocks and the merger; the last layer of ``feed_forward`` narrows, the others widen."""
    shapes: Shapes = {"visual.patch_embed.proj.weight": (vision, 3, 2, 14, 14)}
    for i in range(2):
        block = f"visual.blocks.{i}."
        norm(shapes, block + "norm1", vision, bias=norm_bias)
        norm(shapes, block + "norm2", vision, bias=norm_bias)
        linear(shapes, block + "attn.qkv", 3 * vision, vision)
        linear(shapes, block + "attn.proj", vision, vision)
        for name in feed_forward[:-1]:
            linear(shapes, f"{block}mlp.{name}", 2 * vision, vision)
        linear(shapes, f"{block}mlp.{feed_forward[-1]}", vision, 2 * vision)
    norm(shapes, "visual.merger.ln_q", vision, bias=norm_bias)
    linear(shapes, "visual.merger.mlp.0", 4 * vision, 4 * vision)
    linear(shapes, "visual.merger.mlp.2", text["hidden_size"], 4 * vision)
    return shapes


def _write_qwen(
    path: Path,
    config: dict[str, Any],
    text: dict[str, Any],
    shapes: Shapes,
    seed: int,
    processor_class: str,
) -> Path:
    """Add what both Qwen families share to the sizes of their own, and write all files."""
    special = special_ids(_QWEN_SPECIAL)
    config |= {
        "dtype": "float32",
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    decoder(shapes, "model.", text, query_bias=True)
    shapes["lm_head.weight"] = (VOCAB_SIZE, text["hidden_size"])
    image_processor = PIXELS | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    write_files(
        path,
        config,
        text,
        random_weights(shapes, seed),
        byte_tokenizer(_QWEN_SPECIAL, bos=None),
        {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "processor_class": processor_class,
        },
        chatml("<|vision_start|><|image_pad|><|vision_end|>"),
        {
            "image_processor": image_processor,
            "video_processor": image_processor
            | {"video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": False},
            "processor_class": processor_class,
        },
    )
    return path
