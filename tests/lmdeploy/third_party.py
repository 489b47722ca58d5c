"""A family that this project does not ship, as a plugin of somebody's would bring it: Qwen3-VL.

Its layers 0 to 2 have features of the pictures added behind them, it normalises its queries, and
LMDeploy preprocesses its pictures in the newer form. Run as a program, in a process without
LMDeploy's stand-in, this asks transformers: third_party.py MODEL ASKED.json ANSWERS.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ep_backends.shared.pictures import read_picture
from ep_conformance.checkpoints import tiny_qwen2_5_vl
from ep_conformance.checkpoints.parts import VOCAB_SIZE, random_weights
from ep_conformance.oracle import keep_set
from ep_core.budget import DecoderShape
from ep_core.family import Decoder, Family, PatchGrid, Placeholder
from ep_core.plan import runs_of

PIXELS = 32  # sides of what becomes a token


def decoder(config: Any) -> Decoder:
    text = config["text_config"]
    shape = DecoderShape(
        layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
    )
    adds = frozenset(range(len(config["vision_config"]["deepstack_visual_indexes"])))
    return Decoder(shape, query_norm=True, adds_after=adds)


def find(config: Any, ids: Any) -> list[Placeholder]:
    return [Placeholder(run) for run in runs_of(ids, config["image_token_id"])]


FAMILY = Family(
    model_type="qwen3_vl",
    name="Qwen3-VL",
    default_layer=3,
    default_layer_source="the first that it works with",
    decoder=decoder,
    find=find,
    patch_grid=lambda config, tokens, size: PatchGrid(1, tokens, (0, 0, *size)),
)


def tiny_qwen3_vl(path: Path, seed: int) -> Path:
    """A checkpoint of random weights, with the tokenizer of the tiny Qwen2.5-VL."""
    from safetensors.torch import save_file
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tiny_qwen2_5_vl(path, seed)
    base = json.loads((path / "config.json").read_text())
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
            "rope_theta": 1000.0,
        },
    } | {key: base["text_config"][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 96,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    tokens = {key: base[key] for key in base if key.endswith("_token_id")}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    config.dtype = "float32"
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(random_weights(shapes, seed), path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(path)
    processor = json.loads((path / "processor_config.json").read_text())
    sizes = {"patch_size": 16, "size": {"shortest_edge": 64 * 64, "longest_edge": 512 * 512}}
    processor["processor_class"] = "Qwen3VLProcessor"
    processor["image_processor"] |= sizes
    processor["video_processor"] |= sizes | {"video_processor_type": "Qwen3VLVideoProcessor"}
    (path / "processor_config.json").write_text(json.dumps(processor))
    names = json.loads((path / "tokenizer_config.json").read_text())
    names["processor_class"] = "Qwen3VLProcessor"
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


# The same prompts in transformers: dropped tokens stay, and layers >= K do not attend to them.


def answer(model: Any, processor: Any, content: list[Any], layer: int, keep: float | None) -> Any:
    """Kept tokens of each picture, and 5 greedy tokens."""
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": part}
                if kind == "text"
                else {"type": "image", "image": read_picture(Path(part))}
                for kind, part in content
            ],
        }
    ]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    runs = runs_of(inputs["input_ids"][0].tolist(), model.config.image_token_id)
    entering: list[torch.Tensor] = []
    layers = model.model.language_model.layers
    dropped: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        entering.append((args[0] if args else kwargs["hidden_states"])[0].detach())

    def block(module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].clone()
        mask[..., dropped] = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask}

    kept = []
    if runs and keep is not None:
        hook = layers[layer].register_forward_pre_hook(look, with_kwargs=True)
        model(**inputs)
        hook.remove()
        for run in runs:
            hidden = entering[0][run.start : run.stop].double().numpy()
            chosen = keep_set(hidden, max(1, int(keep * len(run) + 0.5)))
            kept.append(chosen)
            dropped += [at for at in range(run.start, run.stop) if at - run.start not in chosen]
    hooks = [each.register_forward_pre_hook(block, with_kwargs=True) for each in layers[layer:]]
    ids = []
    for _ in range(5):
        token = int(model(**inputs).logits[0, -1].argmax())
        ids.append(token)
        for name, value in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                more = torch.tensor([[value]], dtype=inputs[name].dtype)
                inputs[name] = torch.cat([inputs[name], more], dim=1)
    for hook in hooks:
        hook.remove()
    return kept, ids


def main(folder: str, asked_file: str, answers_file: str) -> None:
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    processor = AutoProcessor.from_pretrained(folder)
    asked = json.loads(Path(asked_file).read_text())
    with torch.no_grad():
        answers = [answer(model, processor, *each) for each in asked]
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
