"""What differs from family to family (`families.py`) is so, and is all that differs.

Published Qwen2-VL checkpoints ask for quick GELU, and LMDeploy runs them with GELU, pruned or not.
So the conformance suite expects their cases to fail; one that asks for GELU shows that nothing else
does. LMDeploy's template of LLaVA moves pictures, so sessions render that prompt themselves.
"""

import json

import pytest

from ep_backends.lmdeploy.families import FAMILIES
from ep_backends.shared.pictures import read_picture
from ep_conformance.checkpoints import (
    make_picture,
    tiny_internvl,
    tiny_llava,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
)
from ep_conformance.comparison import Pruned, expect
from ep_core.backend import Request
from ep_core.plugins import registry

from .common import in_loop, start

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


TINY = {
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "llava": tiny_llava,
    "internvl": tiny_internvl,
}


def test_every_family_has_a_checkpoint_here():
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_a_server_moves_pictures_where_the_table_says_so(name, tmp_path):
    """Where it does not, sessions send what a client of the server sends."""
    from lmdeploy import GenerationConfig

    picture = make_picture(tmp_path / "0.png", 0, (112, 112))
    with start(TINY[name](tmp_path / name, seed=1), None) as session:
        engine = session.pipeline.async_engine
        image = {"type": "image_data", "image_data": {"data": read_picture(picture)}}
        texts = [{"type": "text", "text": text} for text in ("a star?", "and where?")]
        message = {"role": "user", "content": [texts[0], image, texts[1]]}
        config = GenerationConfig(max_new_tokens=1)

        async def preprocess(messages, rendered):
            return await engine.preprocess(
                messages, engine.session_mgr.get(), gen_config=config, do_preprocess=rendered
            )

        server = in_loop(session, preprocess([message], True))
        messages, as_tokens = session._messages(Request(("a star?", picture, "and where?")))
        ours = in_loop(session, preprocess(messages, not as_tokens))
        first = engine.tokenizer.encode("a star?", add_bos=False)
    at = "".join(map(chr, server.inputs["input_ids"])).find("".join(map(chr, first)))
    moved = at > server.inputs["multimodal"][0]["offset"]
    assert moved == bool(FAMILIES[name].moves_pictures)
    assert (ours.inputs["input_ids"] == server.inputs["input_ids"]) == (not moved)
    assert as_tokens == moved
