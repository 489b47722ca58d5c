"""Ask one engine, in a process of its own: answers.py ENGINE ASKED.json ANSWERS.json

ENGINE is `transformers` or `lmdeploy`. A process that imports lmdeploy has the stand-in, which
changes torch, so transformers has to answer in another one.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ep_backends.shared.pictures import read_picture
from ep_core import demo

ANSWER_TOKENS = 4
Asked = list[tuple[str, str]]  # pictures of the demonstration, questions
Answers = list[tuple[int, str]]  # tokens of the prompt, text


def transformers(asked: Asked, options: dict[str, Any]) -> Answers:
    from ep_core.backend import Request
    from ep_core.plugins import registry

    requests = [Request((demo.PICTURES / picture, text), ANSWER_TOKENS) for picture, text in asked]
    with registry().backend("transformers").load().open(demo.MODEL, None, **options) as session:
        return [(answer.prompt_tokens, answer.text) for answer in session.generate(requests)]


def lmdeploy(asked: Asked, options: dict[str, Any]) -> Answers:
    from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline

    dtype = options.pop("dtype")
    config = PytorchEngineConfig(**options)
    config.dtype = dtype  # float32 is refused as an argument only
    greedy = GenerationConfig(max_new_tokens=ANSWER_TOKENS, do_sample=False)
    with pipeline(str(demo.MODEL), backend_config=config, log_level="WARNING") as pipe:
        answers = pipe([_message(*each) for each in asked], gen_config=greedy)
    if failed := [answer for answer in answers if answer.finish_reason == "error"]:
        raise RuntimeError(f"LMDeploy gave up on {len(failed)} of {len(answers)} requests")
    return [(answer.input_token_len, answer.text.strip()) for answer in answers]


def _message(picture: str, text: str) -> list[dict[str, Any]]:
    pixels = {"data": read_picture(demo.PICTURES / picture)}
    content = [{"type": "image_data", "image_data": pixels}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


if __name__ == "__main__":
    engine, asked, answers = sys.argv[1:]
    ask = {"transformers": transformers, "lmdeploy": lmdeploy}[engine]
    Path(answers).write_text(json.dumps(ask(**json.loads(Path(asked).read_text()))))
