"""Two tensor-parallel ranks keep the tokens that one would: each holds half of the heads."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from ep_conformance import oracle
from ep_core import demo

PICTURES = [demo.PICTURES / f"sample_{i:02d}.png" for i in range(4)]
CONTENTS = [
    (PICTURES[0], "what number is written?"),
    (PICTURES[1], "look: ", PICTURES[2], "how many circles?"),
    ("is there a red star?",),
    (PICTURES[3], "and where?"),
]
KEEP, TOKENS = 36, 6  # a quarter of the 144 tokens of each picture
SECONDS = 600


def ask(folder, method):
    """What two ranks answer."""
    asked = {
        "model": str(demo.MODEL),
        "policy": f"layer=2,keep=0.25,method={method}",
        "contents": [
            [
                ("text", part) if isinstance(part, str) else ("picture", str(part))
                for part in content
            ]
            for content in CONTENTS
        ],
        "tokens": TOKENS,
        "options": {"tp": 2, "distributed_executor_backend": "mp"},
    }
    asked_file, answers_file = folder / "asked.json", folder / "answers.json"
    asked_file.write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("two_ranks.py"), asked_file, answers_file],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answers_file.read_text())


@cache
def expected(method):
    """What the oracle answers."""
    reference = oracle.Oracle(demo.MODEL)
    results = []
    for content in CONTENTS:
        pictures = sum(isinstance(part, Path) for part in content)
        layer = 2 if pictures else None
        result = reference.generate(
            content, layer=layer, keep=[KEEP] * pictures, method=method, max_new_tokens=TOKENS
        )
        results.append([result.kept, result.output_ids])
    return results


# The demonstration model has 8 query heads on 4 key heads, so a rank has 4 on 2. `released` reads
# the queries of all heads, `set-entropy` the hidden states, which every rank has whole.
@pytest.mark.parametrize("method", ["released", "set-entropy"])
def test_two_ranks_match_the_oracle(method, tmp_path):
    assert [answer[:2] for answer in ask(tmp_path, method)] == expected(method)


def test_half_of_the_heads_keep_other_tokens(monkeypatch):
    """So the test above notices ranks that do not gather their queries."""
    score = oracle.token_score
    wanted = [kept for kept, _ in expected("released")]
    for heads in (slice(0, 4), slice(4, 8)):
        monkeypatch.setattr(
            oracle, "token_score", lambda q, method, heads=heads: score(q[heads], method)
        )
        found = [kept for kept, _ in expected.__wrapped__("released")]
        assert all(f != w for f, w in zip(found, wanted, strict=True) if w), f"{heads}"
