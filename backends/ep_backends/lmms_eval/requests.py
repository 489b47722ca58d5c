"""One question of lmms-eval as one `Request`, and its answer as lmms-eval wants it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ep_core.backend import Request
from ep_core.errors import UnsupportedError

MAX_NEW_TOKENS = 1024  # lmms-eval's models' own default, for tasks that set none
POSSIBLE = (
    "possible are tasks that ask one question about pictures and take the text of the answer, as "
    "in --tasks gqa,mme,pope"
)


def check_messages(task: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what no `Request` can hold.

    Raises:
        UnsupportedError: anything but one user message of text and pictures.
    """
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        raise UnsupportedError(f"task {task} has messages of {', '.join(roles)}; {POSSIBLE}")
    for part in messages[0]["content"]:
        if part["type"] not in ("text", "image"):
            raise UnsupportedError(f"task {task} asks about {part['type']}; {POSSIBLE}")


def as_request(
    messages: Sequence[Mapping[str, Any]], generation: Mapping[str, Any], folder: Path
) -> Request:
    """The request of a checked message, its pictures written to a folder.

    Args:
        messages: as a task's `doc_to_messages` gives them.
        generation: the task's `generation_kwargs`.
        folder: an empty folder; must live until the request is answered.
    """
    content: list[str | Path] = []
    for i, part in enumerate(messages[0]["content"]):
        if part["type"] == "text":
            content.append(part["text"])
        elif isinstance(part["url"], Image.Image):
            path = folder / f"{i}.png"
            part["url"].convert("RGB").save(path, compress_level=1)  # lossless, as all of PNG
            content.append(path)
        else:
            content.append(Path(part["url"]))
    return Request(tuple(content), int(generation.get("max_new_tokens") or MAX_NEW_TOKENS))


def until(text: str, generation: Mapping[str, Any]) -> str:
    """The text before the first of the task's `until` strings."""
    ends = generation.get("until") or []
    for end in [ends] if isinstance(ends, str) else ends:
        if end:
            text = text.split(end, 1)[0]
    return text


def sampling(generation: Mapping[str, Any]) -> list[str]:
    """The task's settings that ask for anything but greedy decoding, as `temperature=0.7`."""
    asked = {
        "do_sample": bool(generation.get("do_sample")),
        "temperature": float(generation.get("temperature") or 0) > 0,
        "num_beams": int(generation.get("num_beams") or 1) > 1,
    }
    return [f"{key}={generation[key]}" for key, is_asked in asked.items() if is_asked]
