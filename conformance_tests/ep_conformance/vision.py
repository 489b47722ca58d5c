"""Picture preprocessing and vision towers of the oracle, in plain torch.

Three towers: Qwen2-VL and Qwen2.5-VL (rotary positions, merger; the newer one attends in windows),
CLIP with the LLaVA projector, and InternVL (tiles, pixel shuffle). Each turns one picture file into
the rows that replace its placeholders, and says how their positions go on from the start of the
picture. Pictures and tiles are done one at a time and attention is full with an explicit mask:
slow, and easy to check by eye.

What the language model shares (:func:`load_weights`, :func:`linear`, :func:`rms_norm`,
:func:`rotate`, :func:`attention`) lives here too. Formulas: the published model definitions
(Qwen2-VL and Qwen2.5-VL technical reports, CLIP, LLaVA-1.5, InternVL3) with the tensor names of
their Hugging Face files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]

# Files call the same tensor by several names: transformers 5 saves with the prefix order of the
# original releases and names its modules otherwise. The first prefix that fits is replaced.
_PREFIXES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "text.",
    "model.language_model.": "text.",
    "model.visual.": "vision.",
    "model.vision_tower.": "vision.",
    "model.multi_modal_projector.": "projector.",
    "visual.": "vision.",
    "vision_tower.vision_model.": "vision.",
    "vision_tower.": "vision.",
    "multi_modal_projector.": "projector.",
    "model.": "text.",
}

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def load_weights(model_dir: Path, dtype: torch.dtype) -> Weights:
    """All tensors of a folder in ``dtype``, called text.*, vision.*, projector.* and lm_head.*."""
    weights: Weights = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
            weights[_PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = tensor.to(dtype)
    return weights


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """``x W^T + b`` with the weight called ``name``; the bias is added where the file has one."""
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def rms_norm(weights: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last axis, computed in float32 or better; same dtype out as in."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weights[name + ".weight"] * wide.to(x.dtype)


def layer_norm(weights: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last axis with the weight and the bias called ``name``."""
    return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], eps)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, pairing channel ``c`` with ``c + D/2``.

    x: [T, H, D]; angles: [T, D/2], float32 or better. Returns [T, H, D] in the dtype of ``x``.
    """
    cos = angles.cos().repeat(1, 2).unsqueeze(1).to(x.dtype)  # [T, 1, D]
    sin = angles.sin().repeat(1, 2).unsqueeze(1).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Softmax attention where token t reads slot s only if ``allowed[t, s]``.

    q: [T, H, D]; k, v: [S, G, D] with G dividing H (query head h reads head h // (H / G));
    allowed: [T, S] bool, at least one True a row. Returns [T, H * D].
    """
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    logits = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~allowed, -torch.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("hts,shd->thd", logits.softmax(-1, dtype=wide).to(q.dtype), v).flatten(1)


def read_picture(
    path: Path, processor: dict[str, Any], thumbnail: tuple[int, int] | None = None
) -> torch.Tensor:
    """A picture file as [3, height, width] float32: rescaled, then normalised per channel.

    ``processor`` is the image processor's JSON. Nothing but a ``thumbnail`` (width, height) is
    resized, and nothing cropped: the towers below refuse a picture that would need it.
    """
    with Image.open(path) as file:
        picture = file.convert("RGB")
    if thumbnail is not None:
        picture = picture.resize(thumbnail, processor["resample"])
    rgb = np.asarray(picture, dtype=np.float64)  # [height, width, 3]
    scaled = (rgb * processor["rescale_factor"]).astype(np.float32)
    mean = np.array(processor["image_mean"], dtype=np.float32)
    std = np.array(processor["image_std"], dtype=np.float32)
    return torch.from_numpy(((scaled - mean) / std).transpose(2, 0, 1).copy())


def encode_qwen(
    path: Path, config: dict[str, Any], processor: dict[str, Any], weights: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Qwen2-VL or Qwen2.5-VL tower: features [N, text hidden] and position offsets [3, N].

    Raises ValueError if the image processor would resize the picture.
    """
    vision = config["vision_config"]
    is_older = config["model_type"] == "qwen2_vl"
    norm = layer_norm if is_older else rms_norm
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    pixels = read_picture(path, processor)  # [3, height, width]
    _, height, width = pixels.shape
    low, high = processor["size"]["shortest_edge"], processor["size"]["longest_edge"]
    if height % (patch * merge) or width % (patch * merge) or not low <= height * width <= high:
        raise ValueError(
            f"{path.name} is {width}x{height}: the oracle does not resize, so width and height "
            f"must be multiples of {patch * merge} and the area between {low} and {high} pixels"
        )
    rows, cols = height // patch, width // patch

    def merge_order(grid: torch.Tensor) -> torch.Tensor:
        # [rows, cols, ...] -> [rows * cols, ...]; the merge x merge patches that later become
        # one token are neighbours in this order
        blocks = grid.reshape(rows // merge, merge, cols // merge, merge, *grid.shape[2:])
        return blocks.transpose(1, 2).flatten(0, 3)

    tiles = pixels.reshape(3, rows, patch, cols, patch).permute(1, 3, 0, 2, 4)
    # A still picture fills every frame of a temporal patch.
    tiles = tiles.unsqueeze(3).expand(-1, -1, -1, vision["temporal_patch_size"], -1, -1)
    embed = weights["vision.patch_embed.proj.weight"].flatten(1)  # [hidden, 3 * frames * p * p]
    x = merge_order(tiles.flatten(2)).to(embed.dtype) @ embed.T  # [P, hidden]

    row = merge_order(torch.arange(rows)[:, None].expand(rows, cols))  # [P]
    col = merge_order(torch.arange(cols)[None, :].expand(rows, cols))
    heads = vision["num_heads"]
    head_dim = x.shape[1] // heads
    theta = vision.get("rope_parameters", {"rope_theta": 10000.0})["rope_theta"]
    # Half of the D/2 frequencies turn with the row, the other half with the column.
    freq = 1.0 / theta ** (torch.arange(0, head_dim // 2, 2, dtype=torch.float32) * 2 / head_dim)
    angles = torch.cat((row[:, None] * freq, col[:, None] * freq), dim=1)  # [P, D/2]

    everywhere = torch.ones(rows * cols, rows * cols, dtype=torch.bool)
    allowed = [everywhere] * vision["depth"]
    if not is_older:
        side = vision["window_size"] // merge // patch * merge  # window side in patches
        window = torch.stack((row // side, col // side), dim=1)  # [P, 2]
        same_window = (window[:, None] == window[None, :]).all(-1)
        full = vision["fullatt_block_indexes"]
        allowed = [everywhere if i in full else same_window for i in range(vision["depth"])]
    act = ACTIVATIONS[vision.get("hidden_act", "quick_gelu")]  # published Qwen2-VL leaves it out
    for i in range(vision["depth"]):
        name = f"vision.blocks.{i}."
        h = norm(weights, name + "norm1", x, 1e-6)
        q, k, v = linear(weights, name + "attn.qkv", h).view(-1, 3, heads, head_dim).unbind(1)
        mixed = attention(rotate(q, angles), rotate(k, angles), v, allowed[i])
        x = x + linear(weights, name + "attn.proj", mixed)
        h = norm(weights, name + "norm2", x, 1e-6)
        if is_older:
            h = act(linear(weights, name + "mlp.fc1", h))
            x = x + linear(weights, name + "mlp.fc2", h)
        else:
            gate = act(linear(weights, name + "mlp.gate_proj", h))
            up = linear(weights, name + "mlp.up_proj", h)
            x = x + linear(weights, name + "mlp.down_proj", gate * up)

    x = norm(weights, "vision.merger.ln_q", x, 1e-6)
    x = x.reshape(rows * cols // merge**2, -1)  # the patches of one token, side by side
    x = F.gelu(linear(weights, "vision.merger.mlp.0", x))
    # Time stands still inside a picture; rows and columns of tokens count from its start.
    rows, cols = rows // merge, cols // merge
    offsets = torch.stack(
        (
            torch.zeros(rows * cols, dtype=torch.long),
            torch.arange(rows).repeat_interleave(cols),
            torch.arange(cols).repeat(rows),
        )
    )
    return linear(weights, "vision.merger.mlp.2", x), offsets


def encode_llava(
    path: Path, config: dict[str, Any], processor: dict[str, Any], weights: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP and the LLaVA projector: features [N, text hidden] and position offsets [3, N].

    Strategy ``default`` drops the class token, ``full`` keeps it in front. Raises ValueError if
    the image processor would resize or crop the picture.
    """
    vision = config["vision_config"]
    side = vision["image_size"]
    pixels = read_picture(path, processor)  # [3, height, width]
    if tuple(pixels.shape) != (3, side, side):
        raise ValueError(
            f"{path.name} is {pixels.shape[2]}x{pixels.shape[1]}: the oracle does not resize, "
            f"so pictures for this checkpoint must be {side}x{side}"
        )

    eps = vision["layer_norm_eps"]
    embed = weights["vision.embeddings.patch_embedding.weight"]  # [hidden, 3, p, p]
    patches = F.conv2d(pixels[None].to(embed.dtype), embed, stride=vision["patch_size"])[0]
    first = weights["vision.embeddings.class_embedding"][None]
    x = torch.cat((first, patches.flatten(1).T))  # [1 + P, hidden]
    x = x + weights["vision.embeddings.position_embedding.weight"]
    x = layer_norm(weights, "vision.pre_layrnorm", x, eps)

    heads = vision["num_attention_heads"]
    everywhere = torch.ones(len(x), len(x), dtype=torch.bool)
    act = ACTIVATIONS[vision["hidden_act"]]
    states = [x]  # the input, then the output of every layer
    for i in range(vision["num_hidden_layers"]):
        name = f"vision.encoder.layers.{i}."
        h = layer_norm(weights, name + "layer_norm1", x, eps)
        q, k, v = (
            linear(weights, f"{name}self_attn.{which}_proj", h).view(len(h), heads, -1)
            for which in "qkv"
        )
        x = x + linear(weights, name + "self_attn.out_proj", attention(q, k, v, everywhere))
        h = layer_norm(weights, name + "layer_norm2", x, eps)
        x = x + linear(weights, name + "mlp.fc2", act(linear(weights, name + "mlp.fc1", h)))
        states.append(x)

    x = states[config["vision_feature_layer"]]
    if config["vision_feature_select_strategy"] == "default":
        x = x[1:]
    x = ACTIVATIONS[config["projector_hidden_act"]](linear(weights, "projector.linear_1", x))
    return linear(weights, "projector.linear_2", x), torch.arange(len(x)).expand(3, -1)


def encode_internvl(
    path: Path, config: dict[str, Any], processor: dict[str, Any], weights: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """InternVL's tower and projector: features [N, text hidden] and position offsets [3, N].

    The tiles of the picture row by row and, if there are several, a thumbnail of the whole of it.
    Raises ValueError if the image processor would resize the picture before it cuts the tiles.
    """
    side = config["vision_config"]["image_size"][0]
    pixels = read_picture(path, processor)  # [3, height, width]
    _, height, width = pixels.shape
    count = (height // side) * (width // side)
    if height % side or width % side or count > processor["max_patches"]:
        raise ValueError(
            f"{path.name} is {width}x{height}: the oracle does not resize, so width and height "
            f"must be multiples of {side} and make at most {processor['max_patches']} tiles"
        )
    tiles = [
        pixels[:, top : top + side, left : left + side]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    if count > 1:
        tiles.append(read_picture(path, processor, thumbnail=(side, side)))
    x = torch.cat([_internvl_tile(tile, config, weights) for tile in tiles])
    return x, torch.arange(len(x)).expand(3, -1)


def _internvl_tile(pixels: torch.Tensor, config: dict[str, Any], weights: Weights) -> torch.Tensor:
    """Features [N, text hidden] of one tile [3, side, side]."""
    vision = config["vision_config"]
    eps = vision["layer_norm_eps"]
    embed = "vision.embeddings.patch_embeddings.projection."
    x = F.conv2d(
        pixels[None].to(weights[embed + "weight"].dtype),
        weights[embed + "weight"],
        weights[embed + "bias"],
        stride=vision["patch_size"],
    )[0]
    side = x.shape[1]  # in patches
    x = torch.cat((weights["vision.embeddings.cls_token"][0], x.flatten(1).T))  # [1 + P, hidden]
    x = x + weights["vision.embeddings.position_embeddings"][0]

    heads = vision["num_attention_heads"]
    everywhere = torch.ones(len(x), len(x), dtype=torch.bool)
    act = ACTIVATIONS[vision["hidden_act"]]
    for i in range(vision["num_hidden_layers"]):
        name = f"vision.encoder.layer.{i}."
        h = layer_norm(weights, name + "layernorm_before", x, eps)
        q, k, v = (
            linear(weights, f"{name}attention.{which}_proj", h).view(len(h), heads, -1)
            for which in "qkv"
        )
        h = linear(weights, name + "attention.projection_layer", attention(q, k, v, everywhere))
        x = x + weights[name + "lambda_1"] * h
        h = layer_norm(weights, name + "layernorm_after", x, eps)
        h = linear(weights, name + "mlp.fc2", act(linear(weights, name + "mlp.fc1", h)))
        x = x + weights[name + "lambda_2"] * h

    # Pixel shuffle: 2 x 2 neighbours become one token, side by side.
    merge = round(1 / config["downsample_ratio"])
    grid = x[1:].view(side // merge, merge, side // merge, merge, -1)  # without the class token
    x = grid.transpose(1, 2).reshape((side // merge) ** 2, -1)
    x = layer_norm(weights, "projector.layer_norm", x, 1e-5)
    x = ACTIVATIONS[config["projector_hidden_act"]](linear(weights, "projector.linear_1", x))
    return linear(weights, "projector.linear_2", x)
