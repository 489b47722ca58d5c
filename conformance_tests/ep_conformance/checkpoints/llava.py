"""Tiny checkpoints of LLaVA-1.5."""

from pathlib import Path

from ep_conformance.checkpoints.parts import (
    PIXELS,
    VOCAB_SIZE,
    Shapes,
    byte_tokenizer,
    check_heads,
    decoder,
    linear,
    norm,
    random_weights,
    special_ids,
    write_files,
)

_LLAVA_SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
_LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_llava(
    path: Path,
    seed: int = 0,
    *,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 16,
    layers: int = 4,
    strategy: str = "default",
) -> Path:
    """Write a LLaVA checkpoint (CLIP, two-layer projector, Llama) to ``path`` and return it.

    ``kv_heads`` must divide ``heads``. Pictures: 112x112, 64 tokens each; with the feature
    ``strategy`` "full" the class token makes it 65. The tokenizer puts ``<s>`` in front.
    """
    check_heads(heads, kv_heads, head_dim)
    hidden, vision, side, patch = heads * head_dim, 32, 112, 14
    patches = (side // patch) ** 2
    special = special_ids(_LLAVA_SPECIAL)
    text_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": special["<s>"],
        "eos_token_id": special["</s>"],
        "pad_token_id": special["<pad>"],
        "tie_word_embeddings": False,
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float32",
        "image_token_index": special["<image>"],
        "image_seq_length": patches + (strategy == "full"),
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": False,
        "text_config": text_config,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision,
            "hidden_act": "quick_gelu",
            "intermediate_size": 2 * vision,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_channels": 3,
            "image_size": side,
            "patch_size": patch,
            "projection_dim": vision,
            "layer_norm_eps": 1e-5,
        },
    }
    tower = "vision_tower.vision_model."  # as in published files
    shapes: Shapes = {
        tower + "embeddings.class_embedding": (vision,),
        tower + "embeddings.patch_embedding.weight": (vision, 3, patch, patch),
        tower + "embeddings.position_embedding.weight": (1 + patches, vision),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for i in range(3):
        block = f"encoder.layers.{i}."
        norms += [block + "layer_norm1", block + "layer_norm2"]
        for which in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(shapes, f"{tower}{block}self_attn.{which}", vision, vision)
        linear(shapes, tower + block + "mlp.fc1", 2 * vision, vision)
        linear(shapes, tower + block + "mlp.fc2", vision, 2 * vision)
    for name in norms:
        norm(shapes, tower + name, vision)
    linear(shapes, "multi_modal_projector.linear_1", hidden, vision)
    linear(shapes, "multi_modal_projector.linear_2", hidden, hidden)
    decoder(shapes, "language_model.model.", text_config, query_bias=False)
    shapes["language_model.lm_head.weight"] = (VOCAB_SIZE, hidden)

    write_files(
        path,
        config,
        text_config,
        random_weights(shapes, seed),
        byte_tokenizer(_LLAVA_SPECIAL, bos="<s>"),
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "processor_class": "LlavaProcessor",
        },
        _LLAVA_TEMPLATE,
        {
            "image_processor": PIXELS
            | {
                "image_processor_type": "CLIPImageProcessor",
                "do_center_crop": True,
                "size": {"shortest_edge": side},
                "crop_size": {"height": side, "width": side},
            },
            "image_token": "<image>",
            "num_additional_image_tokens": 1,  # the class token
            "patch_size": patch,
            "vision_feature_select_strategy": strategy,
            "processor_class": "LlavaProcessor",
        },
    )
    return path
