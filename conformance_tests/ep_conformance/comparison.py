"""One answer of an engine beside the oracle's: what must be equal, and what noise explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ep_conformance.oracle import Oracle, OracleResult
from ep_core.backend import Answer, Request
from ep_core.budget import Keep
from ep_core.policy import PruningPolicy

LOGITS_TOLERANCE = 1e-4  # of log-probabilities too
# Scores carry the rounding of the engine's own float32 matrix products. Their noise is measured:
# the largest difference between the oracle's scores in float32 and float64, times a margin for
# another order of summation. A token may change sides only within it.
NOISE_MARGIN = 4.0
NOISE_CAP = 1e-3  # of the span's score range: more noise than this is a defect, not rounding
OVERLAP_FLOOR = 0.95


@dataclass(frozen=True)
class Pruned:
    """What is asked of pruning, for an engine and for the oracle.

    Attributes:
        layer: the first layer that sees the kept tokens only.
        keep: of each picture, a count or a share.
        method: name of a selector.
    """

    layer: int
    keep: int | float
    method: str

    @property
    def policy(self) -> PruningPolicy:
        """The policy to open an engine with."""
        return PruningPolicy(self.layer, Keep(self.keep), self.method)

    def keep_of(self, tokens: int) -> int:
        """Tokens kept of a picture, by the definition in METHOD: half rounds up, at least 1."""
        if isinstance(self.keep, int):
            return self.keep
        exact = Fraction(str(self.keep)) * tokens + Fraction(1, 2)
        return max(1, exact.numerator // exact.denominator)


class Expected:
    """The oracle's result for one request."""

    def __init__(self, model: Path, request: Request, pruned: Pruned | None) -> None:
        """Run the oracle.

        Args:
            model: folder of the checkpoint.
            request: its budget is not read.
            pruned: what to keep, or None for everything.
        """
        self._model, self._request, self.pruned = model, request, pruned
        self.result = self._run(request.max_new_tokens, torch.float32)

    def check(self, answer: Answer) -> None:
        """Fail unless an answer is the oracle's: spans, kept tokens, greedy tokens, logits.

        Of a client that left, the tokens that it got are compared.
        """
        if self.pruned is not None:
            assert [(span.start, span.stop) for span in answer.spans] == self.result.spans, (
                "the pictures were found elsewhere"
            )
            if not self.result.spans:
                assert answer.reason, "nothing was pruned, and the answer does not say why"
        result = self._result_for(answer)
        steps = len(answer.output_ids)
        if self._request.leave_after is None or steps >= len(result.output_ids):
            steps = len(result.output_ids)
        else:
            assert steps >= self._request.leave_after, f"the client left with {steps} tokens"
        assert list(answer.output_ids) == result.output_ids[:steps], (
            f"greedy tokens {list(answer.output_ids)}, the oracle has {result.output_ids}"
        )
        logits = result.logits[:steps]
        if answer.logits is not None:
            worst = float((answer.logits - logits).abs().max())
            assert worst <= LOGITS_TOLERANCE, f"logits differ by up to {worst:.2e} from the oracle"
        if answer.logprobs is not None:
            chosen = torch.tensor(answer.output_ids)[:, None]
            right = logits.log_softmax(-1).take_along_dim(chosen, dim=1)[:, 0]
            worst = float((torch.tensor(answer.logprobs) - right).abs().max())
            assert worst <= LOGITS_TOLERANCE, f"log-probabilities are off by up to {worst:.2e}"

    def to_json(self, answer: Answer) -> dict[str, Any]:
        """What a recording keeps of an answer: enough to compare it with another engine's."""
        return {
            "output_ids": list(answer.output_ids),
            "reason": answer.reason,
            "spans": [span.to_json() for span in answer.spans],
            "scores": shorten(self.result.scores),
        }

    def _result_for(self, answer: Answer) -> OracleResult:
        """What the oracle computes from the tokens that an engine kept.

        A choice that differs within the noise is explained; everything behind it is compared with
        an oracle that goes on from that choice.
        """
        kept = tuple(tuple(span.kept) for span in answer.spans)
        if self.pruned is None or not kept or [list(own) for own in kept] == self.result.kept:
            return self.result
        self._explain(kept)
        return self._run(self._request.max_new_tokens, torch.float32, kept)

    def _explain(self, kept: Sequence[Sequence[int]]) -> None:
        """Fail unless every difference lies within the measured noise of the scores."""
        exact = self._run(1, torch.float64)
        for i, (actual, wanted) in enumerate(zip(kept, self.result.kept, strict=True)):
            if list(actual) == wanted:
                continue
            overlap = len(set(actual) & set(wanted)) / len(wanted)
            assert overlap >= OVERLAP_FLOOR, (
                f"picture {i}: {overlap:.0%} of the oracle's tokens were kept, at least "
                f"{OVERLAP_FLOOR:.0%} are asked; kept {list(actual)}, the oracle {wanted}"
            )
            assert self.result.scores is not None, (
                f"picture {i}: kept {list(actual)}, the oracle {wanted}; a set selection in "
                "float32 has no noise to explain that"
            )
            assert exact.scores is not None
            scores = torch.tensor(exact.scores[i], dtype=torch.float64)
            noise = (torch.tensor(self.result.scores[i]) - scores).abs().max()
            spread = float(scores.max() - scores.min())
            allowed = min(NOISE_MARGIN * float(noise), NOISE_CAP * spread)
            threshold = float(scores.sort(descending=True).values[len(wanted) - 1])
            for token in sorted(set(actual) ^ set(wanted)):
                miss = abs(float(scores[token]) - threshold)
                assert miss <= allowed, (
                    f"picture {i}, token {token}: its score {float(scores[token]):.6f} is "
                    f"{miss:.1e} from the threshold {threshold:.6f}, noise explains {allowed:.1e}"
                )

    def _run(
        self,
        tokens: int,
        dtype: torch.dtype,
        chosen: Sequence[Sequence[int]] | None = None,
    ) -> OracleResult:
        oracle, content = _oracle(self._model, dtype), self._request.content
        if self.pruned is None:
            return oracle.generate(content, layer=None, keep=None, method="", max_new_tokens=tokens)
        return oracle.generate(
            content,
            layer=self.pruned.layer,
            keep=[self.pruned.keep_of(size) for size in _picture_sizes(self._model, content)],
            method=self.pruned.method,
            max_new_tokens=tokens,
            chosen=chosen,
        )


def shorten(scores: Sequence[Sequence[float]] | None) -> list[list[float | None]] | None:
    """Scores by picture and token with seven digits, as float32 has them; JSON knows no NaN."""
    if scores is None:
        return None
    return [[float(f"{s:.7g}") if math.isfinite(s) else None for s in own] for own in scores]


@cache
def expect(model: Path, request: Request, pruned: Pruned | None) -> Expected:
    """`Expected`, once for each question."""
    return Expected(model, request, pruned)


@cache
def _picture_sizes(model: Path, content: tuple[str | Path, ...]) -> list[int]:
    result = _oracle(model, torch.float32).generate(
        content, layer=None, keep=None, method="", max_new_tokens=1
    )
    return [stop - start for start, stop in result.spans]


@cache
def _oracle(model: Path, dtype: torch.dtype) -> Oracle:
    return Oracle(model, dtype)
