"""A checkpoint's processor, with or without torchvision, and messages through it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from ep_backends.shared.pictures import read_picture
from ep_core.errors import EntropyPruneError, UnsupportedError

_CLASS = "processor_class"


def load_processor(model: Path) -> Any:
    """The checkpoint's own processor, padding on the left.

    transformers' processors of video models need torchvision even for pictures. Where it is not
    installed, the same processor class is put together for pictures only, with the Pillow
    variant of its image processor.
    """
    if transformers.utils.is_torchvision_available():
        processor = transformers.AutoProcessor.from_pretrained(model)
    else:
        processor = _pictures_only(model)
    processor.tokenizer.padding_side = "left"
    return processor


def encode(processor: Any, contents: Sequence[Sequence[str | Path]]) -> Any:
    """User messages of texts and picture files through the chat template, as one padded batch.

    Raises:
        EntropyPruneError: a text holds the token of a picture or video, which would take one more
            from the request, or transformers' own checks refuse it.
    """
    texts = [part for content in contents for part in content if isinstance(part, str)]
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if token and any(token in text for text in texts):
            raise EntropyPruneError(
                f"the text contains {token}, which stands for a picture or video; leave it out, "
                "and give each picture as a file"
            )
    chats = [
        [{"role": "user", "content": [_part(part) for part in content]}] for content in contents
    ]
    try:
        return processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
    except (ValueError, TypeError, IndexError) as error:
        raise EntropyPruneError(f"the request cannot be encoded: {error}") from None


def _part(part: str | Path) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": read_picture(part)}


def _pictures_only(model: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    settings, _ = transformers.ProcessorMixin.get_processor_dict(model)
    # an older layout has the image processor in a file of its own, at times the only one
    image_settings = settings.get("image_processor") or _read(model / "preprocessor_config.json")
    sources = (settings, image_settings, tokenizer.init_kwargs)
    name = next((given[_CLASS] for given in sources if given.get(_CLASS)), "")
    image_class = str(image_settings.get("image_processor_type", "")).removesuffix("Fast")
    base = getattr(transformers, name, None)
    image_base = getattr(transformers, f"{image_class}Pil", None)
    if base is None or image_base is None:
        raise UnsupportedError(
            f"the processor of {model} needs torchvision: run pip install torchvision"
        )

    class PicturesOnly(base):  # type: ignore[misc, valid-type]  # a class found by name
        """The checkpoint's processor without its video half."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is not None:
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    image_processor = image_base.from_pretrained(model)
    keywords = {
        key: value
        for key, value in settings.items()
        if key not in (_CLASS, "image_processor", "video_processor")
    }
    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    return PicturesOnly(**{"chat_template": tokenizer.chat_template} | keywords | parts)


def _read(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return settings
