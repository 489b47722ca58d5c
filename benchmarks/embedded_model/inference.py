"""Ask an exported checkpoint as a user of transformers would, through its chat template."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizer import IMAGE_PAD
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)


class Answerer:
    """A checkpoint folder, loaded in bfloat16."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16
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
    def answer(self, images: list[Image.Image], questions: Sequence[str]) -> list[str]:
        """Greedy answers to questions about the same images, as one batch."""
        seen = self.processor(images=images, return_tensors="pt")
        texts = self.prompt(questions, seen["image_grid_thw"])
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        is_image = inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mm_token_type_ids=is_image.int(),
            pixel_values=seen["pixel_values"].bfloat16().repeat(len(questions), 1),
            image_grid_thw=seen["image_grid_thw"].repeat(len(questions), 1),
            max_new_tokens=4,
            do_sample=False,
        )
        answers = output[:, inputs["input_ids"].shape[1] :]
        decoded: list[str] = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return decoded
