"""What the writers of tiny checkpoints share: tokenizer, decoder, random weights, files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

Shapes = dict[str, tuple[int, ...]]

VOCAB_SIZE = 320  # bytes, common pairs, special tokens, spare control tokens: no unused id

PIXELS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_PAIR_TEXT = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le "
    "ve co me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur"
)
_PAIRS = _PAIR_TEXT.split()
_PIECES = sorted(pre_tokenizers.ByteLevel.alphabet()) + _PAIRS


def special_ids(special: Sequence[str]) -> dict[str, int]:
    """The ids of special tokens: the last ones of the vocabulary, in this order."""
    return {name: VOCAB_SIZE - len(special) + i for i, name in enumerate(special)}


def chatml(picture: str) -> str:
    """The chat template of Qwen and InternVL, with what stands for one picture."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] in ('image', 'image_url') %}}{picture}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError for a shape that no writer can make."""
    if heads % kv_heads or head_dim % 16:
        raise ValueError(
            f"kv_heads must divide heads and 16 must divide head_dim, "
            f"not heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}"
        )


def linear(shapes: Shapes, name: str, rows: int, cols: int, *, bias: bool = True) -> None:
    """Add a projection."""
    shapes[name + ".weight"] = (rows, cols)
    if bias:
        shapes[name + ".bias"] = (rows,)


def norm(shapes: Shapes, name: str, width: int, *, bias: bool = True) -> None:
    """Add a norm."""
    shapes[name + ".weight"] = (width,)
    if bias:
        shapes[name + ".bias"] = (width,)


def decoder(shapes: Shapes, prefix: str, text: dict[str, Any], *, query_bias: bool) -> None:
    """Add the embedding, the decoder layers and the last norm (Qwen2 and Llama share names)."""
    hidden, wide = text["hidden_size"], text["intermediate_size"]
    kv = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
    shapes[prefix + "embed_tokens.weight"] = (VOCAB_SIZE, hidden)
    for i in range(text["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}."
        for which, rows in (("q", hidden), ("k", kv), ("v", kv)):
            linear(shapes, f"{layer}self_attn.{which}_proj", rows, hidden, bias=query_bias)
        linear(shapes, layer + "self_attn.o_proj", hidden, hidden, bias=False)
        linear(shapes, layer + "mlp.gate_proj", wide, hidden, bias=False)
        linear(shapes, layer + "mlp.up_proj", wide, hidden, bias=False)
        linear(shapes, layer + "mlp.down_proj", hidden, wide, bias=False)
        norm(shapes, layer + "input_layernorm", hidden, bias=False)
        norm(shapes, layer + "post_attention_layernorm", hidden, bias=False)
    norm(shapes, prefix + "norm", hidden, bias=False)


def random_weights(shapes: Shapes, seed: int) -> dict[str, torch.Tensor]:
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
            is_scale = (is_norm and name.endswith("weight")) or "lambda" in name
            value = 0.2 * noise + float(is_scale)
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


def byte_tokenizer(special: Sequence[str], bos: str | None) -> Tokenizer:
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


def write_files(
    path: Path,
    config: dict[str, Any],
    text: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    tokenizer_config: dict[str, Any],
    template: str,
    processor: dict[str, Any],
) -> None:
    """Write a checkpoint folder; ``text`` holds the special ids and the longest prompt."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
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
