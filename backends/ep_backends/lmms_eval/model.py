"""The two model classes that lmms-eval finds: any backend, and any OpenAI-compatible server."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.chat.openai import OpenAICompatible
from loguru import logger

from ep_backends.lmms_eval.requests import POSSIBLE, as_request, check_messages, sampling, until
from ep_core.backend import Session, default_device
from ep_core.errors import EntropyPruneError, UnsupportedError
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # what lmms-eval's client takes for an answer then


class Report:
    """What the reader of a score must know, collected over all requests.

    Args:
        channel: file descriptor for JSON objects, one a line (`entropyprune.cli.eval`); None sends
            nothing, and lmms-eval's log alone says it.
    """

    def __init__(self, channel: int | None) -> None:
        self._channel = channel
        self._requests = 0
        self._unpruned: Counter[str] = Counter()
        self._notes: list[str] = []

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one line to the channel, at once."""
        if self._channel is not None:
            os.write(self._channel, (json.dumps(message) + "\n").encode())

    def answered(self, reason: str | None = None) -> None:
        """Count one answer, and why nothing was pruned."""
        self._requests += 1
        if reason is not None:
            self._unpruned[reason] += 1

    def note(self, line: str) -> None:
        """Add a line for the reader, once."""
        if line not in self._notes:
            self._notes.append(line)

    def close(self) -> None:
        """Send and log the counts."""
        unpruned = dict(self._unpruned.most_common())
        for reason, count in unpruned.items():
            logger.warning(f"{count} of {self._requests} requests ran unpruned: {reason}")
        for note in self._notes:
            logger.warning(note)
        facts = {"requests": self._requests, "unpruned": unpruned, "notes": self._notes}
        self.send({"counts": facts})


class _Messages:
    """Reading instances of a chat model; `task_dict` is lmms-eval's."""

    task_dict: dict[str, Any]

    def _messages(self, instance: Instance) -> list[dict[str, Any]]:
        _, doc_to_messages, _, document, task, split = instance.args
        messages: list[dict[str, Any]] = doc_to_messages(self.task_dict[task][split][document])
        check_messages(task, messages)
        return messages

    def _first_of_each_task(self, instances: Sequence[Instance]) -> list[Instance]:
        """The first question of each task, looked at: refusals come before the work."""
        firsts = list({i.args[4]: i for i in reversed(instances)}.values())
        for instance in firsts:
            self._messages(instance)
        return firsts

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Not possible: a backend gives text."""
        raise UnsupportedError(f"a task compares log-likelihoods; {POSSIBLE}")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Not possible: a request is one message."""
        raise UnsupportedError(f"task {requests[0].args[4]} has several rounds; {POSSIBLE}")


class BackendModel(_Messages, lmms):  # type: ignore[misc] # lmms_eval has no types
    """A model in any registered backend, as a chat model of lmms-eval.

    Args:
        model: folder of a checkpoint in Hugging Face layout.
        backend: name of a backend.
        policy: as JSON, since commas separate lmms-eval's arguments; "off" for none. Default: the
            variable `ENTROPYPRUNE`.
        batch_size: requests at once.
        device, dtype: as in `Backend.open`.
        report: file descriptor for `Report`.
    """

    is_simple = False

    def __init__(
        self,
        model: str,
        backend: str = "transformers",
        policy: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        report: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UnsupportedError(f"batch_size {batch_size!r} is no count, as in batch_size=8")
        self.batch_size = int(batch_size)
        self.report = Report(report)
        if policy is None:
            pruning = PruningPolicy.from_environment()
        else:
            pruning = None if policy == "off" else PruningPolicy.parse(policy)
        engine = registry().backend(backend).load()
        self._opened = ExitStack()
        self._session: Session = self._opened.enter_context(
            engine.open(Path(model), pruning, device=device or default_device(engine), dtype=dtype)
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer greedily, in batches in the order given."""
        for first in self._first_of_each_task(requests):
            if asked := ", ".join(sampling(first.args[2])):
                self.report.note(f"task {first.args[4]} asks for {asked}; answered greedily")
        results: list[GenerationResult] = []
        for start in range(0, len(requests), self.batch_size):
            results += self._batch(requests[start : start + self.batch_size])
            self.report.send({"answered": len(results), "of": len(requests)})
        return results

    def _batch(self, instances: Sequence[Instance]) -> list[GenerationResult]:
        with TemporaryDirectory() as scratch:
            asked = []
            for i, instance in enumerate(instances):
                folder = Path(scratch, str(i))
                folder.mkdir()
                asked.append(as_request(self._messages(instance), instance.args[2], folder))
            try:
                answers = self._session.generate(asked)
            except EntropyPruneError as error:
                where = ", ".join(f"{i.args[4]} {i.args[3]}" for i in instances)
                raise type(error)(f"{error} (question {where})") from None
        results = []
        for instance, answer in zip(instances, answers, strict=True):
            self.report.answered(answer.reason)
            counts = TokenCounts(answer.prompt_tokens, len(answer.output_ids))
            results.append(GenerationResult(until(answer.text, instance.args[2]), counts))
        return results

    def clean(self) -> None:
        """Release the model; lmms-eval calls it before it scores."""
        self._opened.close()
        self.report.close()
        super().clean()


class EndpointModel(_Messages, OpenAICompatible):  # type: ignore[misc] # lmms_eval has no types
    """lmms-eval's own client of OpenAI-compatible servers, which stops where that goes on.

    lmms-eval scores a request that failed as a wrong answer; here it is an error.

    Args:
        report: file descriptor for `Report`.
        batch_size: requests at once.
        arguments: those of lmms-eval's class.
    """

    def __init__(
        self, report: int | None = None, batch_size: int | str = 1, **arguments: Any
    ) -> None:
        super().__init__(batch_size=batch_size, num_concurrent=batch_size, **arguments)
        self.report = Report(report)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Ask the server; temperatures and the like are the task's."""
        self._first_of_each_task(requests)
        results: list[GenerationResult] = []
        while rest := requests[len(results) :]:
            # many between two lines of progress, few at first: a server that fails, fails soon
            asked = rest[: self.batch_size * (16 if results else 1)]
            for instance, result in zip(asked, super().generate_until(asked), strict=True):
                if result.text is None or result.text.startswith(FAILED):
                    raise EntropyPruneError(f"the server gave no answer: {result.text}")
                self.report.answered()
                text = until(result.text, instance.args[2])
                results.append(GenerationResult(text, result.token_counts))
            self.report.send({"answered": len(results), "of": len(requests)})
        return results

    def clean(self) -> None:
        """Send the counts; lmms-eval calls it before it scores."""
        self.report.close()
        super().clean()
