"""The demonstration model loads unchanged in SGLang and answers as it does in transformers."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ep_backends.shared.pictures import read_picture
from ep_core import demo
from ep_core.backend import Request
from ep_core.plugins import registry

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

ANSWER_TOKENS = 4
SAMPLES = json.loads((demo.PICTURES / "samples.json").read_text())[:4]
ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "mm_attention_backend": "sdpa",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "max_total_tokens": 8192,
    "max_running_requests": 16,
    "context_length": 2048,
    "log_level": "warning",
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    import sglang

    engine = sglang.Engine(model_path=str(demo.MODEL), **ENGINE)
    yield engine
    engine.shutdown()


def test_same_answers_as_transformers(engine):
    asked = [
        (demo.PICTURES / sample["image"], question["question"])
        for sample in SAMPLES
        for question in sample["questions"]
    ]
    with registry().backend("transformers").load().open(demo.MODEL, None, dtype="float32") as plain:
        expected = plain.generate([Request(pair, ANSWER_TOKENS) for pair in asked])
        template = plain.processor.apply_chat_template
        prompts = [
            template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for _, text in asked
        ]
    answers = engine.generate(
        prompt=prompts,
        image_data=[read_picture(picture) for picture, _ in asked],
        sampling_params={"temperature": 0, "max_new_tokens": ANSWER_TOKENS},
    )
    for (picture, question), ours, theirs in zip(asked, expected, answers, strict=True):
        assert theirs["meta_info"]["prompt_tokens"] == ours.prompt_tokens
        assert theirs["text"].strip() == ours.text, f"{picture.name}: {question}"
