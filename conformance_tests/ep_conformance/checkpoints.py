"""Tiny random checkpoints and pictures: what the suite runs engines on, made on the spot.

Each writer fills a folder in Hugging Face layout that transformers 5 loads (model, tokenizer,
image processor) without any file from a network. The weights are random but seeded, rounded to
values that bfloat16 holds exactly, and scaled so that attention is uneven, token scores vary, and
greedy tokens depend on the picture. Norm weights and biases are not the identity, and RoPE bases
are not the defaults, so an engine that forgets one gives other tokens.

Random models answer at random: they test equality between engines, never quality.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

Shapes = dict[str, tuple[int, ...]]

VOCAB_SIZE = 320  # bytes, common pairs, special tokens, spare control tokens: no unused id

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
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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
_PAIR_TEXT = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le "
    "ve co me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur"
)
_PAIRS = _PAIR_TEXT.split()
_PIECES = sorted(pre_tokenizers.ByteLevel.alphabet()) + _PAIRS
_PIXELS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


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
    _check_heads(heads, kv_heads, head_dim)
    hidden, vision = heads * head_dim, 32
    special = {name: VOCAB_SIZE - len(_QWEN_SPECIAL) + i for i, name in enumerate(_QWEN_SPECIAL)}
    half = head_dim // 2
    text_config = {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * layers,
        "rope_parameters": {
            "rope_type": "default",
            "type": "mrope",
            "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            "rope_theta": 1000.0,
        },
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
        "tie_word_embeddings": False,
    }
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": "float32",
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "tie_word_embeddings": False,
        "text_config": text_config,
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
            "out_hidden_size": hidden,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        },
    }
    shapes: Shapes = {"visual.patch_embed.proj.weight": (vision, 3, 2, 14, 14)}
    for i in range(2):
        block = f"visual.blocks.{i}."
        shapes[block + "norm1.weight"] = (vision,)
        shapes[block + "norm2.weight"] = (vision,)
        _linear(shapes, block + "attn.qkv", 3 * vision, vision)
        _linear(shapes, block + "attn.proj", vision, vision)
        _linear(shapes, block + "mlp.gate_proj", 2 * vision, vision)
        _linear(shapes, block + "mlp.up_proj", 2 * vision, vision)
        _linear(shapes, block + "mlp.down_proj", vision, 2 * vision)
    shapes["visual.merger.ln_q.weight"] = (vision,)
    _linear(shapes, "visual.merger.mlp.0", 4 * vision, 4 * vision)
    _linear(shapes, "visual.merger.mlp.2", hidden, 4 * vision)
    _decoder(shapes, "model.", text_config, head_dim, query_bias=True)
    shapes["lm_head.weight"] = (VOCAB_SIZE, hidden)

    image_processor = _PIXELS | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    _write(
        path,
        config,
        _weights(shapes, seed),
        _tokenizer(_QWEN_SPECIAL, bos=None),
        {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "processor_class": "Qwen2_5_VLProcessor",
        },
        _QWEN_TEMPLATE,
        {
            "image_processor": image_processor,
            "video_processor": image_processor
            | {"video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": False},
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    return path


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
    _check_heads(heads, kv_heads, head_dim)
    hidden, vision, side, patch = heads * head_dim, 32, 112, 14
    patches = (side // patch) ** 2
    special = {name: VOCAB_SIZE - len(_LLAVA_SPECIAL) + i for i, name in enumerate(_LLAVA_SPECIAL)}
    text_config = {
        "model_type": "llama",
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
    tower = "vision_tower."
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
            _linear(shapes, f"{tower}{block}self_attn.{which}", vision, vision)
        _linear(shapes, tower + block + "mlp.fc1", 2 * vision, vision)
        _linear(shapes, tower + block + "mlp.fc2", vision, 2 * vision)
    for norm in norms:
        shapes[f"{tower}{norm}.weight"] = shapes[f"{tower}{norm}.bias"] = (vision,)
    _linear(shapes, "multi_modal_projector.linear_1", hidden, vision)
    _linear(shapes, "multi_modal_projector.linear_2", hidden, hidden)
    _decoder(shapes, "language_model.model.", text_config, head_dim, query_bias=False)
    shapes["language_model.lm_head.weight"] = (VOCAB_SIZE, hidden)

    _write(
        path,
        config,
        _weights(shapes, seed),
        _tokenizer(_LLAVA_SPECIAL, bos="<s>"),
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "processor_class": "LlavaProcessor",
        },
        _LLAVA_TEMPLATE,
        {
            "image_processor": _PIXELS
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


def make_picture(path: Path, seed: int, size: tuple[int, int]) -> Path:
    """Draw a seeded RGB picture of ``size`` (width, height) to ``path`` (PNG) and return it.

    A colour gradient, six rectangles and noise: flat parts whose tokens are nearly alike, and
    edges whose tokens are not.
    """
    width, height = size
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 255, (2, 2, 3))
    down = np.linspace(0, 1, height)[:, None, None]
    along = np.linspace(0, 1, width)[None, :, None]
    top = corners[0, 0] * (1 - along) + corners[0, 1] * along
    bottom = corners[1, 0] * (1 - along) + corners[1, 1] * along
    pixels = top * (1 - down) + bottom * down  # [height, width, 3]
    for _ in range(6):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        wide, tall = int(rng.integers(8, width)) // 2, int(rng.integers(8, height)) // 2
        pixels[y : y + tall, x : x + wide] = rng.uniform(0, 255, 3)
    pixels = pixels + rng.normal(0, 6, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def _check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    if heads % kv_heads or head_dim % 16:
        raise ValueError(
            f"kv_heads must divide heads and 16 must divide head_dim, "
            f"not heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}"
        )


def _linear(shapes: Shapes, name: str, rows: int, cols: int, *, bias: bool = True) -> None:
    shapes[name + ".weight"] = (rows, cols)
    if bias:
        shapes[name + ".bias"] = (rows,)


def _decoder(
    shapes: Shapes, prefix: str, text: dict[str, Any], head_dim: int, *, query_bias: bool
) -> None:
    """Add the embedding, the decoder layers and the last norm (Qwen2 and Llama share names)."""
    hidden, wide = text["hidden_size"], text["intermediate_size"]
    shapes[prefix + "embed_tokens.weight"] = (VOCAB_SIZE, hidden)
    for i in range(text["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}."
        kv = text["num_key_value_heads"] * head_dim
        for which, rows in (("q", hidden), ("k", kv), ("v", kv)):
            _linear(shapes, f"{layer}self_attn.{which}_proj", rows, hidden, bias=query_bias)
        _linear(shapes, layer + "self_attn.o_proj", hidden, hidden, bias=False)
        _linear(shapes, layer + "mlp.gate_proj", wide, hidden, bias=False)
        _linear(shapes, layer + "mlp.up_proj", wide, hidden, bias=False)
        _linear(shapes, layer + "mlp.down_proj", hidden, wide, bias=False)
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
    shapes[prefix + "norm.weight"] = (hidden,)


def _weights(shapes: Shapes, seed: int) -> dict[str, torch.Tensor]:
    """Random float32 tensors of these shapes, each exactly a bfloat16 value.

    Special tokens get the logit 0.0, which is never the largest of 300: random models would
    otherwise end early or answer with image placeholders.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        # Scaled by 1 / sqrt(inputs), a projection of unit rows gives unit rows.
        scale = 1 / math.sqrt(math.prod(shape[1:]))
        if len(shape) == 1:
            is_norm = "norm" in name or "ln_q" in name
            value = 0.2 * noise + float(is_norm and name.endswith("weight"))
        elif "embed" in name and "patch" not in name:
            value = noise
        elif "q_proj" in name or "k_proj" in name or "qkv" in name:
            value = 1.5 * scale * noise  # attention that prefers some tokens
        elif "lm_head" in name:
            value = 3 * scale * noise  # logits far enough apart for float32 kernels to agree
            value[len(_PIECES) :] = 0
        else:
            value = scale * noise
        weights[name] = value.to(torch.bfloat16).to(torch.float32)
    return weights


def _tokenizer(special: Sequence[str], bos: str | None) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens whose last ids are ``special``, in this order."""
    merges = [(pair[0], pair[1]) for pair in _PAIRS]
    spare = VOCAB_SIZE - len(_PIECES) - len(special)
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(_PIECES)}, merges))
    names = [f"<|spare_{i}|>" for i in range(spare)] + list(special)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer


def _write(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    tokenizer_config: dict[str, Any],
    template: str,
    processor: dict[str, Any],
) -> None:
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    text = config["text_config"]
    files = {
        "config.json": config,
        "generation_config.json": {
            key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": text["max_position_embeddings"],
        }
        | tokenizer_config,
        "processor_config.json": processor,
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
