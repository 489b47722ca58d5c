"""LLaVA-1.5 in its original layout, `LlavaLlamaForCausalLM`: the one that SGLang 0.5.23 can run.

SGLang loads the CLIP tower of this layout in float16 whatever is asked, so the whole model has to
run in float16. The reference is transformers in float32, on the same weights in Hugging Face
layout; what float16 changes is measured with the oracle, and the pictures are chosen so that it
decides nothing.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ep_backends.shared.pictures import read_picture
from ep_conformance.checkpoints import make_picture, tiny_llava
from ep_conformance.oracle import Oracle
from ep_core.backend import KVSlots, Request
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

LAYER, KEEP, TOKENS = 2, 16, 64  # a picture of 112x112 has 64 tokens
POLICY = PruningPolicy.parse(f"layer={LAYER},keep={KEEP},method=released")
NEW_TOKENS = 4
NOISE_MARGIN = 4.0  # as in the conformance suite
NAMES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("llava") / "hf", seed=3)


@pytest.fixture(scope="module")
def original(hugging_face):
    """The same weights in the layout of the original release."""
    folder = hugging_face.parent / "original"
    tower = folder / "clip"  # SGLang knows the kind of tower by its path
    tower.mkdir(parents=True)
    config = json.loads((hugging_face / "config.json").read_text())
    weights, vision = {}, {}
    for name, tensor in load_file(hugging_face / "model.safetensors").items():
        if name.startswith("vision_tower."):
            vision[name.removeprefix("vision_tower.")] = tensor
        else:
            prefix = next(prefix for prefix in NAMES if name.startswith(prefix))
            weights[NAMES[prefix] + name.removeprefix(prefix)] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    save_file(vision, tower / "model.safetensors", {"format": "pt"})
    (tower / "config.json").write_text(json.dumps(config["vision_config"]))
    flat = config["text_config"] | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "image_token_index": config["image_token_index"],
        "image_aspect_ratio": "pad",
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config["vision_feature_layer"],
        "mm_vision_tower": str(tower),
    }
    (folder / "config.json").write_text(json.dumps(flat))
    for file in hugging_face.iterdir():  # tokenizer, chat template, processor
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(hugging_face):
    return [make_picture(hugging_face.parent / f"{i}.png", i, (112, 112)) for i in range(3)]


@pytest.fixture(scope="module")
def requests(pictures):
    contents = [
        (pictures[1], "what number is written?"),
        (pictures[2], "look: ", pictures[0], "and where?"),
        ("how many circles?",),
        (pictures[2], "and where?"),
    ]
    return [Request(content, NEW_TOKENS) for content in contents]


@pytest.fixture(scope="module")
def session(original):
    with registry().backend("sglang").load().open(original, POLICY) as session:
        yield session


def test_float16_decides_nothing(hugging_face, requests):
    single, half = Oracle(hugging_face), Oracle(hugging_face, torch.float16)
    for request in requests:
        keep = [KEEP] * sum(isinstance(part, Path) for part in request.content)
        asked = {"layer": LAYER, "keep": keep, "method": "released", "max_new_tokens": NEW_TOKENS}
        exact, rounded = (oracle.generate(request.content, **asked) for oracle in (single, half))
        for ours, theirs in zip(exact.scores, rounded.scores, strict=True):
            scores = torch.tensor(ours)
            noise = NOISE_MARGIN * float((torch.tensor(theirs) - scores).abs().max())
            best = scores.sort(descending=True).values
            gap = float(best[KEEP - 1] - best[KEEP])
            assert gap > noise, f"{request}: the threshold's gap is {gap:.2f}, noise {noise:.2f}"
        noise = NOISE_MARGIN * float((rounded.logits.float() - exact.logits).abs().max())
        best = exact.logits.topk(2).values
        gap = float((best[:, 0] - best[:, 1]).min())
        assert gap > noise, f"{request}: the best token leads by {gap:.2f}, noise {noise:.2f}"


def test_same_tokens_as_transformers(session, hugging_face, requests):
    transformers = registry().backend("transformers").load()
    with transformers.open(hugging_face, POLICY, dtype="float32") as reference:
        expected = reference.generate(requests)
    for request, ours, theirs in zip(requests, session.generate(requests), expected, strict=True):
        assert ours.prompt_tokens == theirs.prompt_tokens, f"{request}: prompts differ"
        assert ours.spans == theirs.spans, (
            f"{request}: SGLang keeps {ours.spans}, transformers {theirs.spans}"
        )
        assert ours.output_ids == theirs.output_ids, (
            f"{request}: SGLang answers {ours.output_ids}, transformers {theirs.output_ids}"
        )
        dropped = len(ours.spans) * (TOKENS - KEEP)
        if dropped:
            slots = KVSlots(ours.prompt_tokens, ours.prompt_tokens - dropped)
            assert ours.kv == slots, f"{dropped} tokens were dropped, the engine holds {ours.kv}"


def test_a_request_can_switch_pruning_off(session, hugging_face, requests):
    transformers = registry().backend("transformers").load()
    with transformers.open(hugging_face, None, dtype="float32") as reference:
        (expected,) = reference.generate(requests[:1])
    answer = ask(session, requests[0], "off")
    assert answer["meta_info"]["entropyprune"][0]["kept"] == TOKENS
    assert tuple(answer["output_ids"]) == expected.output_ids


def test_a_prefix_from_the_cache_gives_the_cold_answer(session, requests):
    one, two = requests[3], requests[1]  # both begin with the same picture
    session.engine.flush_cache()
    cold = ask(session, two)
    assert cold["meta_info"]["cached_tokens"] == 0
    session.engine.flush_cache()
    ask(session, one)
    half = ask(session, two)  # its first picture from the cache, its second one new
    whole = ask(session, two)
    hits = [answer["meta_info"]["cached_tokens"] for answer in (half, whole)]
    assert TOKENS <= hits[0] < 2 * TOKENS <= hits[1], f"{hits} tokens came from the cache"
    for answer in (half, whole):
        assert facts(answer) == facts(cold)


def ask(session, request, asked=None):
    """One request through the engine itself, to see what came from its cache."""
    text = "".join("<image>" if isinstance(part, Path) else part for part in request.content)
    custom = {"entropyprune": asked or {"details": True}}
    (answer,) = session.engine.generate(
        prompt=[f"USER: {text} ASSISTANT:"],
        image_data=[[read_picture(part) for part in request.content if isinstance(part, Path)]],
        sampling_params={
            "temperature": 0,
            "max_new_tokens": request.max_new_tokens,
            "custom_params": custom,
        },
    )
    return answer


def facts(answer):
    (info,) = answer["meta_info"]["entropyprune"]
    return info["spans"], info["kv"], answer["output_ids"]
