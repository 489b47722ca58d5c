"""Tiny checkpoints of InternVL."""

from pathlib import Path

from ep_conformance.checkpoints.parts import (
    PIXELS,
    VOCAB_SIZE,
    Shapes,
    byte_tokenizer,
    chatml,
    decoder,
    linear,
    norm,
    random_weights,
    special_ids,
    write_files,
)
from ep_conformance.checkpoints.qwen import qwen_text

_INTERNVL_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
)


def tiny_internvl(
    path: Path,
    seed: int = 0,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 4,
) -> Path:
    """Write an InternVL checkpoint (its tower and projector, Qwen2) to ``path`` and return it.

    ``kv_heads`` must divide ``heads``. Pictures: sides that are multiples of 112, at most 4 tiles
    of 112x112; a tile makes 16 tokens, and several tiles bring a thumbnail of 16 more.
    """
    vision, side, patch = 32, 112, 14
    patches = (side // patch) ** 2
    text_config = qwen_text(heads, kv_heads, head_dim, layers, _INTERNVL_SPECIAL) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }
    config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": "float32",
        "downsample_ratio": 0.5,
        "image_seq_length": patches // 4,
        "image_token_id": special_ids(_INTERNVL_SPECIAL)["<IMG_CONTEXT>"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": text_config,
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": vision,
            "hidden_act": "gelu",
            "intermediate_size": 2 * vision,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_channels": 3,
            "image_size": [side, side],
            "patch_size": [patch, patch],
            "attention_bias": True,
            "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm",
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
    }
    hidden = text_config["hidden_size"]
    tower, projector = "vision_tower.", "multi_modal_projector."
    shapes: Shapes = {
        tower + "embeddings.cls_token": (1, 1, vision),
        tower + "embeddings.position_embeddings": (1, 1 + patches, vision),
        tower + "embeddings.patch_embeddings.projection.weight": (vision, 3, patch, patch),
        tower + "embeddings.patch_embeddings.projection.bias": (vision,),
    }
    for i in range(2):
        block = f"{tower}encoder.layer.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            linear(shapes, f"{block}attention.{name}", vision, vision)
        linear(shapes, block + "mlp.fc1", 2 * vision, vision)
        linear(shapes, block + "mlp.fc2", vision, 2 * vision)
        norm(shapes, block + "layernorm_before", vision)
        norm(shapes, block + "layernorm_after", vision)
        shapes[block + "lambda_1"] = shapes[block + "lambda_2"] = (vision,)
    norm(shapes, projector + "layer_norm", 4 * vision)
    linear(shapes, projector + "linear_1", hidden, 4 * vision)
    linear(shapes, projector + "linear_2", hidden, hidden)
    decoder(shapes, "language_model.model.", text_config, query_bias=True)
    shapes["language_model.lm_head.weight"] = (VOCAB_SIZE, hidden)

    image_processor = PIXELS | {
        "image_processor_type": "GotOcr2ImageProcessor",
        "resample": 2,  # bilinear: Pillow and torchvision make the same thumbnail
        "size": {"height": side, "width": side},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 4,
    }
    write_files(
        path,
        config,
        text_config,
        random_weights(shapes, seed),
        byte_tokenizer(_INTERNVL_SPECIAL, bos=None),
        {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "extra_special_tokens": {
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
            "processor_class": "InternVLProcessor",
        },
        chatml("<IMG_CONTEXT>\n"),
        {
            "image_processor": image_processor,
            "video_processor": PIXELS
            | {
                "video_processor_type": "InternVLVideoProcessor",
                "size": {"height": side, "width": side},
                "do_sample_frames": False,
            },
            "image_seq_length": patches // 4,
            "processor_class": "InternVLProcessor",
        },
    )
    return path
