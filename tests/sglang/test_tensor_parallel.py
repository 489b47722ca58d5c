"""Two tensor-parallel ranks keep the tokens that one would: each holds half of the heads."""

from pathlib import Path

import pytest

from ep_conformance.oracle import Oracle
from ep_core import demo
from ep_core.backend import Request
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

PICTURES = [demo.PICTURES / f"sample_{i:02d}.png" for i in range(4)]
TEXT = ("how many circles?",)
REQUESTS = [
    (PICTURES[0], "what number is written?"),
    (PICTURES[1], "look: ", PICTURES[2], "how many circles?"),
    ("is there a red star?",),
    (PICTURES[3], "and where?"),
]
KEEP = 36  # a quarter of the 144 tokens of each picture
NEW_TOKENS = 6
# 200 tokens a chunk cut through pictures: halves of the heads wait for the next chunk too
TWO_RANKS = {"tp_size": 2, "disable_custom_all_reduce": True, "chunked_prefill_size": 200}


# The demonstration model has 8 query heads on 4 key heads, so a rank has 4 on 2. `released` reads
# the queries of all heads, `set-entropy` the hidden states, which every rank has whole.
@pytest.mark.parametrize("method", ["released", "set-entropy"])
def test_two_ranks_match_the_oracle(method, monkeypatch):
    # SGLang wants a NUMA node or a list of cores for each rank; without its AMX kernels, which
    # would pin threads to them, it only counts the lists
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    policy = PruningPolicy.parse(f"layer=2,keep=0.25,method={method}")
    backend = registry().backend("sglang").load()
    with backend.open(demo.MODEL, policy, dtype="float32", **TWO_RANKS) as session:
        # a batch without pictures first: a layer's output is then not summed over the ranks yet
        answers = session.generate([Request(TEXT, NEW_TOKENS)])
        answers += session.generate([Request(content, NEW_TOKENS) for content in REQUESTS])
    oracle = Oracle(demo.MODEL)
    for content, answer in zip([TEXT, *REQUESTS], answers, strict=True):
        pictures = sum(isinstance(part, Path) for part in content)
        expected = oracle.generate(
            content, layer=2, keep=[KEEP] * pictures, method=method, max_new_tokens=NEW_TOKENS
        )
        kept = [list(span.kept) for span in answer.spans]
        assert kept == expected.kept, (
            f"{method} over two ranks keeps {kept} of {content}, the oracle {expected.kept}"
        )
        assert list(answer.output_ids) == expected.output_ids, (
            f"{content}: greedy tokens {list(answer.output_ids)}, the oracle has "
            f"{expected.output_ids}"
        )
