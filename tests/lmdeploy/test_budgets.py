"""Budgets that are not the same for every picture or prompt, through the engine."""

import pytest

from ep_conformance.checkpoints import make_picture, tiny_qwen2_5_vl
from ep_conformance.oracle import Oracle
from ep_core.backend import Request
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

TOKENS = (48, 12)  # of the two pictures


@pytest.mark.parametrize(
    ("budget", "fewest", "most"),
    [
        # 2 of 4 layers are whole, so the others keep a half
        ("average=0.75", [24, 6], [24, 6]),
        ("flops=0.2", [1, 1], [47, 11]),
        ("keep=5,min_tokens=12", [5, 12], [5, 12]),
    ],
)
def test_budget(budget, fewest, most, tmp_path):
    model = tiny_qwen2_5_vl(tmp_path / "model", seed=1)
    sizes = [(8 * 28, 6 * 28), (4 * 28, 3 * 28)]
    pictures = [make_picture(tmp_path / f"{i}.png", i, size) for i, size in enumerate(sizes)]
    request = Request((*pictures, "what number is written?"), 4)
    policy = PruningPolicy.parse(f"layer=2,{budget},method=set-entropy")
    with registry().backend("lmdeploy").load().open(model, policy, dtype="float32") as session:
        (answer,) = session.generate([request])
    keep = [len(span.kept) for span in answer.spans]
    assert [span.stop - span.start for span in answer.spans] == list(TOKENS)
    for kept, least, highest in zip(keep, fewest, most, strict=True):
        assert least <= kept <= highest, f"kept {keep}, not {fewest} to {most}"
    right = Oracle(model).generate(
        request.content, layer=2, keep=keep, method="set-entropy", max_new_tokens=4
    )
    assert [list(span.kept) for span in answer.spans] == right.kept
    assert list(answer.output_ids) == right.output_ids
