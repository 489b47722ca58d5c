"""The tiny checkpoints: they load, they are small, and they tell one mistake from another."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ep_conformance.checkpoints import (
    make_picture,
    tiny_internvl,
    tiny_llava,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
)
from ep_conformance.oracle import METHODS, Oracle

Writer = Callable[[Path], Path]

WRITERS: dict[str, Writer] = {
    "qwen": tiny_qwen2_5_vl,
    "qwen, 9 heads on 3": lambda p: tiny_qwen2_5_vl(p, seed=3, heads=9, kv_heads=3),
    "qwen, 5 heads of 32": lambda p: tiny_qwen2_5_vl(p, heads=5, kv_heads=1, head_dim=32, layers=3),
    "qwen2-vl": tiny_qwen2_vl,
    "qwen2-vl, 9 heads on 3": lambda p: tiny_qwen2_vl(p, seed=3, heads=9, kv_heads=3),
    "internvl": tiny_internvl,
    "internvl, 9 heads on 3": lambda p: tiny_internvl(p, seed=3, heads=9, kv_heads=3),
    "llava": tiny_llava,
    "llava, 6 heads on 3": lambda p: tiny_llava(p, seed=3, heads=6, kv_heads=3, strategy="full"),
}


FAMILIES = (tiny_qwen2_5_vl, tiny_qwen2_vl, tiny_internvl, tiny_llava)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # The tensors are tiny. On cores shared with other work, waiting for a second thread at every
    # operation makes these tests take minutes instead of seconds.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / "model")


def test_transformers_loads_it(folder: Path, tmp_path: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, f"transformers complains about the weights: {problems}"
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size < 3_000_000, f"{size} bytes are too many"

    # What transformers saves has the same tensor names, and the oracle reads it to the bit.
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == load_file(folder / "model.safetensors").keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (tmp_path / "saved" / name).write_text((folder / name).read_text())
    (tmp_path / "saved" / "chat_template.jinja").write_text(
        (folder / "chat_template.jinja").read_text()
    )
    content: list[str | Path] = [make_picture(tmp_path / "a.png", 0, (112, 112)), "x"]
    ours, theirs = (
        Oracle(path).generate(content, layer=None, keep=None, method="rows", max_new_tokens=2)
        for path in (folder, tmp_path / "saved")
    )
    assert ours.output_ids == theirs.output_ids
    assert torch.equal(ours.logits, theirs.logits), "a saved copy computes something else"


def test_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    text_config = config.get("text_config", config)  # flat in Qwen2-VL
    assert len(tokenizer) == text_config["vocab_size"], "an id without a token"
    text = "The other one: été, 12 & \n<b>!"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()), "no pair was merged"
    assert tokenizer.eos_token_id == text_config["eos_token_id"]
    if config["model_type"] == "llava":
        assert tokenizer.convert_ids_to_tokens(config["image_token_index"]) == "<image>"
        assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    else:
        name = "<IMG_CONTEXT>" if config["model_type"] == "internvl" else "<|image_pad|>"
        assert tokenizer.convert_ids_to_tokens(config["image_token_id"]) == name


def test_image_processor(folder: Path, tmp_path: Path) -> None:
    with Image.open(make_picture(tmp_path / "a.png", 0, (112, 112))) as file:
        picture = file.copy()
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    if model_type == "llava":
        pixels = CLIPImageProcessorPil.from_pretrained(folder)(picture)["pixel_values"]
        assert np.shape(pixels) == (1, 3, 112, 112)
    elif model_type == "internvl":
        processor = GotOcr2ImageProcessorPil.from_pretrained(folder)
        for columns, rows in [(1, 1), (2, 1), (1, 2), (3, 1), (1, 4), (2, 2)]:
            pixels = processor(picture.resize((112 * columns, 112 * rows)))["pixel_values"]
            tiles = columns * rows
            assert np.shape(pixels) == (tiles + (tiles > 1), 3, 112, 112), "tiles and a thumbnail"
    else:
        out = Qwen2VLImageProcessorPil.from_pretrained(folder)(picture)
        assert out["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_seed_decides_every_byte(tmp_path: Path) -> None:
    for writer in FAMILIES:
        folders = [writer(tmp_path / f"{writer.__name__} {i}", i // 2) for i in range(3)]
        for file in folders[0].iterdir():
            assert file.read_bytes() == (folders[1] / file.name).read_bytes(), file.name
        names = [f / "model.safetensors" for f in folders]
        assert names[0].read_bytes() != names[2].read_bytes(), "the seed changes nothing"


def test_weights_are_exact_in_bfloat16(folder: Path) -> None:
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, tensor.bfloat16().float()), f"{name} changes in bfloat16"


@pytest.mark.parametrize("writer", FAMILIES)
def test_answers_and_choices_depend_on_the_picture(writer: Writer, tmp_path: Path) -> None:
    oracle = Oracle(writer(tmp_path / "model"))
    pictures = [make_picture(tmp_path / f"{i}.png", i, (112, 112)) for i in range(5)]

    def answers(layer: int | None, method: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        results = [
            oracle.generate([p, "what?"], layer=layer, keep=[4], method=method, max_new_tokens=4)
            for p in pictures
        ]
        for result in results:
            top = result.logits.topk(2).values
            gap = (top[:, 0] - top[:, 1]).min().item()
            assert gap > 1e-3, f"the two best logits are only {gap:.2g} apart"
            for scores in result.scores or []:
                spread = np.std(scores) / np.abs(scores).max()
                assert spread > 0.01, f"{method} hardly tells tokens apart ({spread:.2g})"
        return [(tuple(r.output_ids), tuple(r.kept[0])) for r in results]

    full = answers(None, "released")
    assert len({ids for ids, _ in full}) == 5, "the picture does not change the answer"
    chosen = {}
    for method in METHODS:
        pruned = answers(1, method)
        chosen[method] = [kept for _, kept in pruned]
        assert len(set(chosen[method])) == 5, f"{method} keeps the same tokens of all pictures"
        changed = sum(a[0] != b[0] for a, b in zip(full, pruned, strict=True))
        assert changed >= 3, f"{method}: pruning changes only {changed} of 5 answers"
    for one, other in itertools.combinations(METHODS, 2):
        assert chosen[one] != chosen[other], f"{one} and {other} cannot be told apart"


@pytest.mark.parametrize("writer", FAMILIES)
def test_impossible_shapes_are_refused(writer: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        writer(tmp_path, heads=6, kv_heads=4)
    with pytest.raises(ValueError, match="16 must divide head_dim"):
        writer(tmp_path, head_dim=24)


def test_pictures(tmp_path: Path) -> None:
    first = make_picture(tmp_path / "a.png", 7, (84, 56))
    with Image.open(first) as picture:
        assert picture.size == (84, 56)
    assert first.read_bytes() == make_picture(tmp_path / "b.png", 7, (84, 56)).read_bytes()
    assert first.read_bytes() != make_picture(tmp_path / "c.png", 8, (84, 56)).read_bytes()
    for seed in range(20):
        with Image.open(make_picture(tmp_path / "d.png", seed, (112, 112))) as picture:
            pixels = np.asarray(picture)
        means = pixels.reshape(4, 28, 4, 28, 3).mean((1, 3))
        assert means.std((0, 1)).max() > 10, f"picture {seed} is nearly constant"
