"""Qwen2-VL with the activation that LMDeploy computes its vision encoder with.

Published checkpoints ask for quick GELU, and LMDeploy runs them with GELU, pruned or not. So the
conformance suite expects their cases to fail; one that asks for GELU shows that nothing else does.
"""

import json

import pytest

from ep_conformance.checkpoints import make_picture, tiny_qwen2_vl
from ep_conformance.comparison import Pruned, expect
from ep_core.backend import Request
from ep_core.plugins import registry

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_qwen2_vl(tmp_path_factory.mktemp("models") / "qwen2-vl", seed=4)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", [None, "released", "set-entropy"])
def test_qwen2_vl(method, model, tmp_path):
    pictures = [make_picture(tmp_path / f"{i}.png", i, (112, 84 + 28 * i)) for i in range(3)]
    requests = [
        Request((pictures[0], "what number is written?"), 6),
        Request((pictures[1], "and", pictures[2], "is there a red star?"), 6),
        Request(("how many circles?",), 6),
    ]
    pruned = None if method is None else Pruned(2, 0.3, method)
    policy = None if pruned is None else pruned.policy
    with registry().backend("lmdeploy").load().open(model, policy, dtype="float32") as session:
        answers = session.generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        expect(model, request, pruned).check(answer)
