"""Write a trained model as a Hugging Face checkpoint folder that every engine loads.

python -m benchmarks.pretrained.export FOLDER/tuned.pt MODEL_FOLDER

`train` does this at the end of a stage; the command does it for any checkpoint or snapshot.
"""

import argparse
import copy
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from benchmarks.embedded_model.export import processor_config
from benchmarks.embedded_model.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END
from benchmarks.pretrained.model import (
    Student,
    add_updates,
    build_model,
    build_tokenizer,
    merge_updates,
)


def export(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights in bfloat16, with low-rank updates merged, tokenizer and configurations.

    The folder is complete whenever it exists.
    """
    final, folder = folder, folder.with_name(f"{folder.name}.tmp")
    model = copy.deepcopy(model)
    merge_updates(model)
    model = model.bfloat16()
    model.tie_weights()
    end, stop = (tokenizer.token_to_id(name) for name in (END_OF_TEXT, IM_END))
    model.config.dtype = torch.bfloat16
    model.generation_config.bos_token_id = end
    model.generation_config.eos_token_id = [stop, end]
    model.generation_config.pad_token_id = end
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        model_max_length=model.config.text_config.max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    wrapped._set_processor_class("Qwen2_5_VLProcessor")
    wrapped.save_pretrained(folder)
    config = json.dumps(processor_config(), indent=2, sort_keys=True)
    (folder / "processor_config.json").write_text(config + "\n")
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Export a checkpoint or snapshot of a training.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    student = Student(build_model(tokenizer))
    state = torch.load(args.checkpoint)["student"]
    if any(name.endswith(".up") for name in state):
        add_updates(student.model)
    student.take(state)
    export(student.model, tokenizer, args.folder)


if __name__ == "__main__":
    main()
