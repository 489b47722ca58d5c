"""Processors are found in each layout that published checkpoints have."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from ep_backends.shared.pictures import read_picture
from ep_backends.shared.processor import encode, load_processor
from ep_core import EntropyPruneError


def split(folder: Path) -> None:
    """The image processor in a file of its own."""
    settings = json.loads((folder / "processor_config.json").read_text())
    settings.pop("video_processor", None)
    image = settings.pop("image_processor") | {"processor_class": settings["processor_class"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "processor_config.json").write_text(json.dumps(settings))


def only_the_image_processor(folder: Path) -> None:
    """No file for the processor, whose defaults must do: as Qwen publishes it."""
    split(folder)
    (folder / "processor_config.json").unlink()


def template_as_json(folder: Path) -> None:
    """The chat template in a JSON file, beside a split processor."""
    split(folder)
    template = folder / "chat_template.jinja"
    text = json.dumps({"chat_template": template.read_text()})
    (folder / "chat_template.json").write_text(text)
    template.unlink()


@pytest.mark.parametrize("change", [split, only_the_image_processor, template_as_json])
def test_an_older_layout_encodes_alike(family, change, tmp_path):
    if change is only_the_image_processor and not family.name.startswith("qwen"):
        pytest.skip("this processor has settings of its own")
    folder = tmp_path / "model"
    shutil.copytree(family.path, folder)
    change(folder)
    older = load_processor(folder).apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": read_picture(family.picture(0))},
                    {"type": "text", "text": "what?"},
                ],
            }
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    newer = family.encode([family.picture(0), "what?"])
    assert older.keys() == newer.keys()
    for key, value in newer.items():
        assert torch.equal(older[key], value), f"{key} differs"


@pytest.mark.parametrize("name", ["image_token", "video_token"])
def test_a_text_with_the_token_of_a_picture_is_refused_by_name(family, name):
    """Some versions of transformers run out of pictures then, others compute without features."""
    token = getattr(family.processor, name, None)
    if token is None:
        pytest.skip("this family has no video token")
    with pytest.raises(EntropyPruneError, match=f"the text contains {re.escape(token)}, which"):
        encode(family.processor, [["no picture"], [family.picture(0), f"what is {token}?"]])
