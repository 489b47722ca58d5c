"""Ask an exported checkpoint as a user of transformers would, through its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.embedded_model.tokenizer import IMAGE_PAD


@dataclass(frozen=True)
class Seen:
    """Pictures of one prompt, through the vision tower.

    Attributes:
        patches: `[patches, 1176]` from the image processor.
        grids: `[pictures, 3]` frames, rows and columns of patches.
        features: for each picture `[N, d]`, its visual tokens.
    """

    patches: torch.Tensor
    grids: torch.Tensor
    features: list[torch.Tensor]


class Answerer:
    """A checkpoint folder, loaded in bfloat16."""

    def __init__(self, folder: Path, attention: str = "sdpa") -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation=attention
        ).eval()

    def prompt(self, questions: Sequence[str], grids: torch.Tensor) -> list[str]:
        """The chat prompt of each question, with a pad for every visual token.

        AutoProcessor would do this, but it needs torchvision to build its video processor.
        """
        content = [{"type": "image"} for _ in grids]
        texts = []
        for question in questions:
            message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
            text = self.tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            )
            before, *rest = text.split(IMAGE_PAD)
            tokens = grids.prod(-1) // self.processor.merge_size**2
            spans = [IMAGE_PAD * int(n) + after for n, after in zip(tokens, rest, strict=True)]
            texts.append(before + "".join(spans))
        return texts

    @torch.inference_mode()
    def look(self, images: list[Image.Image]) -> Seen:
        """Run the vision tower, once for all questions about the same images."""
        inputs = self.processor(images=images, return_tensors="pt")
        patches, grids = inputs["pixel_values"].bfloat16(), inputs["image_grid_thw"]
        features = self.model.model.get_image_features(patches, grids).pooler_output
        return Seen(patches, grids, list(features))

    def inputs(self, seen: Seen, questions: Sequence[str]) -> dict[str, Any]:
        """The model's inputs for questions about the same images, as one batch."""
        batch = self.tokenizer(
            self.prompt(questions, seen.grids), padding=True, return_tensors="pt"
        )
        pads = batch["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        features = BaseModelOutputWithPooling(pooler_output=seen.features * len(questions))
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "mm_token_type_ids": pads.int(),
            "mm_encoder_outputs": {"image": features},
            "image_grid_thw": seen.grids.repeat(len(questions), 1),
        }

    @torch.inference_mode()
    def answer(self, seen: Seen, questions: Sequence[str]) -> list[str]:
        """Greedy answers to questions about the same images, as one batch."""
        inputs = self.inputs(seen, questions)
        output = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers = output[:, inputs["input_ids"].shape[1] :]
        decoded: list[str] = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return decoded
