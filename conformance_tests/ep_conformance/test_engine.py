"""Level 2: checkpoints through the engine, compared with the oracle in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch

from ep_conformance.oracle import Oracle, OracleResult
from ep_conformance.plugin import Workshop
from ep_core import demo
from ep_core.backend import Answer, Backend, KVSlots, Request
from ep_core.errors import UnsupportedError
from ep_core.policy import PruningPolicy

NEW_TOKENS = 6
LOGITS_TOLERANCE = 1e-4
# Scores carry the rounding of the engine's own float32 matrix products. Their noise is measured:
# the largest difference between the oracle's scores in float32 and float64, times a margin for
# another order of summation. A token may change sides only within it.
NOISE_MARGIN = 4.0
NOISE_CAP = 1e-3  # of the span's score range: more noise than this is a defect, not rounding
OVERLAP_FLOOR = 0.95

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
    def policy(self) -> PruningPolicy:
        """The policy to open the engine with."""
        return PruningPolicy.parse(f"layer={self.layer},keep={self.keep},method={self.method}")

    def keep_of(self, tokens: int) -> int:
        """Tokens kept of a picture, by the definition in METHOD: half rounds up, at least 1."""
        if isinstance(self.keep, int):
            return self.keep
        exact = Fraction(str(self.keep)) * tokens + Fraction(1, 2)
        return max(1, exact.numerator // exact.denominator)

    def __str__(self) -> str:
        pictures = "+".join(map(str, self.pictures))
        return f"{self.checkpoint}-{pictures}pictures-{self.policy}"


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


def needs(case: EngineCase) -> list[pytest.MarkDecorator]:
    """The capabilities that a case takes."""
    batch = [pytest.mark.needs("batch")] if len(case.pictures) > 1 else []
    return batch + ([pytest.mark.needs("multi_image")] if max(case.pictures) > 1 else [])


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=needs(case)) for case in CASES]
)
def test_engine_matches_oracle(
    case: EngineCase,
    backend: Backend,
    device: str,
    workshop: Workshop,
) -> None:
    """Same kept tokens, same greedy tokens, logits within 1e-4, KV slots as kept."""
    model = demo.MODEL if case.checkpoint == "demo" else workshop.checkpoint(case.checkpoint)
    requests = [
        Request(contents(case.checkpoint, count, i, workshop), NEW_TOKENS)
        for i, count in enumerate(case.pictures)
    ]
    try:
        session = backend.open(model, case.policy, device=device, dtype="float32")
    except UnsupportedError as error:
        if case.checkpoint == "demo":  # what every backend must run
            raise
        pytest.skip(f"refused: {error}")
    with session:
        answers = session.generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        compare(case, model, request, answer)
    # a batch may hold padding too
    if len(requests) == 1 and answers[0].spans and backend.capabilities.kv_savings:
        compare_slots(answers[0], case.layer)


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


def compare(case: EngineCase, model: Path, request: Request, answer: Answer) -> None:
    """Set one answer beside the oracle's."""
    oracle = oracle_for(model)
    full = oracle.generate(
        request.content, layer=None, keep=None, method=case.method, max_new_tokens=1
    )
    keep = [case.keep_of(stop - start) for start, stop in full.spans]
    expected = oracle.generate(
        request.content,
        layer=case.layer,
        keep=keep,
        method=case.method,
        max_new_tokens=request.max_new_tokens,
    )
    assert [(span.start, span.stop) for span in answer.spans] == expected.spans, (
        "the pictures were found elsewhere"
    )
    if not expected.spans:
        assert answer.reason, "nothing was pruned, and the answer does not say why"
    kept = [list(span.kept) for span in answer.spans]
    if kept != expected.kept:
        explain(case, model, request, keep, kept, expected)
        return  # another choice within the noise: what follows may differ too
    assert list(answer.output_ids) == expected.output_ids, (
        f"greedy tokens {list(answer.output_ids)}, the oracle has {expected.output_ids}"
    )
    if answer.logits is not None:
        worst = float((answer.logits - expected.logits).abs().max())
        assert worst <= LOGITS_TOLERANCE, f"logits differ by up to {worst:.2e} from the oracle"


def explain(
    case: EngineCase,
    model: Path,
    request: Request,
    keep: Sequence[int],
    kept: Sequence[Sequence[int]],
    expected: OracleResult,
) -> None:
    """Fail unless every difference lies within the measured noise of the scores."""
    exact = oracle_for(model, torch.float64).generate(
        request.content, layer=case.layer, keep=keep, method=case.method, max_new_tokens=1
    )
    for i, (actual, wanted) in enumerate(zip(kept, expected.kept, strict=True)):
        overlap = len(set(actual) & set(wanted)) / len(wanted)
        assert overlap >= OVERLAP_FLOOR, (
            f"picture {i}: {overlap:.0%} of the oracle's tokens were kept, at least "
            f"{OVERLAP_FLOOR:.0%} are asked; kept {list(actual)}, the oracle {wanted}"
        )
        assert expected.scores is not None, (
            f"picture {i}: kept {list(actual)}, the oracle {wanted}; a set selection in float32 "
            "has no noise to explain that"
        )
        assert exact.scores is not None
        scores = torch.tensor(exact.scores[i], dtype=torch.float64)
        noise = NOISE_MARGIN * float((torch.tensor(expected.scores[i]) - scores).abs().max())
        allowed = min(noise, NOISE_CAP * float(scores.max() - scores.min()))
        threshold = float(scores.sort(descending=True).values[len(wanted) - 1])
        for token in sorted(set(actual) ^ set(wanted)):
            miss = abs(float(scores[token]) - threshold)
            assert miss <= allowed, (
                f"picture {i}, token {token}: its score {float(scores[token]):.6f} is {miss:.1e} "
                f"from the threshold {threshold:.6f}, noise explains {allowed:.1e}"
            )


@cache
def oracle_for(model: Path, dtype: torch.dtype = torch.float32) -> Oracle:
    """The oracle of a checkpoint, loaded once."""
    return Oracle(model, dtype)
