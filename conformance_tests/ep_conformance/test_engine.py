"""Level 2: checkpoints through the engine, compared with the oracle in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ep_conformance.comparison import Pruned, expect
from ep_conformance.plugin import Workshop
from ep_core import demo
from ep_core.backend import Answer, Backend, KVSlots, Request
from ep_core.errors import UnsupportedError

NEW_TOKENS = 6
ROWS = {
    "demo": "Qwen2.5-VL, trained",
    "qwen-gqa": "Qwen2.5-VL, 6 heads on 2",
    "qwen-odd": "Qwen2.5-VL, 9 heads on 3",
    "qwen2-vl": "Qwen2-VL",
    "internvl": "InternVL3",
    "llava": "LLaVA-1.5",
}
SIZES = {"llava": [(112, 112)], "internvl": [(224, 112), (112, 112), (224, 224)]}
TEXTS = ("what number is written?", "how many circles?", "is there a red star?", "and where?")


@dataclass(frozen=True)
class EngineCase:
    """A checkpoint under a policy, and the pictures of each request."""

    checkpoint: str
    layer: int
    keep: int | float
    method: str
    pictures: tuple[int, ...]

    @property
    def pruned(self) -> Pruned:
        """The policy."""
        return Pruned(self.layer, self.keep, self.method)

    def __str__(self) -> str:
        pictures = "+".join(map(str, self.pictures))
        return f"{self.checkpoint}-{pictures}pictures-{self.pruned.policy}"


CASES = [
    EngineCase("demo", 1, 0.11, "released", (1,)),
    EngineCase("demo", 2, 36, "set-entropy", (1, 0, 3, 2)),
    EngineCase("demo", 7, 0.5, "rows", (2,)),
    EngineCase("qwen-gqa", 1, 3, "rows", (3, 1, 0, 2)),
    EngineCase("qwen-gqa", 2, 0.3, "released", (1,)),
    EngineCase("qwen-gqa", 3, 0.5, "set-entropy", (3,)),
    EngineCase("qwen-odd", 1, 0.25, "set-entropy", (2, 1)),
    EngineCase("qwen-odd", 2, 1, "trace", (1, 3)),
    EngineCase("qwen-odd", 3, 4, "released", (0,)),
    EngineCase("qwen2-vl", 1, 0.3, "released", (2, 0, 1)),
    EngineCase("qwen2-vl", 2, 3, "set-entropy", (1, 3)),
    EngineCase("qwen2-vl", 3, 0.5, "rows", (2,)),
    EngineCase("internvl", 1, 0.25, "set-entropy", (3, 0, 1)),
    EngineCase("internvl", 2, 12, "released", (1, 2)),
    EngineCase("internvl", 3, 0.5, "trace", (2,)),
    EngineCase("llava", 1, 16, "trace", (1, 2)),
    EngineCase("llava", 2, 0.22, "released", (3, 0, 1, 2)),
    EngineCase("llava", 3, 0.5, "set-entropy", (1,)),
]


def marks(case: EngineCase) -> list[pytest.MarkDecorator]:
    """The capabilities that a case takes, and where it stands in the matrix."""
    row = pytest.mark.row(ROWS[case.checkpoint])
    batch = [pytest.mark.needs("batch")] if len(case.pictures) > 1 else []
    return [row, *batch, *([pytest.mark.needs("multi_image")] if max(case.pictures) > 1 else [])]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=marks(case)) for case in CASES]
)
def test_engine_matches_oracle(
    case: EngineCase,
    backend: Backend,
    device: str,
    workshop: Workshop,
    record_property: Callable[[str, object], None],
) -> None:
    """Same kept tokens, same greedy tokens, logits within 1e-4, KV slots as kept."""
    model = demo.MODEL if case.checkpoint == "demo" else workshop.checkpoint(case.checkpoint)
    requests = [
        Request(contents(case.checkpoint, count, i, workshop), NEW_TOKENS)
        for i, count in enumerate(case.pictures)
    ]
    try:
        session = backend.open(model, case.pruned.policy, device=device, dtype="float32")
    except UnsupportedError as error:
        if case.checkpoint == "demo":  # what every backend must run
            raise
        pytest.skip(f"refused: {error}")
    with session:
        answers = session.generate(requests)
    expected = [expect(model, request, case.pruned) for request in requests]
    pairs = list(zip(expected, answers, strict=True))
    record_property("answers", [right.to_json(answer) for right, answer in pairs])
    for right, answer in pairs:
        right.check(answer)
    # a batch may hold padding too
    if len(requests) == 1 and answers[0].spans and backend.capabilities.kv_savings:
        compare_slots(answers[0], case.layer)


@pytest.mark.row(ROWS["qwen-gqa"])
@pytest.mark.needs("batch")
@pytest.mark.needs("multi_image")
def test_prompts_of_equal_length_that_keep_different_numbers(
    backend: Backend,
    device: str,
    workshop: Workshop,
    record_property: Callable[[str, object], None],
) -> None:
    """Two prompts of 24 visual tokens, 10 and 14 or twice 12, of which a quarter is 7 or 6.

    Side by side they are padded from layer K on only, where an engine pads.
    """
    model, pruned = workshop.checkpoint("qwen-gqa"), Pruned(2, 0.25, "released")
    requests = [
        Request((*(workshop.picture(i, *size) for i, size in enumerate(sizes)), TEXTS[0]), 6)
        for sizes in [((56, 140), (56, 196)), ((112, 84), (112, 84))]
    ]
    with backend.open(model, pruned.policy, device=device, dtype="float32") as session:
        answers = session.generate(requests)
    expected = [expect(model, request, pruned) for request in requests]
    pairs = list(zip(expected, answers, strict=True))
    record_property("answers", [right.to_json(answer) for right, answer in pairs])
    for right, answer in pairs:
        right.check(answer)
    kept = [sum(len(span.kept) for span in answer.spans) for answer in answers]
    assert kept == [7, 6], f"{kept} visual tokens were kept, not [7, 6]"
    assert answers[0].prompt_tokens == answers[1].prompt_tokens, "the case is none"


def contents(
    checkpoint: str, pictures: int, seed: int, workshop: Workshop
) -> tuple[str | Path, ...]:
    """A message of that many pictures of different sizes, the last one after some text."""
    if checkpoint == "demo":
        files = [demo.PICTURES / f"sample_{(seed * 3 + i) % 12:02d}.png" for i in range(pictures)]
    else:
        sizes = SIZES.get(checkpoint, [(112, 84), (56, 140), (168, 112)])
        files = [workshop.picture(10 * seed + i, *sizes[i % len(sizes)]) for i in range(pictures)]
    first = ("look: ",) if pictures > 1 else ()
    return (*files[:-1], *first, *files[-1:], TEXTS[seed % len(TEXTS)])


def compare_slots(answer: Answer, layer: int) -> None:
    """Dropped tokens hold no KV slots from the layer on."""
    dropped = sum(span.stop - span.start - len(span.kept) for span in answer.spans)
    tokens, kv = answer.prompt_tokens, answer.kv
    assert kv is not None, "the engine does not tell its KV slots"
    if kv.block == 1:
        right = kv == KVSlots(tokens, tokens - dropped)
    else:  # whole blocks, and some ahead for the answer
        right = kv.below >= tokens and kv.below > kv.from_layer >= tokens - dropped
    assert right, (
        f"{dropped} of {tokens} tokens were dropped at layer {layer}, but the engine holds {kv}"
    )
