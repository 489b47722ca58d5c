"""The Triton kernels of SGLang, which a GPU runs by default, read the kept tokens only.

Here Triton's interpreter runs them: the same source, on the CPU.
"""

from dataclasses import replace

import pytest

from ep_conformance.checkpoints import make_picture, tiny_qwen2_5_vl
from ep_conformance.oracle import Oracle
from ep_core.backend import KVSlots, Request
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

KEEP, NEW_TOKENS = 3, 3


def test_triton_matches_the_oracle(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read by the engine's own processes
    model = tiny_qwen2_5_vl(tmp_path / "model", seed=1)
    content = (make_picture(tmp_path / "picture.png", 0, (112, 84)), "what number?")
    policy = PruningPolicy.parse(f"layer=2,keep={KEEP},method=released")
    backend = registry().backend("sglang").load()
    with backend.open(model, policy, dtype="float32", attention_backend="triton") as session:
        cold, cached = (session.generate([Request(content, NEW_TOKENS)])[0] for _ in range(2))
    expected = Oracle(model).generate(
        content, layer=2, keep=[KEEP], method="released", max_new_tokens=NEW_TOKENS
    )
    assert [list(span.kept) for span in cold.spans] == expected.kept
    assert list(cold.output_ids) == expected.output_ids
    assert cold.kv == KVSlots(*expected.kv)
    assert cached.cached_tokens > 0
    assert replace(cached, cached_tokens=0) == cold, (
        "with its prefix from the cache, the request gets another answer"
    )
