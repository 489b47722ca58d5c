"""The oracle against transformers, against itself, and against cases solved by hand."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from ep_conformance.checkpoints import (
    make_picture,
    tiny_internvl,
    tiny_llava,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
)
from ep_conformance.oracle import METHODS, Oracle, OracleResult, keep_best, keep_set, token_score

DEMO = Path(__file__).parents[2] / "ep_core" / "demo"
STEPS = 6

Size = tuple[int, int]
Message = list[str | Path]
Spec = tuple[str, list[str | Size]]  # a checkpoint and a message; a size stands for a picture

CASES: dict[str, Spec] = {
    "demo": ("demo", [(336, 336), "what color is the star?"]),
    "demo, two pictures": ("demo", [(336, 336), "and", (336, 336), "how many stars?"]),
    "qwen, one picture": ("qwen 6/2", [(112, 112), "what is this?"]),
    "qwen, two pictures": ("qwen 9/3", [(140, 84), "or the other", (84, 168), "which one?"]),
    "qwen, three pictures": (
        "qwen 6/2",
        ["see ", (56, 84), (112, 140), " then\n", (196, 56), "Which is largest? été 12"],
    ),
    "qwen, text alone": ("qwen 6/2", ["no picture at all"]),
    "qwen2-vl, one picture": ("qwen2-vl 6/2", [(112, 84), "what is this?"]),
    "qwen2-vl, two pictures": ("qwen2-vl 9/3", [(140, 84), "or", (84, 168), "which one?"]),
    "internvl, one tile": ("internvl 6/2", [(112, 112), "what is this?"]),
    "internvl, two and four tiles": (
        "internvl 6/2",
        ["see ", (224, 112), (224, 224), "and", (112, 112), "which is largest?"],
    ),
    "internvl, three tiles": ("internvl 9/3", [(112, 336), "what is this?"]),
    "llava, one picture": ("llava 4/4", [(112, 112), "\nwhat is this?"]),
    "llava, adjacent pictures": ("llava 4/4", [(112, 112), (112, 112), "same?"]),
    "llava full, text between": ("llava 6/2 full", ["in ", (112, 112), "a", (112, 112), "b"]),
}
PRUNED = [name for name in CASES if name != "qwen, text alone"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # The tensors are tiny. On cores shared with other work, waiting for a second thread at every
    # operation makes these tests take minutes instead of seconds.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "demo": DEMO / "model",
        "qwen 6/2": tiny_qwen2_5_vl(root / "qwen_6_2"),
        "qwen 9/3": tiny_qwen2_5_vl(root / "qwen_9_3", seed=1, heads=9, kv_heads=3),
        "qwen2-vl 6/2": tiny_qwen2_vl(root / "qwen2_vl_6_2"),
        "qwen2-vl 9/3": tiny_qwen2_vl(root / "qwen2_vl_9_3", seed=1, heads=9, kv_heads=3),
        "internvl 6/2": tiny_internvl(root / "internvl_6_2"),
        "internvl 9/3": tiny_internvl(root / "internvl_9_3", seed=1, heads=9, kv_heads=3),
        "llava 4/4": tiny_llava(root / "llava_4_4"),
        "llava 6/2 full": tiny_llava(
            root / "llava_6_2", seed=2, heads=6, kv_heads=2, layers=3, strategy="full"
        ),
    }


@pytest.fixture
def case(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path
) -> tuple[Path, Message]:
    name, spec = CASES[request.param]
    demo_pictures = sorted((DEMO / "pictures").glob("*.png"))
    content: Message = []
    for i, part in enumerate(spec):
        if isinstance(part, str):
            content.append(part)
        elif name == "demo":
            content.append(demo_pictures[i])
        else:
            content.append(make_picture(tmp_path / f"{i}.png", seed=i, size=part))
    return folders[name], content


@cache
def reference_model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


# Without torchvision there is no video processor and AutoProcessor refuses to load: processors are
# put together from their parts, and the check of each part's class is switched off.
class Unchecked:
    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> None:
        return None


class QwenWithPil(Unchecked, Qwen2_5_VLProcessor):
    pass


class OlderQwenWithPil(Unchecked, Qwen2VLProcessor):
    pass


class InternVLWithPil(Unchecked, InternVLProcessor):
    pass


class LlavaWithPil(Unchecked, LlavaProcessor):
    pass


# the processor, its image processor, and what of its settings it takes
PROCESSORS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "InternVLProcessor": (InternVLWithPil, GotOcr2ImageProcessorPil, ("image_seq_length",)),
    "LlavaProcessor": (
        LlavaWithPil,
        CLIPImageProcessorPil,
        ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"),
    ),
    "Qwen2VLProcessor": (OlderQwenWithPil, Qwen2VLImageProcessorPil, ()),
    "Qwen2_5_VLProcessor": (QwenWithPil, Qwen2VLImageProcessorPil, ()),
}


def reference_processor(folder: Path) -> Any:
    settings = json.loads((folder / "processor_config.json").read_text())
    processor, image_processor, keys = PROCESSORS[settings["processor_class"]]
    return processor(
        image_processor=image_processor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(),
        **{key: settings[key] for key in keys},
    )


def read_image(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def reference_inputs(folder: Path, content: Sequence[str | Path]) -> Any:
    items = [
        {"type": "image", "image": read_image(part)}
        if isinstance(part, Path)
        else {"type": "text", "text": part}
        for part in content
    ]
    return reference_processor(folder).apply_chat_template(
        [{"role": "user", "content": items}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def unpruned(folder: Path, content: Sequence[str | Path], steps: int = STEPS) -> OracleResult:
    return Oracle(folder).generate(
        content, layer=None, keep=None, method="released", max_new_tokens=steps
    )


def sizes(result: OracleResult) -> list[int]:
    return [stop - start for start, stop in result.spans]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, limit: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} vs {expected.shape}"
    worst = (actual - expected).abs().max().item()
    assert worst <= limit, f"{what}: largest difference {worst:.3g}, allowed {limit:g}"


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_unpruned_equals_transformers(case: tuple[Path, Message]) -> None:
    folder, content = case
    result = unpruned(folder, content)
    inputs = reference_inputs(folder, content)
    out = reference_model(folder).generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    prompt = inputs["input_ids"][0].tolist()
    assert result.input_ids == prompt, "the expanded prompts differ"
    assert result.output_ids == out.sequences[0, len(prompt) :].tolist(), "greedy tokens differ"
    assert_close(result.logits, torch.cat(out.logits), 1e-4, "logits")
    assert result.kv == (len(prompt), len(prompt)), "unpruned, every layer holds the prompt"


@pytest.mark.parametrize("case", PRUNED, indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_pruned_equals_transformers_with_masks(case: tuple[Path, Message], method: str) -> None:
    """One whole forward of transformers in which layers >= K cannot read the dropped tokens.

    Dropped tokens are still computed there, but nobody reads them. What is kept is worked out
    again from the tensors transformers saw, by another formula.
    """
    folder, content = case
    layer = 2
    full = unpruned(folder, content, steps=1)
    keep = [max(1, n // (3 + i)) for i, n in enumerate(sizes(full))]
    result = Oracle(folder).generate(
        content, layer=layer, keep=keep, method=method, max_new_tokens=STEPS
    )
    prompt = len(result.input_ids)
    assert [len(k) for k in result.kept] == keep
    assert result.kv == (prompt, prompt - sum(sizes(full)) + sum(keep)), "KV slots are wrong"

    model = reference_model(folder)
    inputs = reference_inputs(folder, content)
    given = torch.tensor([result.input_ids + result.output_ids[:-1]])
    length = given.shape[1]
    inputs["input_ids"], inputs["attention_mask"] = given, torch.ones_like(given)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (given == model.config.image_token_id).int()
    dropped = {
        start + i
        for (start, stop), kept in zip(result.spans, result.kept, strict=True)
        for i in set(range(stop - start)) - set(kept)
    }
    readable = torch.tensor([row not in dropped for row in range(length)])
    allowed = torch.ones(length, length).tril().bool() & (readable | torch.eye(length).bool())
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]

    seen: dict[str, torch.Tensor] = {}

    def hide(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": mask}

    def save_hidden(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["hidden"] = (args[0] if args else kwargs["hidden_states"])[0]

    def save_queries(_module: Any, _args: Any, output: torch.Tensor) -> None:
        seen["queries"] = output[0]

    layers = model.model.language_model.layers
    hooks = [x.register_forward_pre_hook(hide, with_kwargs=True) for x in layers[layer:]]
    hooks.append(layers[layer].register_forward_pre_hook(save_hidden, with_kwargs=True))
    hooks.append(layers[layer - 1].self_attn.q_proj.register_forward_hook(save_queries))
    try:
        with torch.no_grad():
            logits = model(**inputs).logits[0, prompt - 1 :]
    finally:
        for hook in hooks:
            hook.remove()
    assert_close(result.logits, logits, 1e-4, "pruned logits")
    assert result.output_ids == logits.argmax(-1).tolist(), "greedy tokens differ"

    for i, (start, stop) in enumerate(result.spans):
        if method == "set-entropy":
            rows = torch.nn.functional.normalize(seen["hidden"][start:stop].double(), dim=-1)
            expected = greedy_by_running_sum(rows @ rows.T, keep[i])
        else:
            heads = model.config.text_config.num_attention_heads
            q = seen["queries"][start:stop].double().view(stop - start, heads, -1)
            scores = singular_value_scores(q, method)
            assert result.scores is not None
            ours = torch.tensor(result.scores[i], dtype=torch.float64)
            assert_close(ours / scores.abs().max(), scores / scores.abs().max(), 1e-5, "scores")
            order = scores.argsort(descending=True, stable=True)
            expected = sorted(order[: keep[i]].tolist())
        assert result.kept[i] == expected, f"picture {i} keeps other tokens"


def singular_value_scores(q: torch.Tensor, method: str) -> torch.Tensor:
    """Scores [N] of queries [N, H, D]: eigenvalues of X X^T / H are squared singular values / H."""
    q = q - q.mean(1, keepdim=True)
    if method == "rows":
        q = torch.nn.functional.normalize(q, dim=-1)
    eigenvalues = torch.linalg.svdvals(q).square() / q.shape[1]
    if method == "trace":
        eigenvalues = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    entropy: torch.Tensor = torch.special.entr(eigenvalues).sum(-1)
    return entropy / math.log(q.shape[1])


def greedy_by_running_sum(gram: torch.Tensor, keep: int) -> list[int]:
    cost = gram.square().sum(1)
    picked = [int(cost.argmin())]
    cost = gram[picked[0]].square()
    while len(picked) < keep:
        cost[picked] = torch.inf
        picked.append(int(cost.argmin()))
        cost = gram[picked].square().sum(0)
    return sorted(picked)


@pytest.mark.parametrize("case", PRUNED, indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_keeping_every_token_changes_nothing(case: tuple[Path, Message], method: str) -> None:
    folder, content = case
    full = unpruned(folder, content)
    result = Oracle(folder).generate(
        content, layer=1, keep=sizes(full), method=method, max_new_tokens=STEPS
    )
    assert (result.kept, result.output_ids, result.kv) == (full.kept, full.output_ids, full.kv)
    assert_close(result.logits, full.logits, 1e-6, "logits with everything kept")


@pytest.mark.parametrize("case", PRUNED, indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_kept_set_ignores_what_follows(case: tuple[Path, Message], method: str) -> None:
    folder, content = case
    oracle = Oracle(folder)
    first = next(i for i, part in enumerate(content) if isinstance(part, Path))
    short = [*content[: first + 1], "something else entirely"]
    size = sizes(unpruned(folder, short, steps=1))[0]
    pictures = sum(isinstance(part, Path) for part in content)
    results = [
        oracle.generate(message, layer=2, keep=[size // 4] * count, method=method, max_new_tokens=1)
        for message, count in ((content, pictures), (short, 1))
    ]
    assert results[0].kept[0] == results[1].kept[0], "text after a picture changed what it keeps"


@pytest.mark.parametrize("name", ["qwen 6/2", "qwen2-vl 6/2", "internvl 6/2", "llava 4/4"])
def test_budgets_are_per_picture(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The second picture's budget does not touch the first picture's choice."""
    oracle = Oracle(folders[name])
    pictures = [make_picture(tmp_path / f"{i}.png", i, (112, 112)) for i in range(2)]
    kept = [
        oracle.generate(
            [*pictures, "x"], layer=1, keep=[5, k], method="released", max_new_tokens=1
        ).kept
        for k in (1, 12)
    ]
    assert kept[0][0] == kept[1][0]
    assert [len(k[1]) for k in kept] == [1, 12]


@pytest.mark.parametrize("name", ["qwen 6/2", "qwen2-vl 6/2", "internvl 6/2", "llava 4/4"])
def test_float64_agrees_with_float32(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    content: Message = [make_picture(tmp_path / "a.png", 3, (112, 112)), "which?"]
    single, double = (
        Oracle(folders[name], dtype).generate(
            content, layer=1, keep=[4], method="rows", max_new_tokens=STEPS
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert (single.kept, single.output_ids) == (double.kept, double.output_ids)
    assert_close(single.logits, double.logits, 1e-4, "float32 and float64")


def test_stops_after_end_token(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["llava 4/4"], folder)
    content: Message = [make_picture(tmp_path / "a.png", 0, (112, 112)), "go on"]
    free = unpruned(folder, content).output_ids
    end = free[2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 7]}))
    expected = free[: free.index(end) + 1]
    assert unpruned(folder, content).output_ids == expected, "the end token ends the answer"


def test_reads_other_layouts(folders: dict[str, Path], tmp_path: Path) -> None:
    """Tied embeddings, two weight files, module names, template in tokenizer_config.json."""
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen 6/2"], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    (folder / "model.safetensors").unlink()
    visual = {"model." + name: w for name, w in weights.items() if name.startswith("visual.")}
    text = {
        name.replace("model.", "model.language_model.", 1): w
        for name, w in weights.items()
        if name.startswith("model.")
    }
    save_file(visual, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(text, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    files = dict.fromkeys(visual, "model-00001-of-00002.safetensors")
    files |= dict.fromkeys(text, "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    content: Message = [make_picture(tmp_path / "a.png", 0, (84, 56)), "tied"]
    inputs = reference_inputs(folder, content)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    with torch.no_grad():
        logits = reference_model(folder)(**inputs).logits[0, -1:]
    assert_close(unpruned(folder, content, steps=1).logits, logits, 1e-4, "other layouts")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 0}, "layer 0 is outside 1..3"),
        ({"layer": 4}, "layer 4 is outside 1..3"),
        ({"method": "random"}, "'random' is not one of released, rows, trace, set-entropy"),
        ({"keep": None}, "one count for each of 1 pictures"),
        ({"keep": [2, 2]}, "one count for each of 1 pictures"),
        ({"keep": [0]}, "cannot keep 0 of the 16 tokens"),
        ({"keep": [17]}, "cannot keep 17 of the 16 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"content": ["a <|image_pad|> typed by hand"]}, "1 image placeholders for 0 pictures"),
    ],
)
def test_bad_requests_are_refused(
    change: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    picture = make_picture(tmp_path / "a.png", 0, (112, 112))
    request: dict[str, Any] = {
        "content": [picture, "x"],
        "layer": 1,
        "keep": [4],
        "method": "rows",
        "max_new_tokens": 1,
    } | change
    with pytest.raises(ValueError, match=message):
        Oracle(folders["qwen 6/2"]).generate(request.pop("content"), **request)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("qwen 6/2", (100, 112), "a.png is 100x112: .* multiples of 28"),
        ("qwen 6/2", (28, 28), "between 3136 and 200704 pixels"),
        ("qwen 6/2", (560, 560), "between 3136 and 200704 pixels"),
        ("qwen2-vl 6/2", (100, 112), "a.png is 100x112: .* multiples of 28"),
        ("internvl 6/2", (140, 112), "a.png is 140x112: .* multiples of 112"),
        ("internvl 6/2", (336, 224), "at most 4 tiles"),
        ("llava 4/4", (140, 112), "a.png is 140x112: .* must be 112x112"),
    ],
)
def test_pictures_that_need_resizing_are_refused(
    name: str, size: Size, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        unpruned(folders[name], [make_picture(tmp_path / "a.png", 0, size), "x"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "qwen 6/2",
            lambda c: c.update(model_type="qwen3_vl"),
            "not qwen3_vl with qwen2_5_vl_text",
        ),
        ("qwen 6/2", lambda c: c["text_config"].update(use_sliding_window=True), "sliding-window"),
        (
            "qwen 6/2",
            lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn"),
            "scaled RoPE",
        ),
        ("qwen2-vl 6/2", lambda c: c["rope_scaling"].update(type="yarn"), "scaled RoPE"),
        ("llava 4/4", lambda c: c.update(vision_feature_layer=[-2, -1]), "single vision_feature"),
        ("internvl 6/2", lambda c: c.update(vision_feature_layer=-2), "last layer only"),
        ("internvl 6/2", lambda c: c["vision_config"].update(use_qk_norm=True), "smaller tower"),
    ],
)
def test_unknown_models_are_refused(
    name: str,
    change: Callable[[dict[str, Any]], None],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    config = json.loads((folders[name] / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Oracle(tmp_path)


def test_two_heads_have_a_closed_form() -> None:
    # Centred, the heads are +d/2 and -d/2: one eigenvalue, |d|^2 / 4.
    queries = np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    eigenvalue = (1 + 4 + 1) / 4
    assert token_score(queries, "released") == pytest.approx(
        -eigenvalue * math.log(eigenvalue) / math.log(2)
    )
    # One direction has no entropy once its scale is gone.
    assert token_score(queries, "rows") == pytest.approx(0, abs=1e-12)
    assert token_score(queries, "trace") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("heads", [3, 5, 8, 32])
def test_orthogonal_heads_have_a_closed_form(heads: int) -> None:
    # X X^T / H of the centred unit vectors is (I - 1/H) / H: H - 1 eigenvalues 1/H.
    queries = np.eye(heads, heads + 3)
    even = math.log(heads - 1) / math.log(heads)
    assert token_score(queries, "released") == pytest.approx((heads - 1) / heads)
    assert token_score(queries, "rows") == pytest.approx(even)
    assert token_score(queries, "trace") == pytest.approx(even)


@pytest.mark.parametrize("method", ["released", "rows", "trace"])
def test_scores_ignore_head_order_rotation_and_common_part(method: str) -> None:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(6, 16))
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    score = token_score(queries, method)
    assert token_score(queries[::-1], method) == pytest.approx(score)
    assert token_score(queries @ rotation, method) == pytest.approx(score)
    assert token_score(queries + rng.normal(size=16), method) == pytest.approx(score)
    same_when_scaled = token_score(3 * queries, method) == pytest.approx(score)
    assert same_when_scaled == (method != "released"), "only `released` depends on the scale"


@pytest.mark.parametrize("method", ["released", "rows", "trace"])
def test_degenerate_queries(method: str) -> None:
    assert token_score(np.zeros((4, 8)), method) == 0.0
    assert token_score(np.ones((4, 8), dtype=np.float16), method) == 0.0, "equal heads"
    broken = np.ones((4, 8))
    for value in (math.nan, math.inf, -math.inf):
        broken[2, 3] = value
        assert math.isnan(token_score(broken, method)), f"a query holding {value} has no score"


@pytest.mark.parametrize(
    ("scores", "keep", "kept"),
    [
        ([1.0, 3.0, 2.0], 2, [1, 2]),
        ([5.0, 5.0, 5.0, 5.0], 2, [0, 1]),
        ([1.0, 2.0, 1.0, 2.0, 1.0], 3, [0, 1, 3]),
        ([math.nan, -9.0, math.inf, -math.inf, 0.0], 2, [1, 4]),
        ([math.nan, -9.0, math.inf, -math.inf, 0.0], 4, [0, 1, 2, 4]),
        ([-0.0, 0.0], 1, [0]),
    ],
)
def test_order_of_scores(scores: list[float], keep: int, kept: list[int]) -> None:
    assert keep_best(scores, keep) == kept


AXES = np.eye(3)


@pytest.mark.parametrize(
    ("rows", "keep", "kept", "why"),
    [
        (AXES, 1, [0], "all equal: the lowest index"),
        (AXES[[0, 0, 1, 2]], 1, [2], "duplicates cost 2, the others 1"),
        (AXES[[0, 0, 1, 2]], 2, [0, 2], "nothing overlaps token 2: the lowest index"),
        (AXES[[0, 0, 1, 2]], 3, [0, 2, 3], "a duplicate comes after the free direction"),
        (AXES[[0, 0, 1, 2]] * [[1], [-9], [2], [3]], 3, [0, 2, 3], "length and sign are ignored"),
        (np.ones((5, 3)), 3, [0, 1, 2], "all equal: indices in order"),
        ([[0, 0], [1, 0], [1, 0]], 2, [1, 2], "a zero row after duplicates"),
        ([[math.nan, 0], [1, 0], [math.inf, 1], [0, 1]], 2, [1, 3], "rows that are not finite"),
        ([[math.nan, 0], [1, 0], [0, 0], [0, 1]], 3, [0, 1, 3], "unusable rows by index"),
    ],
)
def test_set_entropy_by_hand(rows: Any, keep: int, kept: list[int], why: str) -> None:
    assert keep_set(np.array(rows, dtype=np.float32), keep) == kept, why


def test_set_entropy_takes_the_largest_entropy_at_each_step() -> None:
    """Each pick after the first maximises -ln tr((G_S / |S|)^2) over the possible additions."""
    rows = np.random.default_rng(4).normal(size=(12, 5))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    picked = keep_set(rows, 1)
    for size in range(2, 8):
        entropy = {}
        for extra in set(range(12)) - set(picked):
            chosen = [*picked, extra]
            gram = unit[chosen] @ unit[chosen].T / size
            entropy[extra] = -math.log(np.trace(gram @ gram))
        picked.append(max(entropy, key=lambda i: entropy[i]))
        assert keep_set(rows, size) == sorted(picked), f"{size} picks"
