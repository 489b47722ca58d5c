"""What lmms-eval cannot read off the YAML file: where a question's pictures are."""

from typing import Any

from PIL import Image

from ep_core import demo

FOLDER = demo.PICTURES  # as a Path: the folder of your own pictures


def pictures(question: dict[str, Any]) -> list[Image.Image]:
    """The pictures of one line of questions.jsonl, in the order of the message."""
    return [Image.open(FOLDER / question["image"]).convert("RGB")]
