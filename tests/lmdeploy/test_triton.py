"""LMDeploy's Triton kernels read the kept tokens only; their interpreter runs them on the CPU.

Only here a batch of pruned prompts and a later chunk show that the metadata of the kernels'
flattened keys is right: the stand-in's attention finds keys through the block table alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ep_conformance.checkpoints import tiny_qwen2_5_vl
from ep_conformance.oracle import Oracle

from .common import TOLERANCE, picture

LAYER, KEEP, TOKENS, CHUNK = 1, 3, 2, 70


def test_triton_matches_the_oracle(tmp_path):
    model = tiny_qwen2_5_vl(tmp_path / "model", seed=1, heads=2, kv_heads=1, layers=2)
    pictures = [picture(tmp_path, i, *size) for i, size in enumerate([(4, 3), (3, 3)])]
    contents = [
        ("how many?",),
        # while that is computed, these two arrive: one pass for both
        (pictures[0], "a?"),
        (pictures[1], "b?"),
        # and this one takes two
        (pictures[0], "and a text that does not fit into the chunk", pictures[1], "what?"),
    ]
    asked = {
        "model": str(model),
        "policy": f"layer={LAYER},keep={KEEP},method=released",
        "contents": [
            [
                ("text", part) if isinstance(part, str) else ("picture", str(part))
                for part in content
            ]
            for content in contents
        ],
        "tokens": TOKENS,
        "options": {"max_prefill_token_num": CHUNK},
    }
    asked_file, answers_file = tmp_path / "asked.json", tmp_path / "answers.json"
    asked_file.write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("two_ranks.py"), asked_file, answers_file],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(answers_file.read_text())
    for content, (kept, ids, logprobs) in zip(contents, answers, strict=True):
        wanted = Oracle(model).generate(
            content,
            layer=LAYER if len(content) > 1 else None,
            keep=[KEEP] * sum(isinstance(part, Path) for part in content),
            method="released",
            max_new_tokens=TOKENS,
        )
        assert kept == (wanted.kept if wanted.spans else []), content
        assert ids == wanted.output_ids, f"{content}: {ids}, the oracle has {wanted.output_ids}"
        right = torch.log_softmax(wanted.logits, -1).max(-1).values
        assert logprobs == pytest.approx(right.tolist(), abs=TOLERANCE), content
