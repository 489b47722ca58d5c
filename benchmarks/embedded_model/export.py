"""Turn a training checkpoint into a Hugging Face checkpoint folder that every engine loads.

python -m benchmarks.embedded_model.export runs/language.pt ep_core/demo/model
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.embedded_model.model import Student
from benchmarks.embedded_model.prompts import FRAMES, MEAN, MERGE, PATCH, STD
from benchmarks.embedded_model.tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    SPECIALS,
    build_tokenizer,
    token_id,
)

TOKEN_PIXELS = (PATCH * MERGE) ** 2
SMALLEST, LARGEST = 64, 192  # visual tokens of a picture: what the training covers


def processor_config() -> dict[str, Any]:
    """The processor's configuration, written out: to build and save one needs torchvision."""
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "merge_size": MERGE,
        "patch_size": PATCH,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {
            "longest_edge": LARGEST * TOKEN_PIXELS,
            "shortest_edge": SMALLEST * TOKEN_PIXELS,
        },
        "temporal_patch_size": FRAMES,
    }
    video = {
        "do_sample_frames": False,
        "max_frames": 768,
        "max_video_tokens": 128000,
        "min_frames": 4,
        "return_metadata": False,
        "video_processor_type": "Qwen2VLVideoProcessor",
    }
    return {
        "image_processor": common | {"image_processor_type": "Qwen2VLImageProcessor"},
        "processor_class": "Qwen2_5_VLProcessor",
        "video_processor": common | video,
    }


def export(checkpoint: Path, folder: Path) -> None:
    """Write weights, tokenizer, chat template and configurations, without the training heads."""
    student = Student(seed=0)
    student.load_state_dict(torch.load(checkpoint)["student"])
    model = student.model.bfloat16()
    model.config.dtype = torch.bfloat16
    model.generation_config.bos_token_id = token_id(END_OF_TEXT)
    model.generation_config.eos_token_id = [token_id(IM_END), token_id(END_OF_TEXT)]
    model.generation_config.pad_token_id = token_id(END_OF_TEXT)
    model.save_pretrained(folder)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=SPECIALS,
        model_max_length=model.config.text_config.max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer._set_processor_class("Qwen2_5_VLProcessor")
    tokenizer.save_pretrained(folder)
    config = json.dumps(processor_config(), indent=2, sort_keys=True)
    (folder / "processor_config.json").write_text(config + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Export a training checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    export(args.checkpoint, args.folder)


if __name__ == "__main__":
    main()
