"""Models, processors and encoded prompts for the transformers backend."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from ep_backends.shared.pictures import read_picture
from ep_backends.shared.processor import load_processor
from ep_conformance.plugin import Workshop
from ep_conformance.test_engine import SIZES

Encode = Callable[..., dict[str, torch.Tensor]]


class Lab:
    """One tiny checkpoint: its model and how to encode messages for it."""

    def __init__(self, workshop: Workshop, name: str) -> None:
        self._workshop = workshop
        self.name = name
        self.path = workshop.checkpoint(name)
        self.processor = load_processor(self.path)

    def model(self, **options: Any) -> Any:
        options = {"dtype": torch.float32} | options
        return AutoModelForImageTextToText.from_pretrained(self.path, **options).eval()

    def picture(self, seed: int) -> Path:
        sizes = SIZES.get(self.name, [(112, 84), (56, 140), (168, 112)])
        return self._workshop.picture(seed, *sizes[seed % len(sizes)])

    def encode(
        self, *messages: Sequence[str | Path], side: str = "left", **options: Any
    ) -> dict[str, torch.Tensor]:
        """User messages (files and texts) as one padded batch."""
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": part}
                        if isinstance(part, str)
                        else {"type": "image", "image": read_picture(part)}
                        for part in message
                    ],
                }
            ]
            for message in messages
        ]
        batch = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "padding_side": side, "return_tensors": "pt"},
        )
        return dict(batch)


@pytest.fixture(scope="session")
def lab(workshop: Workshop) -> Callable[[str], Lab]:
    return cache(lambda name: Lab(workshop, name))


@pytest.fixture(scope="session", params=["qwen-gqa", "qwen2-vl", "internvl", "llava"])
def family(request: pytest.FixtureRequest, lab: Callable[[str], Lab]) -> Lab:
    """Each model family in turn."""
    return lab(request.param)


@pytest.fixture(scope="session")
def model(family: Lab) -> Any:
    """A shared model of the family; tests leave it as they found it."""
    return family.model()
