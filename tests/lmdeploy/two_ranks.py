"""Ask a pruned engine with workers: two_ranks.py ASKED.json ANSWERS.json

In a process of its own, which can be given up. The workers import this file again, under another
name.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from lmdeploy.pytorch.engine.executor import mp_executor

from ep_core.backend import Request
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

# LMDeploy sends its workers messages through a ring of so many, and at its end everybody waits for
# everybody. Gloo's collectives wait as well, and then the ranks would wait for each other for ever.
mp_executor.NUM_SHARED_BLOCK = 256


def answers(asked: dict[str, Any]) -> list[Any]:
    """Kept tokens, answer and its log-probabilities; what is no text is a picture file."""
    contents = [
        tuple(part if kind == "text" else Path(part) for kind, part in content)
        for content in asked["contents"]
    ]
    policy = PruningPolicy.parse(asked["policy"])
    backend = registry().backend("lmdeploy").load()
    model = Path(asked["model"])
    with backend.open(model, policy, dtype="float32", **asked["options"]) as session:
        given = session.generate([Request(content, asked["tokens"]) for content in contents])
    return [
        [[span.kept for span in answer.spans], answer.output_ids, answer.logprobs]
        for answer in given
    ]


if __name__ == "__main__":
    asked_file, answers_file = map(Path, sys.argv[1:])
    answers_file.write_text(json.dumps(answers(json.loads(asked_file.read_text()))))
    os._exit(0)  # LMDeploy's workers are daemons
